"""The matrix: what is left to do, in several processes, with progress; then tables and plots."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import FedwardError, StudyError
from common.study import Study
from server.publish import PROJECTORS
from simulations.comparison import inside, plots, tables
from simulations.comparison.data import Cohort, fingerprint
from simulations.comparison.execute import RESULT, Job, cohort_sites, execute, job
from simulations.comparison.measures import measure, on_everyone
from simulations.comparison.suite import Cell, Suite, cells, predecessor
from simulations.preflight import check_arms, place
from simulations.processes import sigterm_interrupts

_OF_ALL = {"macro", "tasks", "records", "seconds", "peak_memory_bytes"}  # what tables ask for
_ADAPTER = Path("run") / "adapter" / PROJECTORS


def plan(
    suite: Suite, base: Study, shards: Mapping[str, Path], out: Path
) -> tuple[list[Job], Cohort]:
    """Every cell, in the order in which they can run.

    Raises:
        FedwardError: The first study, shard or name that is wrong; nothing has run by then.
    """
    base = place(base)
    data, held_out = fingerprint(shards), base.evaluation.validation_fraction
    cohort = Cohort(shards, held_out, out / "data" / f"{data[:12]}-{held_out:g}")
    matrix = cells(suite, base)
    if len({cell.id for cell in matrix}) < len(matrix):
        raise StudyError("two rows have the same name", cure="rename an arm or a sweep")
    jobs: dict[str, Job] = {}
    points: dict[tuple[Any, ...], str] = {}

    def make(cell: Cell) -> Job:
        if cell.id not in jobs:
            earlier = predecessor(suite, base, cell)
            before = None if earlier is None else make(earlier)
            made = job(cell, base, cohort, data, out / "cells")
            if before is not None:
                identity = f"{made.identity} after {before.identity}"
                made = replace(made, before=before.folder, identity=identity)
            jobs[cell.id] = made
        return jobs[cell.id]

    for cell in matrix:
        made = make(cell)
        if cell.row.group in suite.sweeps:
            what = (cell.row.group, made.study.hash, cell.arrangement, cell.row.ratio)
            if other := points.get(what):
                raise StudyError(
                    f"'{other}' and '{cell.row.name}' are the same study: the sweep's key has no "
                    f"effect with privacy {cell.privacy}",
                    cure="sweep another key (without privacy, training_without_privacy is used), "
                    "or narrow the sweep's privacy",
                )
            points[what] = cell.row.name
    check_arms(_distinct(jobs.values()), shards)
    return list(jobs.values()), cohort


def _distinct(jobs: Iterable[Job]) -> dict[str, Study]:
    """A study of each sort, by the first row that has it: seeds, arrangements and what is trained
    how make no difference to whether it can be built and read."""
    found: dict[str, tuple[str, Study]] = {}
    for each in jobs:
        kinds = each.study.model_dump_json(include={"sources", "tasks", "model"})
        found.setdefault(kinds, (each.cell.row.name, each.study))
    return dict(found.values())


def waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can run at the same time; each starts from what an earlier wave, or none, made."""
    depth: dict[Path | None, int] = {}
    found: list[list[Job]] = []
    for each in jobs:  # in `plan`'s order
        depth[each.folder] = number = depth.get(each.before, -1) + 1
        found += [[]] if number == len(found) else []
        found[number].append(each)
    return found


def run(jobs: Sequence[Job], cohort: Cohort, processes: int, console: Console) -> None:
    """Runs what has no result yet; what is interrupted is done again the next time."""
    left = [j for j in jobs if "error" in (stored(j) or {"error": None})]
    if done := len(jobs) - len(left):
        console.print(f"{done} of {len(jobs)} cells are there already", highlight=False)
    if not left:
        return
    # A process per cell, whose peak memory is its own, forked from one that has imported everything
    # and run nothing: polars hangs in a fork of a process that used it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.comparison.execute"])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    with sigterm_interrupts(), Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=len(left), eta="")
        began, count = time.monotonic(), 0
        for wave in waves(left):
            pool = ProcessPoolExecutor(
                processes, context, initializer=_settle, max_tasks_per_child=1
            )
            try:
                for future in as_completed([pool.submit(execute, j, cohort) for j in wave]):
                    result = _result(future)
                    count += 1
                    rest = (time.monotonic() - began) / count * (len(left) - count)
                    progress.update(bar, advance=1, eta=f"about {rest / 60:.0f} min left")
                    progress.console.print(_line(result), highlight=False)
            except BaseException:
                for process in list((pool._processes or {}).values()):
                    process.terminate()  # a cell may have minutes to go
                pool.shutdown(cancel_futures=True)
                raise
            pool.shutdown()


def results(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Of every cell that has one, failures included, in the suite's order."""
    return [result for each in jobs if (result := stored(each)) is not None]


def stored(task: Job) -> dict[str, Any] | None:
    """A cell's result or failure; None where there is none of this identity, or half of one."""
    try:
        found = json.loads((task.folder / RESULT).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("identity") != task.identity:
        return None
    whole = found.keys() >= _OF_ALL and (task.folder / "scores.npz").is_file()
    return found if whole or "error" in found else None


def wanted(jobs: Sequence[Job], only: Collection[str]) -> list[Job]:
    """The cells of these arms (empty: of all), and those that they start from."""
    by_folder, kept = {each.folder: each for each in jobs}, set()
    for each in jobs:
        at: Path | None = each.folder if not only or each.cell.row.base in only else None
        while at is not None and at not in kept:
            kept.add(at)
            at = by_folder[at].before
    return [each for each in jobs if each.folder in kept]


def report(
    suite: Suite, jobs: Sequence[Job], cohort: Cohort, out: Path, command: str
) -> list[tables.Table]:
    """Writes tables, then pictures; one that cannot be drawn is a line of the summary."""
    found = _on_the_same_records(results(jobs), jobs, cohort)
    made = tables.tables(suite, found)
    heading = f"# {suite.name}\n\n{suite.description}\n\n```sh\n{command}\n```\n"
    for old in [*(out / "tables").glob("*.*"), *(out / "plots").glob("*.png")]:
        old.unlink()  # of a suite that had more
    tables.write(out, made, heading)
    pictures = plots.pictures(suite, found)
    for each in jobs:
        if each.cell.row.name in suite.maps and (each.folder / _ADAPTER).exists():
            pictures[f"map-{each.cell.id}"] = functools.partial(_draw_map, each, cohort)
    (out / "plots").mkdir(exist_ok=True)
    links = []
    for name, draw in pictures.items():
        try:
            draw(out / "plots" / f"{name}.png")
        except Exception as error:  # the tables of hours of training are worth more than a picture
            links.append(f"{name}: not drawn: {str(error) or type(error).__name__}\n")
        else:
            links.append(f"![{name}](plots/{name}.png)")
    tables.write(out, made, heading + "\n" + "\n".join(links) + "\n")
    return made


def _draw_map(each: Job, cohort: Cohort, path: Path) -> None:
    hospitals = cohort_sites(cohort, each.cell)
    z, labels = inside.representations(each.study, hospitals, each.folder / _ADAPTER)
    plots.plot_map(z, labels, next(iter(each.study.tasks)), path)


def _on_the_same_records(
    found: Sequence[dict[str, Any]], jobs: Sequence[Job], cohort: Cohort
) -> list[dict[str, Any]]:
    """Results measured on all held-out records: an arm of few sources skips those that lack them.

    Logistic regression picks its records itself; `complete_records_only` is the study's own choice.
    """
    of = {each.identity: each for each in jobs}
    everyone = functools.cache(cohort.held_out)
    same = []
    for result in found:
        each = of[result["identity"]]
        if (
            "error" not in result
            and each.cell.row.arm.kind != "dp-logistic"
            and not each.study.complete_records_only
        ):
            tasks = tuple(each.study.tasks)
            labels, patients = everyone(each.cell.seed, tasks)
            if result["records"] < len(labels):
                with np.load(each.folder / "scores.npz") as s:
                    scores = on_everyone(s["logits"], s["labels"], s["patients"], labels)
                result = result | measure(*scores, tasks) | {"patients": patients}
        same.append(result)
    return same


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise FedwardError(
            "a cell's process was killed, most likely for want of memory",
            cure="run the same command again, with fewer --jobs; finished cells are kept",
        ) from None


def _settle() -> None:
    torch.set_num_threads(1)  # cells share the machine, not a kernel
    logging.getLogger("fedward").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Linux's PR_SET_PDEATHSIG would wait for the forkserver, which stays while a cell does.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _line(result: Mapping[str, Any]) -> str:
    where = f"{result['row']}, {tables.privacy_name(result['privacy'])}, {result['arrangement']}"
    where += f", seed {result['seed']}"
    if "error" in result:
        return f"{where}: failed: {result['error']}"
    auroc = result["macro"]["auroc"]
    shown = "–" if auroc is None else f"{auroc:.3f}"
    return f"{where}: {shown} in {result['seconds']:.0f} s"

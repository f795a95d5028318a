"""One cell: training in its arrangement, scores of the held-out patients, what it cost."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.site.encoders.run import Populations, encode_site
from client.site.encoders.vault import Vault
from client.site.shard import Shard
from common.errors import FedwardError, StudyError
from common.files import write_atomically
from common.study import Study, resolve
from simulations import stories
from simulations.comparison import inside
from simulations.comparison.data import Cohort, Hospitals, declared, locked
from simulations.comparison.measures import measure
from simulations.comparison.suite import Cell, study_of
from simulations.inline import run_inline

RESULT = "cell.json"


@dataclass(frozen=True)
class Job:
    """A cell, ready to be run in any process.

    Attributes:
        identity: Hash of all that decides the result but chance.
        before: Folder of the cell whose adapter this one starts from.
    """

    cell: Cell
    study: Study
    folder: Path
    identity: str
    before: Path | None = None


@dataclass(frozen=True)
class Scores:
    """Of held-out records: `[N, K]`, `[N, K]`, `[N]`."""

    logits: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def job(cell: Cell, base: Study, cohort: Cohort, data: str, folder: Path) -> Job:
    """What a cell will do.

    Raises:
        StudyError: Its study cannot be.
    """
    study = study_of(base, cell, cohort_sites(cohort, cell).declared)
    if cell.row.arm.kind == "dp-logistic" and len(study.tasks) != 1:
        raise StudyError(
            f"arm '{cell.row.name}': logistic regression knows one task, study '{study.name}' has "
            f"{len(study.tasks)}",
            cure="take the arm out, or compare on a study of one task",
        )
    # Resolved, so that what makes noise or rosters impossible is found before anything runs.
    settled = resolve(study, epsilon=cell.epsilon, private=cell.privacy != "none", seed=cell.seed)
    # Which others the arm's row has says nothing of this cell.
    arm = cell.row.arm.model_copy(update={"privacy": None, "arrangements": None, "seeds": None})
    told = [settled.hash, data, cell.arrangement, arm.model_dump_json(), cell.row.ratio]
    identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Job(cell, settled, folder / cell.id, identity)


def cohort_sites(cohort: Cohort, cell: Cell) -> Hospitals:
    return cohort.hospitals(cell.arrangement, cell.seed, cell.row.ratio)


def execute(task: Job, cohort: Cohort) -> dict[str, Any]:
    """Runs a cell, writes `cell.json` and `scores.npz`, and returns the former.

    A mistake is the cell's result, so that the others go on.
    """
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    began = time.monotonic()
    cell = task.cell
    result: dict[str, Any] = {
        "identity": task.identity,
        "row": cell.row.name,
        "arm": cell.row.base,
        "group": cell.row.group,
        "value": cell.row.value,
        "privacy": cell.privacy,
        "arrangement": cell.arrangement,
        "seed": cell.seed,
        "study": task.study.hash,
    }
    try:
        scores, told = _KINDS[cell.row.arm.kind](task, cohort_sites(cohort, cell))
        np.savez_compressed(
            task.folder / "scores.npz",
            logits=scores.logits.astype(np.float32),
            labels=scores.labels.astype(np.int8),
            patients=scores.patients,
        )
        result |= told | measure(
            scores.logits, scores.labels, scores.patients, list(task.study.tasks)
        )
    except FedwardError as error:
        result["error"] = str(error)
    except Exception as error:  # a bug or a full disk: still one cell of many
        result["error"] = f"{type(error).__name__}: {error}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak_memory_bytes"] = peak if sys.platform == "darwin" else peak * 1024
    result["seconds"] = time.monotonic() - began
    write_atomically(task.folder / RESULT, json.dumps(result, indent=1), mode=0o644)
    return result


def _encode(study: Study, hospitals: Hospitals) -> list[Populations]:
    """Populations of each hospital; the first to come encodes, the others find it in the vault."""
    found = []
    for name, path in hospitals.shards.items():
        with locked(hospitals.vaults[name] / ".lock"), Vault.open(hospitals.vaults[name]) as vault:
            found.append(encode_site(study, Shard.open(path), vault, population_key=b"by shard"))
    return found


def _system(task: Job, hospitals: Hospitals) -> tuple[Scores, dict[str, Any]]:
    whole = _declared(task.study, hospitals, _encode(task.study, hospitals))
    apart = task.cell.arrangement == "local"
    groups = [[name] for name in hospitals.shards] if apart else [list(hospitals.shards)]
    parts: list[Scores] = []
    told: dict[str, Any] = {"parameters": 0, "train_seconds": 0.0, "epsilon": {}}
    trace = inside.Trace(task.study)
    for names in groups:
        study = _alone(whole, names) if apart else whole
        place = "-".join(names) if apart else "run"
        before = None if task.before is None else task.before / place
        if before is not None and not (before / "adapter").is_dir():
            raise FedwardError(
                f"the cell that it starts from, {task.before}, has failed",
                cure="its cell.json says why",
            )
        if before is not None:  # a copy: other arms start from the same cell, maybe now
            shutil.copytree(before / "sites", task.folder / "sites" / place, symlinks=True)
        with _telling(task.folder / place):
            report = run_inline(
                study,
                {name: hospitals.shards[name] for name in names},
                task.folder / place,
                vaults={name: hospitals.vaults[name] for name in names},
                start=None if before is None else before / "adapter",
                sites=None if before is None else task.folder / "sites" / place,
                threads=1,
                on_round=None if apart else trace.of(hospitals),
            )
        parts += _exact(task.folder / place / "sites" / name for name in names)
        told["parameters"] = report.trainable_parameters
        told["train_seconds"] += report.seconds.train
        for site in report.sites:
            told["epsilon"][site.name] = site.epsilon
    told["seconds_per_epoch"] = _per_epoch(task.study, told["train_seconds"])
    if trace.points:
        told["weights"] = trace.points
    return _together(parts), told


@contextmanager
def _telling(out: Path) -> Iterator[None]:
    """Keeps the hospitals' log of the run in `out`, and adds to its error why they declined."""
    log = out / "logs" / "daemon.log"
    log.parent.mkdir(parents=True)
    handler, logger = logging.FileHandler(log), logging.getLogger("fedward.daemon")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except FedwardError as error:
        raise FedwardError(f"{error}{stories.told(stories.stories(out))}") from error
    finally:
        logger.removeHandler(handler)
        handler.close()


def _declared(study: Study, hospitals: Hospitals, sites: list[Populations]) -> Study:
    """The study with each hospital declaring what it has of patients with any of the sources."""
    raw = study.model_dump(mode="json")
    for name, site in zip(hospitals.shards, sites, strict=True):
        raw["federation"]["sites"][name]["patients_declared"] = declared(site.train.n_patients)
    return Study.model_validate(raw)


def _alone(study: Study, names: list[str]) -> Study:
    raw = study.model_dump(mode="json")
    raw["federation"]["sites"] = {n: raw["federation"]["sites"][n] for n in names}
    raw["privacy"]["noise_multiplier"] = raw["evaluation"]["noise_multiplier"] = None
    again = Study.model_validate(raw)
    private = study.privacy.mode != "none"
    return resolve(again, private=private, epsilon=study.privacy.epsilon if private else None)


def _per_epoch(study: Study, seconds: float) -> float:
    """Of all hospitals, for as many draws as they have patients."""
    steps = study.federation.rounds * study.training.steps_per_round
    return seconds / (steps * study.privacy.sample_rate)


def _exact(sites: Iterable[Path]) -> Iterator[Scores]:
    """The last scores of each hospital; one without any of the sources took no part."""
    for site in sites:
        releases = sorted(
            (site / "exact").glob("release-*.npz"), key=lambda p: int(p.stem.split("-")[1])
        )
        if releases:
            with np.load(releases[-1]) as stored:
                yield Scores(stored["logits"], stored["labels"], stored["patients"])


def _together(parts: list[Scores]) -> Scores:
    patients, start = [], 0
    for part in parts:
        patients.append(part.patients + start)
        start += int(part.patients.max(initial=-1)) + 1
    return Scores(
        np.concatenate([p.logits for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate(patients),
    )


def _haim(task: Job, hospitals: Hospitals) -> tuple[Scores, dict[str, Any]]:
    from simulations.baselines import haim

    trains, validations, start = [], [], 0
    for site in _encode(task.study, hospitals):
        trains.append(haim.table_of(site.train, start))
        validations.append(haim.table_of(site.validation, start + site.train.n_patients))
        start += site.train.n_patients + site.validation.n_patients
    grid = haim.GRID if task.cell.row.arm.grid == "full" else haim.ONE
    began = time.monotonic()
    logits = haim.scores(trains, validations, task.cell.arrangement, grid=grid, seed=task.cell.seed)
    held = haim.pooled(validations)
    seconds = time.monotonic() - began
    return Scores(logits, held.labels, held.patients), {"train_seconds": seconds}


def _dp_logistic(task: Job, hospitals: Hospitals) -> tuple[Scores, dict[str, Any]]:
    from simulations.baselines import dp_logistic, haim

    apart = task.cell.arrangement == "local"
    sites, held, start = [], [], 0
    for site in _encode(task.study, hospitals):
        sites.append(dp_logistic.arrays_of(site.train, declared(site.train.n_patients)))
        held.append(haim.table_of(site.validation, start))
        start += site.validation.n_patients
    epsilon, began, privacy = task.cell.epsilon, time.monotonic(), task.study.privacy
    recipe = replace(
        dp_logistic.recipe_for(epsilon),
        sample_rate=privacy.sample_rate,
        max_grad_norm=privacy.max_grad_norm,
        spare=privacy.spare_rounds,
    )
    weights = [
        dp_logistic.fit_dp_logistic(
            some,
            epsilon=epsilon,
            delta=privacy.delta,
            recipe=recipe,
            seed=task.cell.seed if epsilon is None else None,
        )
        for some in ([[site] for site in sites] if apart else [sites])
    ]
    seconds = time.monotonic() - began
    each = weights if apart else weights * len(held)
    # The intercept is the public prevalence's, which puts logit 0 where classes balance.
    logits = np.concatenate(
        [dp_logistic.features_of(table) @ w for table, w in zip(held, each, strict=True)]
    )
    whole = haim.pooled(held)
    spent: Mapping[str, float | None] = dict.fromkeys(hospitals.shards, epsilon)
    told = {"parameters": len(weights[0]), "train_seconds": seconds, "epsilon": spent}
    return Scores(logits[:, None], whole.labels, whole.patients), told


_KINDS = {"system": _system, "haim": _haim, "dp-logistic": _dp_logistic}

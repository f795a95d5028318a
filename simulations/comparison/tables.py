"""From finished cells to tables, as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from simulations.comparison.measures import MEASURES, NAMES
from simulations.comparison.suite import Suite

Result = Mapping[str, Any]
NONE = "–"
ARRANGEMENTS = ("federated", "pooled", "local")


@dataclass(frozen=True)
class Table:
    """A table of texts, with a line on how to read it."""

    name: str
    title: str
    note: str
    rows: list[dict[str, str]]

    def markdown(self) -> str:
        if not self.rows:
            return ""
        columns = list(self.rows[0])
        lines = [
            f"## {self.title}",
            "",
            self.note,
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(row.get(c, NONE) for c in columns) + " |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"


def tables(suite: Suite, results: Sequence[Result]) -> list[Table]:
    """All tables that the results give; failed cells stand in the main one."""
    good = [r for r in results if "error" not in r]
    plain = [r for r in good if not r["group"]]
    found = [
        _main(suite, [r for r in results if not r["group"]]),
        _measures(plain),
        _tasks(plain, "auroc", "AUROC by task"),
        _tasks(plain, "precision", "Precision by task"),
        _tasks(plain, "recall", "Recall by task"),
        _differences(suite, plain),
        _grouped(good, "ablation", "Ablations", "kind of sources left out"),
        _grouped(good, "single", "Single sources", "source"),
        _best_single(good),
        *(_grouped(good, name, f"Sweep: {name}", s.key) for name, s in suite.sweeps.items()),
        _costs(good),
    ]
    return [table for table in found if table.rows]


def write(folder: Path, found: Iterable[Table], heading: str) -> None:
    """`tables/<name>.md` and `.csv`, and all of them in `summary.md`."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    text = [heading]
    for table in found:
        (folder / "tables" / f"{table.name}.md").write_text(table.markdown())
        pl.DataFrame(table.rows).write_csv(folder / "tables" / f"{table.name}.csv")
        text.append(table.markdown())
    (folder / "summary.md").write_text("\n".join(text))


def spread(results: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    """Mean ± standard deviation over seeds; with one seed the 95 % interval, where it is one of
    macro AUROC."""
    some = [v for r in results if (v := value(r)) is not None]
    if not some:
        return NONE
    if len(some) > 1:
        return f"{_short(np.mean(some))} ± {_short(np.std(some, ddof=1))}"
    only = next(r for r in results if value(r) is not None)
    interval = only.get("interval")
    if interval and value(only) == only["macro"]["auroc"]:
        return f"{_short(some[0])} ({_short(interval[0])}–{_short(interval[1])})"
    return _short(some[0])


def privacy_name(privacy: Any) -> str:
    return "no privacy" if privacy == "none" else f"ε = {privacy:g}"


def by(results: Iterable[Result], *keys: str) -> dict[tuple[Any, ...], list[Result]]:
    """Results with the same values, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        found.setdefault(tuple(result[key] for key in keys), []).append(result)
    return found


def macro(name: str) -> Callable[[Result], float | None]:
    return lambda result: result["macro"][name]


def _short(value: Any) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _main(suite: Suite, results: Sequence[Result]) -> Table:
    privacies = list(by(results, "privacy"))
    rows = []
    for (row, arrangement), some in by(results, "row", "arrangement").items():
        line = {"": str(row), "patients": str(arrangement)}
        for (privacy,) in privacies:
            cells = [r for r in some if r["privacy"] == privacy]
            good = [r for r in cells if "error" not in r]
            text = spread(good, macro("auroc"))
            if len(good) < len(cells):
                text += f" ({len(cells) - len(good)} failed)"
            line[privacy_name(privacy)] = text
        rows.append(line)
    seeds = len(by(results, "seed"))
    return Table(
        "main",
        "Macro AUROC",
        f"Held-out patients, exact; {seeds} split{'s' if seeds > 1 else ''} (seeds), mean ± "
        "standard deviation over them, of splits and noise; with one, a 95 % bootstrap interval.",
        rows,
    )


def _measures(results: Sequence[Result]) -> Table:
    rows = []
    for (row, privacy, arrangement), some in by(results, "row", "privacy", "arrangement").items():
        line = {"": str(row), "privacy": privacy_name(privacy), "patients": str(arrangement)}
        line |= {NAMES[m]: spread(some, macro(m)) for m in MEASURES}
        rows.append(line)
    return Table(
        "measures",
        "All measures, macro",
        "Threshold at logit 0, where classes balance by public prevalence. Precision and recall of "
        "the positive class; a task counts where its measure exists.",
        rows,
    )


def _tasks(results: Sequence[Result], name: str, title: str) -> Table:
    columns = by(results, "row", "privacy", "arrangement")
    tasks = list(dict.fromkeys(task for r in results for task in r["tasks"]))
    arrangements = {r["arrangement"] for r in results}
    privacies = {str(r["privacy"]) for r in results}
    rows = []
    for task in tasks if len(tasks) > 1 else []:
        line = {"": task}
        for (row, privacy, arrangement), some in columns.items():
            head = str(row)
            head += f", {privacy_name(privacy)}" if len(privacies) > 1 else ""
            head += f", {arrangement}" if len(arrangements) > 1 else ""
            line[head] = spread(some, lambda r, t=task: r["tasks"].get(t, {}).get(name))  # type: ignore[misc]
        rows.append(line)
    return Table(f"tasks-{name}", title, "As in the main table.", rows)


def _differences(suite: Suite, results: Sequence[Result]) -> Table:
    rows = []
    kinds = by(results, "privacy", "arrangement") if suite.reference else {}
    for (privacy, arrangement), some in kinds.items():
        other = {r["seed"]: r for r in some if r["row"] == suite.reference}
        for (row,), own in by(some, "row").items():
            pairs = [
                (r["macro"]["auroc"], other[r["seed"]]["macro"]["auroc"])
                for r in own
                if r["seed"] in other
            ]
            gaps = [a - b for a, b in pairs if a is not None and b is not None]
            if row == suite.reference or not gaps:
                continue
            error = np.std(gaps, ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            rows.append(
                {
                    "": str(row),
                    "privacy": privacy_name(privacy),
                    "patients": str(arrangement),
                    "difference": f"{np.mean(gaps):+.3f}",
                    "standard error": f"{error:.3f}" if len(gaps) > 1 else NONE,
                    "seeds": str(len(gaps)),
                }
            )
    title = f"Macro AUROC less that of {suite.reference}"
    return Table("differences", title, "Seed by seed on the same held-out patients.", rows)


def _grouped(results: Sequence[Result], group: str, title: str, what: str) -> Table:
    own = [r for r in results if r["group"] == group]
    arms = {r["arm"] for r in own}
    rows = []
    for (arm, privacy, arrangement), some in by(own, "arm", "privacy", "arrangement").items():
        whole = [
            r
            for r in results
            if not r["group"]
            and (r["row"], r["privacy"], r["arrangement"]) == (arm, privacy, arrangement)
        ]
        for (value,), cells in by(some, "value").items():
            line = {"": str(arm), what: str(value), "privacy": privacy_name(privacy)}
            line |= {"patients": str(arrangement), "macro AUROC": spread(cells, macro("auroc"))}
            rows.append(line)
        if whole and group in ("ablation", "single"):
            line = {"": str(arm), what: "all sources", "privacy": privacy_name(privacy)}
            line |= {"patients": str(arrangement), "macro AUROC": spread(whole, macro("auroc"))}
            rows.append(line)
    note = f"Macro AUROC of {', '.join(sorted(arms))}, all on the same held-out "
    note += "records: one of which an arm has nothing to read has logit 0, the prior."
    return Table(f"group-{group}", title, note, rows)


def _best_single(results: Sequence[Result]) -> Table:
    """The best source of each arm: by macro, and task by task as UNI-MLM's table has it."""
    rows = []
    own = [r for r in results if r["group"] == "single"]
    for (arm, privacy, arrangement), some in by(own, "arm", "privacy", "arrangement").items():
        of_source = by(some, "value")
        means = {
            source: np.mean([r["macro"]["auroc"] for r in cells])
            for (source,), cells in of_source.items()
            if all(r["macro"]["auroc"] is not None for r in cells)
        }
        if not means:
            continue
        best = max(means, key=lambda source: means[source])
        per_task = []
        for task in dict.fromkeys(task for r in some for task in r["tasks"]):
            values = [
                np.mean(known)
                for cells in of_source.values()
                if None not in (known := [r["tasks"].get(task, {}).get("auroc") for r in cells])
            ]
            per_task += [max(values)] if values else []
        line = {"": str(arm), "privacy": privacy_name(privacy), "patients": str(arrangement)}
        line |= {"best source": str(best), "macro AUROC": _short(float(means[best]))}
        rows.append(line | {"best source of each task": _short(float(np.mean(per_task)))})
    note = "Chosen on the held-out patients themselves, as in the paper: optimistic. A record "
    note += "without the source has logit 0, the prior."
    return Table("best-single-source", "Best single source", note, rows)


def _costs(results: Sequence[Result]) -> Table:
    rows = []
    for (row, privacy, arrangement), some in by(results, "row", "privacy", "arrangement").items():
        parameters = some[0].get("parameters")
        epochs = [r["seconds_per_epoch"] for r in some if "seconds_per_epoch" in r]
        rows.append(
            {
                "": str(row),
                "privacy": privacy_name(privacy),
                "patients": str(arrangement),
                "trained parameters": f"{parameters:,}" if parameters else NONE,
                "seconds per epoch": f"{np.median(epochs):.1f}" if epochs else NONE,
                "seconds in all": f"{np.median([r['seconds'] for r in some]):.0f}",
                "peak memory, MB": f"{max(r['peak_memory_bytes'] for r in some) / 1e6:.0f}",
            }
        )
    note = (
        "An epoch is as many draws as all hospitals have training patients, one hospital after the "
        "other on one thread; medians over seeds. Peak memory is the whole process's."
    )
    return Table("costs", "Costs", note, rows)

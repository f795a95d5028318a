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


class Figure(str):
    """A text for people that knows its numbers, which a CSV holds: each under a name of its own, to
    be put behind the column's (`mean`, `sd`, `n`; empty: the column itself)."""

    numbers: Mapping[str, float | None]

    def __new__(cls, text: str, **numbers: float | None) -> Figure:
        made = super().__new__(cls, text)
        made.numbers = numbers
        return made


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

    def csv(self) -> str:
        """Texts as they are, figures as numbers; empty where there is none."""
        parts = {
            column: dict.fromkeys(
                name
                for row in self.rows
                if isinstance(figure := row.get(column), Figure)
                for name in figure.numbers
            )
            for column in self.rows[0]
        }
        lines = [
            {
                f"{column} {part}".strip(): getattr(row.get(column), "numbers", {}).get(part)
                for column, names in parts.items()
                for part in names
            }
            | {column: row.get(column) for column, names in parts.items() if not names}
            for row in self.rows
        ]
        order = [f"{c} {part}".strip() for c, names in parts.items() for part in names or [""]]
        return pl.DataFrame(lines, infer_schema_length=None).select(order).write_csv()


def tables(suite: Suite, results: Sequence[Result]) -> list[Table]:
    """All tables that the results give; failed cells stand in the main one and in the groups'."""
    good = [r for r in results if "error" not in r]
    plain = [r for r in good if not r["group"]]
    found = [
        _main(suite, [r for r in results if not r["group"]]),
        _measures(suite, plain),
        _tasks(suite, plain, "auroc", "AUROC by task"),
        _tasks(suite, plain, "precision", "Precision by task"),
        _tasks(suite, plain, "recall", "Recall by task"),
        _differences(suite, plain),
        _grouped(suite, results, "ablation", "Ablations", "kind of sources left out"),
        _grouped(suite, results, "single", "Single sources", "source"),
        _best_single(good),
        *(_grouped(suite, results, n, f"Sweep: {n}", s.key) for n, s in suite.sweeps.items()),
        _costs(good),
    ]
    return [table for table in found if table.rows]


def write(folder: Path, found: Iterable[Table], heading: str) -> None:
    """`tables/<name>.md` and `.csv`, and all of them in `summary.md`."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    text = [heading]
    for table in found:
        (folder / "tables" / f"{table.name}.md").write_text(table.markdown())
        (folder / "tables" / f"{table.name}.csv").write_text(table.csv())
        text.append(table.markdown())
    (folder / "summary.md").write_text("\n".join(text))


def spread(
    results: Sequence[Result], value: Callable[[Result], float | None], seeds: int = 0
) -> Figure:
    """Mean ± standard deviation over seeds; with one seed the 95 % interval, where it is one of
    macro AUROC. Behind it how many seeds have a value, where they are less than `seeds`, and how
    many of the results are failures."""
    good = [r for r in results if "error" not in r]
    some = [v for r in good if (v := value(r)) is not None]
    numbers: dict[str, float | None] = {"mean": None, "sd": None, "n": len(some)}
    remarks = [f"{len(some)} of {seeds}"] if 0 < len(some) < seeds else []
    if failed := len(results) - len(good):
        remarks.append(f"{failed} failed")
        numbers["failed"] = failed
    text = NONE if good or not failed else ""
    if some:
        numbers["mean"] = float(np.mean(some))
        text = _short(numbers["mean"])
    if len(some) > 1:
        numbers["sd"] = float(np.std(some, ddof=1))
        text += f" ± {_short(numbers['sd'])}"
    elif some:
        only = next(r for r in good if value(r) is not None)
        interval = only.get("interval")
        if interval and value(only) == only["macro"]["auroc"]:
            numbers |= {"low": interval[0], "high": interval[1]}
            text += f" ({_short(interval[0])}–{_short(interval[1])})"
    if not text:
        return Figure("failed", **numbers)
    return Figure(text + (f" ({', '.join(remarks)})" if remarks else ""), **numbers)


def seeds_of(suite: Suite, result: Result) -> int:
    """How many seeds the suite has of a row."""
    sweep = suite.sweeps.get(result["group"])
    return len((sweep and sweep.seeds) or suite.arms[result["arm"]].seeds or suite.seeds)


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


def _number(value: float | None, form: str) -> Figure:
    return Figure(NONE if value is None else format(value, form), **{"": value})


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _main(suite: Suite, results: Sequence[Result]) -> Table:
    privacies = list(by(results, "privacy"))
    rows = []
    for (row, arrangement), some in by(results, "row", "arrangement").items():
        line = {"row": str(row), "patients": str(arrangement)}
        for (privacy,) in privacies:
            cells = [r for r in some if r["privacy"] == privacy]
            line[privacy_name(privacy)] = spread(cells, macro("auroc"), seeds_of(suite, some[0]))
        rows.append(line)
    seeds = len(by(results, "seed"))
    return Table(
        "main",
        "Macro AUROC",
        f"Held-out patients, exact; {seeds} split{'s' if seeds > 1 else ''} (seeds), mean ± "
        "standard deviation over them, of splits and noise; with one, a 95 % bootstrap interval. "
        "'2 of 3': the others have no figure yet, or failed.",
        rows,
    )


def _measures(suite: Suite, results: Sequence[Result]) -> Table:
    rows = []
    for (row, privacy, arrangement), some in by(results, "row", "privacy", "arrangement").items():
        line = {"row": str(row), "privacy": privacy_name(privacy), "patients": str(arrangement)}
        line |= {NAMES[m]: spread(some, macro(m), seeds_of(suite, some[0])) for m in MEASURES}
        rows.append(line)
    return Table(
        "measures",
        "All measures, macro",
        "Threshold at logit 0, where classes balance by public prevalence. Precision and recall of "
        "the positive class; a task counts where its measure exists.",
        rows,
    )


def _tasks(suite: Suite, results: Sequence[Result], name: str, title: str) -> Table:
    columns = by(results, "row", "privacy", "arrangement")
    tasks = list(dict.fromkeys(task for r in results for task in r["tasks"]))
    arrangements = {r["arrangement"] for r in results}
    privacies = {str(r["privacy"]) for r in results}
    rows = []
    for task in tasks if len(tasks) > 1 else []:
        line = {"task": task}
        for (row, privacy, arrangement), some in columns.items():
            head = str(row)
            head += f", {privacy_name(privacy)}" if len(privacies) > 1 else ""
            head += f", {arrangement}" if len(arrangements) > 1 else ""
            line[head] = spread(
                some,
                lambda r, t=task: r["tasks"].get(t, {}).get(name),  # type: ignore[misc]
                seeds_of(suite, some[0]),
            )
        rows.append(line)
    return Table(f"tasks-{name}", title, "As in the main table.", rows)


def _differences(suite: Suite, results: Sequence[Result]) -> Table:
    rows, note = [], "Seed by seed on the same held-out patients."
    kinds = by(results, "privacy", "arrangement") if suite.reference else {}
    for (privacy, arrangement), some in kinds.items():
        found = by(
            [r for r in results if (r["row"], r["privacy"]) == (suite.reference, privacy)],
            "arrangement",
        )
        if not found:
            continue
        place = (arrangement,) if (arrangement,) in found else next(iter(found))
        other = {r["seed"]: r for r in found[place]}
        if place != (arrangement,):
            note += f" {privacy_name(privacy).capitalize()}: {suite.reference} was not run "
            note += f"{arrangement}, its {place[0]} run stands for it."
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
                    "row": str(row),
                    "privacy": privacy_name(privacy),
                    "patients": str(arrangement),
                    "difference": _number(float(np.mean(gaps)), "+.3f"),
                    "standard error": _number(error if len(gaps) > 1 else None, ".3f"),
                    "seeds": _number(len(gaps), "d"),
                }
            )
    title = f"Macro AUROC less that of {suite.reference}"
    return Table("differences", title, note, rows)


def _grouped(suite: Suite, results: Sequence[Result], group: str, title: str, what: str) -> Table:
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
            line = {"row": str(arm), what: _told(value), "privacy": privacy_name(privacy)}
            of = seeds_of(suite, cells[0])
            line |= {"patients": str(arrangement), "macro AUROC": spread(cells, macro("auroc"), of)}
            rows.append(line)
        if whole and group in ("ablation", "single"):
            line = {"row": str(arm), what: "all sources", "privacy": privacy_name(privacy)}
            of = seeds_of(suite, whole[0])
            line |= {"patients": str(arrangement), "macro AUROC": spread(whole, macro("auroc"), of)}
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
        line = {"row": str(arm), "privacy": privacy_name(privacy), "patients": str(arrangement)}
        top, each = float(means[best]), float(np.mean(per_task))
        line |= {"best source": str(best), "macro AUROC": Figure(_short(top), **{"": top})}
        rows.append(line | {"best source of each task": Figure(_short(each), **{"": each})})
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
                "row": str(row),
                "privacy": privacy_name(privacy),
                "patients": str(arrangement),
                "trained parameters": _number(parameters or None, ",d"),
                "seconds per epoch": _number(float(np.median(epochs)) if epochs else None, ".1f"),
                "seconds in all": _number(float(np.median([r["seconds"] for r in some])), ".0f"),
                "peak memory, MB": _number(max(r["peak_memory_bytes"] for r in some) / 1e6, ".0f"),
            }
        )
    note = (
        "An epoch is as many draws as all hospitals have training patients, one hospital after the "
        "other on one thread; medians over seeds. Peak memory is the whole process's."
    )
    return Table("costs", "Costs", note, rows)

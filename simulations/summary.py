"""A report for people to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from server.report import Report

_FEW_PATIENTS = 200
_OTHERS = ("AUPRC", "precision", "recall", "support")


def show(report: Report, out: Path, console: Console) -> None:
    """Metrics per task, ε per hospital and population, sizes, encoders, and where it lies."""
    tasks = _table("federation, validation patients", "task", "AUROC", "95 %", *_OTHERS)
    for name, task in report.tasks.items():
        interval = task.interval.get("auroc")
        tasks.add_row(
            name,
            _metric(task.auroc),
            f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else "–",
            *(_metric(value) for value in (task.auprc, task.precision, task.recall)),
            f"{task.support:.0f}",
        )
    console.print(tasks)
    if any(t.auroc is None for t in report.tasks.values()):
        console.print("–: the noise, or too few patients, leave nothing to say", style="dim")
    if report.simulation_exact:
        exact = _table(
            "exact, in this simulation; no hospital releases it", "task", "AUROC", *_OTHERS
        )
        for name, values in report.simulation_exact.tasks.items():
            exact.add_row(
                name,
                *(_metric(getattr(values, m)) for m in ("auroc", "auprc", "precision", "recall")),
                str(values.support),
            )
        console.print(exact)
    sites = _table("privacy, per patient", "hospital", "ε train", "ε validation", "δ", "steps")
    for site in report.sites:
        spent = site.epsilon_by_population
        sites.add_row(
            site.name,
            _epsilon(spent.get("train")),
            _epsilon(spent.get("validation")),
            f"{site.delta:g}" if report.privacy.mode != "none" else "–",
            str(site.steps),
        )
    console.print(sites)
    for site in report.sites:
        if site.refused:
            console.print(f"{site.name} did not take part to the end: {site.refused}")
    macro = report.macro.auroc
    lines = {
        "macro AUROC": f"{macro:.3f}" if macro is not None else "–",
        "rounds": f"{report.rounds}",
        "bytes per round and hospital": f"{report.bytes_up_per_round:,} up",
        "trainable parameters": f"{report.trainable_parameters:,}",
        "encoders": "".join(f"\n  {k}: {_name(v)}" for k, v in report.encoders.items()),
        "language model": str(report.slm.get("name")),
        "seconds": f"{report.seconds.encode:.1f} preparing, {report.seconds.train:.1f} training, "
        f"{report.seconds.total:.1f} in all",
        "adapter": str(out / "adapter"),
        "report": str(out / "report.json"),
    }
    for name, value in lines.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if (declared := sum(site.patients_declared for site in report.sites)) < _FEW_PATIENTS:
        console.print(
            f"{declared} training patients declared in all: this shows that the path works; the "
            "figures mean nothing",
            style="bold",
            soft_wrap=True,
        )
    if report.privacy.mode == "none":
        console.print("without differential privacy: the adapter may reveal patients", style="bold")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index and name else "left", no_wrap=True)
    return table


def _metric(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _name(description: Any) -> str:
    if isinstance(description, dict):
        return str(description.get("encoder") or description.get("name") or description)
    return str(description)

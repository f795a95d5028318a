"""A report for people to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from server.report import Report


def show(report: Report, out: Path, console: Console) -> None:
    """Metrics per task, ε per hospital and population, sizes, encoders, and where it lies."""
    exact = report.simulation_exact
    tasks = Table(title="federation, validation patients", box=SIMPLE, title_justify="left")
    names = ["task", "AUROC", "95 %", "AUPRC", "precision", "recall", "support"]
    for name in [*names, *(["exact AUROC", "exact AUPRC"] if exact else [])]:
        tasks.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for name, task in report.tasks.items():
        interval = task.interval.get("auroc")
        row = [
            name,
            _metric(task.auroc),
            f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else "–",
            *(_metric(value) for value in (task.auprc, task.precision, task.recall)),
            f"{task.support:.0f}",
        ]
        if exact:
            row += [_metric(exact.tasks[name].auroc), _metric(exact.tasks[name].auprc)]
        tasks.add_row(*row)
    console.print(tasks)
    if any(t.auroc is None for t in report.tasks.values()):
        console.print("–: the noise, or too few patients, leave nothing to say", style="dim")
    if exact:
        console.print(
            "exact values are shown because this is a simulation; no hospital releases them",
            style="dim",
        )
    sites = Table(title="privacy, per patient", box=SIMPLE, title_justify="left")
    for name in ("hospital", "ε train", "ε validation", "δ", "steps", ""):
        sites.add_column(name, justify="left" if name in ("hospital", "") else "right")
    for site in report.sites:
        spent = site.epsilon_by_population
        sites.add_row(
            site.name, _epsilon(spent.get("train")), _epsilon(spent.get("validation")),
            f"{site.delta:g}" if report.privacy.mode != "none" else "–", str(site.steps),
            f"did not take part: {site.refused}" if site.refused else "",
        )
    console.print(sites)
    macro = report.macro.auroc
    lines = {
        "macro AUROC": f"{macro:.3f}" if macro is not None else "–",
        "rounds": f"{report.rounds}",
        "bytes per round and hospital": f"{report.bytes_up_per_round:,} up",
        "trainable parameters": f"{report.trainable_parameters:,}",
        "encoders": "; ".join(f"{k}: {_name(v)}" for k, v in report.encoders.items()),
        "language model": str(report.slm.get("name")),
        "seconds": f"{report.seconds.encode:.1f} preparing, {report.seconds.train:.1f} training, "
        f"{report.seconds.total:.1f} in all",
        "adapter": str(out / "adapter"),
        "report": str(out / "report.json"),
    }
    for name, value in lines.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if report.privacy.mode == "none":
        console.print("without differential privacy: the adapter may reveal patients", style="bold")


def _metric(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _name(description: Any) -> str:
    if isinstance(description, dict):
        return str(description.get("encoder") or description.get("name") or description)
    return str(description)

"""`fedward audit attack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from simulations.attack.audit import AttackReport
    from simulations.attack.checks import Finding


def attack(
    canaries: Annotated[
        int, typer.Option(min=100, help="Planted patients; fewer than 2000 see less.")
    ] = 2000,
    epsilon: Annotated[float, typer.Option(help="What the attacked training claims.")] = 2.0,
    plant: Annotated[
        str | None, typer.Option(help="Plant this bug: show that the audit can fail.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this check; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of synthetic patients and coins.")] = 0,
) -> None:
    """Attacks the training engine, on synthetic patients, and says whether its claim survives.

    Exit code 0: consistent with the claim. 1: refuted. It can refute a claim, never prove one.
    """
    import torch

    from simulations.attack.audit import attack as run

    torch.set_num_threads(1)  # kernels here are small
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show_progress(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        report = run(
            canaries=canaries,
            epsilon=epsilon,
            seed=seed,
            bug=plant,
            only=only or (),
            on_progress=show_progress,
        )
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(report.model_dump_json(indent=2) + "\n")
    show(report, console)
    if report.verdict == "refuted":
        raise typer.Exit(1)


def show(report: AttackReport, console: Console) -> None:
    """The findings as a table, and the verdict as a sentence."""
    engine = "as shipped" if report.engine == "shipped" else f"with {report.engine} planted"
    table = Table(
        box=SIMPLE,
        title=f"Training engine {engine}, claiming ε = {report.claimed_epsilon:.2f} "
        f"at δ = {report.delta:g}",
    )
    table.add_column("check", no_wrap=True)
    for name in ("", "what was seen", "limit, or p"):
        table.add_column(name)
    for finding in report.findings:
        passed = "[green]passed[/]" if finding.passed else "[red bold]REFUTED[/]"
        table.add_row(finding.check, passed, finding.detail, _limit(finding))
    console.print(table)
    if report.verdict == "refuted":
        console.print(
            f"[red bold]Refuted[/] by {', '.join(report.refuted_by)}: "
            "this engine does not keep what it claims."
        )
    else:
        console.print(
            f"[green]Consistent[/]: nothing seen here contradicts ε ≤ "
            f"{report.claimed_epsilon:.2f}. That is no proof: see docs/attack.md."
        )


def _limit(finding: Finding) -> str:
    if finding.p_value is not None:
        return f"p = {finding.p_value:.2g}"
    return f"≤ {finding.threshold:.6g}"

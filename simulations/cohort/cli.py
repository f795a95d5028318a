"""`fedward cohort`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


def cohort(
    dest: Annotated[Path, typer.Argument(help="Folder to write to, one tree per hospital.")],
    hospitals: Annotated[int, typer.Option(min=1, max=100, help="How many hospitals.")] = 4,
    patients: Annotated[int, typer.Option(min=1, max=20_000, help="Of each hospital.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 0,
) -> None:
    """Writes made-up hospitals in MIMIC-IV's layout: tables, notes and X-ray phantoms.

    No real person is in them. What is there already is kept.
    """
    from simulations.cohort.write import write_cohort

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks = {}

        def show(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            bar.update(tasks[name], completed=share)

        trees = write_cohort(dest, hospitals, patients=patients, seed=seed, progress=show)
    console.print("Import them with")
    for name, tree in trees.items():
        parts = ["fedward", "import", "mimic-iv", tree, f"shards/{name}", "--name", name]
        parts += ["--notes", tree / "note"] if (tree / "note").is_dir() else []
        parts += ["--cxr", tree / "cxr"]
        command = shlex.join(str(part) for part in parts)
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)

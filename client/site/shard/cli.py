"""`fedward shard`: look at a hospital's folder before anything else does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from client.site.shard.shard import Shard, discover, inspect
from common.errors import ShardError

app = typer.Typer(no_args_is_help=True, help="Shards: the folders that hospitals bring.")


@app.callback()
def _group() -> None:
    """Shards: the folders that hospitals bring."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A shard, or a folder of shards.")],
    images: Annotated[bool, typer.Option(help="Also decode every image file.")] = True,
) -> None:
    """Checks shards against the contract and shows what is in them.

    Exits with 1 and the list of problems if there is any; each names file, row and cure.
    """
    console = Console()
    sizes: list[dict[str, str]] = []
    labels: list[dict[str, str]] = []
    problems: list[ShardError] = []
    hospitals: dict[str, Path] = {}
    try:
        shards = discover(folder)
    except ShardError as error:
        shards, problems = [], [error]
    for path in shards:
        shard, found = inspect(path, images=images)
        if shard is not None and (other := hospitals.setdefault(shard.hospital, path)) != path:
            found.append(
                ShardError(
                    f"{path / 'shard.toml'}: hospital '{shard.hospital}' is also {other}",
                    cure="give every shard its own hospital",
                )
            )
        problems += found
        sizes.append(_sizes(path, shard, found))
        labels.append(_labels(path, shard))
    if shards:
        console.print(_table("shards", sizes))
        console.print(_table("labels: true / known", labels))
    for problem in problems:
        console.print(
            f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True
        )
    if problems:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A shard, or a folder of shards.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page to write; for several shards a folder of pages named for them.",
            show_default="report.html in each shard",
        ),
    ] = None,
) -> None:
    """Writes a data report per shard: one HTML page to read before training.

    Labels, missing inputs, ranges and units, images, notes, and hints that an input tells the
    label. The page holds exact figures: it stays in the hospital.
    """
    # Drawing takes a second to load, which the other commands need not wait for.
    from client.site.shard.report import write_report

    console = Console()
    shards = discover(folder)
    several = shards != [folder] or (out is not None and out.is_dir())
    failed = False
    for path in shards:
        target = path / "report.html"
        if out is not None:
            target = out / f"{path.resolve().name}.html" if several else out
        try:
            write_report(Shard.open(path), target)
        except ShardError as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            failed = True
        else:
            console.print(str(target), markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    """One row per shard; a column that no shard fills is left out."""
    names = dict.fromkeys(name for row in rows for name, cell in row.items() if cell)
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        words = name in ("hospital", "contract")
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table


def _sizes(path: Path, shard: Shard | None, problems: list[ShardError]) -> dict[str, str]:
    verdict = f"[red]{len(problems)} broken[/]" if problems else "[green]kept[/]"
    if shard is None:
        return {"hospital": path.name, "contract": verdict}
    events = shard.events
    return {
        "hospital": shard.hospital,
        "records": f"{shard.records.height:,}",
        "patients": f"{shard.n_patients:,}",
        "stays": f"{shard.records['stay_id'].n_unique():,}",
        "events": _count(events),
        "series": "" if events is None else f"{events['series'].n_unique():,}",
        "images": _count(shard.images),
        "notes": _count(shard.notes),
        "embeddings": _count(shard.embeddings),
        "contract": verdict,
    }


def _labels(path: Path, shard: Shard | None) -> dict[str, str]:
    if shard is None:
        return {"hospital": path.name}
    cells = {"hospital": shard.hospital}
    for task in shard.tasks:
        label = shard.records[f"y_{task}"]
        cells[task] = f"{label.sum() or 0:,}/{label.len() - label.null_count():,}"
    return cells


def _count(frame: pl.DataFrame | None) -> str:
    return "" if frame is None else f"{frame.height:,}"

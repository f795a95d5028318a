"""`fedward import`: what a hospital has, as shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from client.site.shard.importers.tally import Tally

app = typer.Typer(no_args_is_help=True, help="Import a hospital's data into shards.")

Dest = Annotated[Path, typer.Argument(help="The shard to make; with --sites a folder of shards.")]
Sites = Annotated[
    str | None,
    typer.Option(help="Split into hospitals: care-unit (of a patient's first stay) or hash:N."),
]
Name = Annotated[str, typer.Option(help="The hospital's name in studies, where it is one.")]
Hour = Annotated[
    float | None,
    typer.Option(min=0.1, help="A record at this hour of each stay, whatever else there is."),
]
CompleteOnly = Annotated[
    bool, typer.Option("--complete-only", help="Only records that see something of every kind.")
]
EarlyDischarges = Annotated[
    bool,
    typer.Option(
        "--exclude-early-discharges",
        help="48 h mortality is unknown for those discharged alive before (HAIM).",
    ),
]
OptOut = Annotated[
    Path | None,
    typer.Option(help="File of patients who object, one id a line: they are never imported."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier import made at DEST.")
]


@app.callback()
def _group() -> None:
    """Import a hospital's data into shards."""


@app.command("mimic-iv")
def mimic_iv(
    src: Annotated[Path, typer.Argument(help="MIMIC-IV: the folder with hosp and icu.")],
    dest: Dest,
    notes: Annotated[Path | None, typer.Option(help="Folder of MIMIC-IV-Note.")] = None,
    cxr: Annotated[Path | None, typer.Option(help="Folder of MIMIC-CXR-JPG.")] = None,
    sites: Sites = None,
    name: Name = "mimic-iv",
    hour: Hour = None,
    complete_only: CompleteOnly = False,
    exclude_early_discharges: EarlyDischarges = False,
    opt_out: OptOut = None,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Copy image files; without, they are linked to.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Imports MIMIC-IV v2.2 or v3.1, with notes and X-rays where they are given.

    Records are the X-rays' times, or without --cxr hour 48 of each stay.
    """
    from client.site.shard.importers.mimic import META, MimicSource, import_mimic_iv
    from client.site.shard.importers.staging import Options
    from client.site.shard.importers.timeline import parse_sites, read_opt_out

    with _progress() as progress:
        shards, tally = import_mimic_iv(
            MimicSource(src, notes, cxr, hour, exclude_early_discharges),
            dest,
            Options(name, parse_sites(sites), complete_only, copy_images, META),
            objectors=read_opt_out(opt_out),
            overwrite=overwrite,
            progress=progress,
        )
    _show(shards, tally)


@app.command("meds")
def meds(
    src: Annotated[
        Path, typer.Argument(help="A MEDS data set: the folder with data and metadata.")
    ],
    dest: Dest,
    map_: Annotated[
        str,
        typer.Option("--map", help="What its codes mean: a TOML file, or the ready mimic-iv-meds."),
    ],
    sites: Sites = None,
    name: Name = "meds",
    hour: Hour = None,
    complete_only: CompleteOnly = False,
    exclude_early_discharges: EarlyDischarges = False,
    opt_out: OptOut = None,
    overwrite: Overwrite = False,
) -> None:
    """Imports a data set of the Medical Event Data Standard.

    Records are what the map says, or hour 48 of each stay.
    """
    from client.site.shard.importers.meds import MedsSource, import_meds
    from client.site.shard.importers.meds_map import MedsMap
    from client.site.shard.importers.staging import Options
    from client.site.shard.importers.timeline import parse_sites, read_opt_out

    with _progress() as progress:
        shards, tally = import_meds(
            MedsSource(src, MedsMap.load(map_), hour, exclude_early_discharges),
            dest,
            Options(name, parse_sites(sites), complete_only),
            objectors=read_opt_out(opt_out),
            overwrite=overwrite,
            progress=progress,
        )
    _show(shards, tally)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per table, with the time that is left; on standard error."""
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _show(shards: list[Path], tally: Tally) -> None:
    console = Console()
    table = Table(
        title="rows of the source", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("table", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("left out, and why; kept otherwise than it stands")
    for name, counts in tally.tables.items():
        reasons = [f"{rows:,} {escape(reason)}" for reason, rows in counts.skipped.most_common()]
        reasons += [f"[dim]{rows:,} {escape(what)}[/]" for what, rows in counts.noted.most_common()]
        table.add_row(name, f"{counts.rows:,}", f"{counts.kept:,}", "\n".join(reasons))
    console.print(table)
    for remark in tally.remarks:
        console.print(f"remark: {remark}", markup=False, highlight=False, soft_wrap=True)
    for shard in shards:
        console.print(f"shard: {shard}", markup=False, highlight=False, soft_wrap=True)
    place = shards[0] if len(shards) == 1 else shards[0].parent
    console.print(f"next: fedward shard report {place}", markup=False, highlight=False)

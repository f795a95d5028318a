"""`fedward compare`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.errors import FedwardError, StudyError


def compare(
    suite: Annotated[str, typer.Argument(help="Suite file, or a ready suite's name.")],
    shards: Annotated[Path | None, typer.Option(help="Folder of shards, one per hospital.")] = None,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="So many synthetic hospitals instead.")
    ] = None,
    patients: Annotated[int, typer.Option(min=8, help="Of each synthetic hospital.")] = 500,
    study: Annotated[
        str | None, typer.Option(help="Study file or ready study in place of the suite's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results [default: in runs/compare].")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this arm; repeatable.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Only the first N seeds.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at the same time [default: half the cores].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells; run nothing.")
    ] = False,
) -> None:
    """Trains a matrix of systems, privacies and arrangements on the same patients, and writes one
    table of all. Cells that are there already are kept: the same command goes on."""
    from common.study import Study
    from simulations.comparison.data import alone
    from simulations.comparison.inside import check_maps
    from simulations.comparison.run import plan, report, results, run, wanted
    from simulations.comparison.suite import Suite
    from simulations.run import find_shards

    console = Console(stderr=True)
    chosen = Suite.load(suite)
    if (shards is None) == (synthetic is None):
        raise StudyError("give either --shards DIR or --synthetic N")
    if study is not None:
        chosen = chosen.model_copy(update={"study": study})
    if seeds is not None:
        chosen = chosen.model_copy(update={"seeds": chosen.seeds[:seeds]})
    for name in only or ():
        if name not in chosen.arms:
            raise StudyError(
                f"suite {chosen.name} has no arm '{name}'", cure=f"use {', '.join(chosen.arms)}"
            )
    name = chosen.name if study is None else f"{chosen.name}-{Path(study).stem}"
    folder = (out or Path("runs") / "compare" / name).expanduser().absolute()
    with alone(folder):
        if synthetic is not None:
            from simulations.cohort.shards import synthetic_hospitals

            with console.status("making synthetic hospitals"):
                found = synthetic_hospitals(
                    folder / f"cohort-{synthetic}-{patients}", synthetic, patients=patients, seed=0
                )
        else:
            assert shards is not None
            found = find_shards(shards)
        console.print("checking studies and shards", highlight=False)
        planned, cohort = plan(chosen, Study.load(chosen.study), found, folder)
        check_maps(chosen.maps, planned)
        made = wanted(planned, only or ())
        if dry_run:
            for each in made:
                typer.echo(each.cell.id)
            typer.echo(f"{len(made)} cells")
            return
        try:
            run(made, cohort, jobs or max(1, (os.cpu_count() or 1) // 2), console)
        except KeyboardInterrupt:
            console.print("interrupted; finished cells are kept, the same command goes on")
            raise
        finally:
            written = report(chosen, planned, cohort, folder, "fedward " + " ".join(sys.argv[1:]))
        show = Console()
        for table in written[:1]:
            shown = Table(title=table.title, box=SIMPLE, caption=table.note, title_justify="left")
            for column in table.rows[0]:
                shown.add_column(column)
            for row in table.rows:
                shown.add_row(*row.values())
            show.print(shown)
        show.print(f"all tables and plots: {folder / 'summary.md'}", highlight=False)
        if failed := sum("error" in result for result in results(made)):
            raise FedwardError(
                f"{failed} cells failed; their reasons stand in cells/*/cell.json",
                cure="mend that, and run the same command again",
            )

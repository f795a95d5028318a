"""`fedward simulate` and `fedward plan`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import StudyError


def simulate(
    study: Annotated[str, typer.Option(help="Study file, or a ready study's name.")] = "demo",
    shards: Annotated[Path | None, typer.Option(help="Folder of shards, one per hospital.")] = None,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="So many synthetic hospitals instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results [default: runs/<study>-<time>].")
    ] = None,
    hospitals: Annotated[int | None, typer.Option(help="Only so many of the hospitals.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the study's.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy target instead of the study's.")
    ] = None,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="A baseline without differential privacy.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of initialisation and cohort.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Start from this published adapter (OUT of its run).")
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(
            help="Keep the hospitals' ledgers, vaults and keys here [default: OUT/sites]."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in OUT, ledgers included.")
    ] = False,
) -> None:
    """Runs a study over virtual hospitals on this machine, and shows what came of it."""
    from common.study import Study
    from simulations.run import clear, free
    from simulations.run import simulate as run
    from simulations.summary import show

    if (shards is None) == (synthetic is None):
        raise StudyError("give either --shards DIR or --synthetic N")
    if no_privacy and epsilon is not None:
        raise StudyError("--epsilon and --no-privacy exclude each other")
    chosen = Study.load(study)
    if resume and out is None:
        raise StudyError("--resume needs --out, the folder of the run")
    if resume and overwrite:
        raise StudyError("--resume and --overwrite exclude each other")
    folder = out or Path("runs") / f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if overwrite:
        clear(folder)
    free(folder, resume=resume)
    hospitals_at: Path | Mapping[str, Path] = shards or Path()
    if synthetic is not None:
        from simulations.cohort.shards import synthetic_hospitals

        if not resume:
            shutil.rmtree(folder / "cohort", ignore_errors=True)  # of a run that failed
        with Console(stderr=True).status("making synthetic hospitals") as status:
            hospitals_at = synthetic_hospitals(
                folder / "cohort",
                synthetic,
                seed=seed or 0,
                progress=lambda name, share: status.update(f"making {name}: {share:.0%}"),
            )
        names = list(chosen.federation.sites)
        if names and synthetic != len(names):  # the demo's roster follows --synthetic
            raw = chosen.model_dump(mode="json")
            raw["federation"]["sites"] = {}
            chosen = Study.model_validate(raw)
    report = run(
        chosen,
        hospitals_at,
        folder,
        hospitals=hospitals,
        rounds=rounds,
        epsilon=epsilon,
        private=not no_privacy,
        seed=seed,
        start=start,
        sites=sites,
        resume=resume,
    )
    show(report, folder.absolute(), Console())


def serve(
    home: Annotated[Path, typer.Option(help="Folder of cohort, keys and state.")],
) -> None:
    """Serves the synthetic hospitals of the ready study `demo`, until idle."""
    from client.site.daemon.service import serve as run
    from simulations.daemon import local

    run(local(home.absolute()))


def plan(
    study: Annotated[str, typer.Argument(help="Study file, or a ready study's name.")],
    sites: Annotated[
        str | None, typer.Option(help="name=patients,… for a study without roster.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Instead of the study's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the study's.")] = None,
) -> None:
    """Says what STUDY will cost, before any data is touched: noise, ε, bytes, memory, time.

    STUDY is a file, or the name of a ready study.
    """
    from common.study import Study
    from simulations.plan import parse_sites, show_plan

    show_plan(
        Study.load(study), Console(), sites=parse_sites(sites), epsilon=epsilon, rounds=rounds
    )

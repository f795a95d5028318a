"""Simulations from Python: a study over folders of shards, through the real path."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from client.site.daemon.state import LEDGER
from client.site.evaluation.exact import pooled_exact
from client.site.shard.shard import META, discover
from common.errors import FedwardError, StudyError
from common.identity import Identity
from common.privacy.book import Book
from common.study import Study, resolve, unknown
from server.publish import add_ledgers, attribute
from server.report import Report, attach_exact, attach_ledgers, read
from server.start import started
from simulations.daemon import daemon_command, daemon_config
from simulations.display import Display
from simulations.launcher import Run, launch
from simulations.preflight import check, place
from simulations.stories import stories, told


def simulate(
    study: Study | str | Path,
    shards: Path | str | Mapping[str, Path],
    out: Path | str,
    *,
    hospitals: int | None = None,
    rounds: int | None = None,
    epsilon: float | None = None,
    private: bool = True,
    seed: int | None = None,
    start: Path | str | None = None,
    sites: Path | str | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Report:
    """Runs a study over virtual hospitals on this machine, through `flwr run`.

    Daemon, relays, coordinator, noise and ledgers are those of a deployment. All processes that
    are started have ended when this returns, by whatever path.

    Args:
        study: A `Study`, a TOML file, or the name of a ready study.
        shards: A folder of shards (or one shard), or the folder of each site by name. Sites that
            the study's roster names are taken from it; a study without roster takes all.
        out: Receives `study.toml`, `report.json`, `adapter/`, `events/`, `rounds.jsonl`, `logs/`
            and each virtual hospital's state under `sites/`.
        hospitals: Take only so many, the first by name.
        rounds, epsilon, seed: Overrides; they make another study with another hash.
        private: False runs without differential privacy (mode `none`).
        start: Folder of the published adapter to start from; fills in the study's `[start]`.
        sites: Folder that keeps the virtual hospitals' state (ledgers, vaults, keys) beyond this
            run, so that several studies are charged in the same ledgers; `out/sites` by default.
        resume: Go on with the run whose checkpoint lies in `out`.
        console: Where progress is shown; standard error by default.

    Returns:
        The report, with `simulation_exact` (which no real hospital would release) filled in; with
        `sites`, `simulation_ledgers` too.

    Raises:
        FedwardError: The study, the shards or the run; the text names the cure.
    """
    began = time.monotonic()
    console = console or Console(stderr=True)
    chosen = place(study if isinstance(study, Study) else Study.load(study))
    found = dict(shards) if isinstance(shards, Mapping) else find_shards(Path(shards))
    roster = _roster(chosen, found, hospitals)
    begun = None if start is None else Path(start).expanduser().absolute()
    chosen, _ = started(chosen, begun)
    settled = resolve(
        chosen,
        sites=dict.fromkeys(roster),
        rounds=rounds,
        epsilon=epsilon,
        private=private,
        seed=seed,
    )
    folder = Path(out).expanduser().absolute()
    free(folder, resume=resume)
    console.print("checking study and shards", highlight=False)
    origins = check(settled, roster)
    folder.mkdir(parents=True, exist_ok=True)
    if sites is not None:
        share_state(folder, Path(sites))
    key = folder / "coordinator.key"
    public = Identity.open(key).public

    def daemon(socket: Path) -> list[str]:
        config = folder / "daemon.toml"
        config.write_text(daemon_config(roster, folder / "sites", socket, public).to_toml())
        return daemon_command(config)

    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        with Display(console, settled.federation.rounds) as display:
            launch(Run(settled, folder, run_id, resume, key, daemon, begun), display)
    except KeyboardInterrupt:
        again = (
            "--resume goes on" if (folder / "checkpoint").exists() else "nothing was trained yet"
        )
        console.print(f"interrupted; all that was started has ended; {again}", highlight=False)
        raise
    report = attach_exact(folder, pooled_exact({n: folder / "sites" / n for n in roster}))
    if sites is not None:
        report = compose(folder, roster)
    attribute(folder, origins)
    if why := {n: s for n, s in stories(folder).items() if n in _refused(report)}:
        console.print(f"hospitals that did not take part to the end:{told(why)}", markup=False)
    console.print(f"completed in {time.monotonic() - began:.0f} s", highlight=False)
    return report


def share_state(folder: Path, sites: Path) -> None:
    """Lets the virtual hospitals of the run in `folder` live in `sites`, as earlier runs left them.

    Raises:
        FedwardError: The run has their state already, somewhere else; or `sites` lies within the
            run, and would be gone with it.
    """
    sites = sites.expanduser().absolute()
    if sites != folder / "sites" and sites.resolve().is_relative_to(folder.resolve()):
        raise FedwardError(
            f"{sites} lies in the folder of this run, and --overwrite would delete it with the run",
            cure="keep the hospitals' state in a folder of its own, outside --out",
        )
    sites.mkdir(parents=True, exist_ok=True)
    link = folder / "sites"
    if not link.exists():
        link.unlink(missing_ok=True)  # to a folder that is gone
        link.symlink_to(sites, target_is_directory=True)
    if link.resolve() != sites.resolve():
        raise FedwardError(
            f"the hospitals of the run in {folder} keep their state in {link.resolve()}",
            cure="leave --sites out or name that folder; or choose another --out",
        )


def compose(folder: Path, sites: Iterable[str]) -> Report:
    """Adds to report and card of the run what each hospital's ledger, of all its studies, costs."""
    delta = read(folder).privacy.delta
    books = {name: Book.read(folder / "sites" / name / LEDGER) for name in sites}
    report = attach_ledgers(folder, {name: book.epsilon(delta) for name, book in books.items()})
    add_ledgers(folder, report)
    return report


def free(folder: Path, *, resume: bool = False) -> None:
    """Makes sure that a run may write into `folder`.

    Raises:
        FedwardError: An earlier run lies there, and `resume` does not ask for it; or the reverse.
    """
    there = (folder / "checkpoint").exists()
    if there and not resume:
        raise FedwardError(
            f"{folder} holds an earlier run",
            cure="--resume goes on with it, --overwrite replaces it; or choose another --out",
        )
    if resume and not there:
        raise FedwardError(
            f"{folder} holds no run to resume", cure="leave --resume out, or mend --out"
        )
    if folder.exists() and not folder.is_dir():
        raise FedwardError(f"{folder} is a file", cure="choose another --out")


def clear(folder: Path) -> None:
    """Removes an earlier run.

    Raises:
        FedwardError: The folder holds something, but no run.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "daemon.toml").exists():
        raise FedwardError(
            f"{folder} is not empty, and no run of Fedward", cure="choose another --out"
        )
    shutil.rmtree(folder)


def find_shards(folder: Path) -> dict[str, Path]:
    """The shards of a folder by the name of their hospital.

    Raises:
        FedwardError: There is none, or two have the same name.
    """
    import tomllib

    found: dict[str, Path] = {}
    for path in discover(folder):
        try:
            name = str(tomllib.loads((path / META).read_text()).get("hospital", path.name))
        except (OSError, ValueError) as error:
            raise FedwardError(f"{path / META} cannot be read: {error}") from None
        if name in found:
            raise FedwardError(
                f"{path} and {found[name]} are both hospital '{name}'",
                cure=f"give each its own 'hospital' in {META}",
            )
        found[name] = path
    return found


def _refused(report: Report) -> set[str]:
    return {site.name for site in report.sites if site.refused}


def _roster(study: Study, found: Mapping[str, Path], hospitals: int | None) -> dict[str, Path]:
    """The sites that take part, by name, with their shards."""
    named = list(study.federation.sites)
    for name in named:
        if name not in found:
            raise unknown(
                "site in the study's roster", name, found, cure="add its shard, or take it out"
            )
    names = named or sorted(found)
    if hospitals is None:
        return {name: found[name] for name in names}
    if not 1 <= hospitals <= len(names):
        raise StudyError(
            f"{hospitals} hospitals asked for, but there are {len(names)}: {', '.join(names)}",
            cure="ask for fewer, or add shards",
        )
    return {name: found[name] for name in names[:hospitals]}

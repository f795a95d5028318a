"""`fedward coordinator`: make a federation, enrol hospitals, serve, run studies."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.errors import FedwardError
from deploy.coordinator import enrol as enrolment
from deploy.coordinator import front
from deploy.coordinator.layout import Config, CoordinatorError, CoordinatorFolder
from deploy.enrolment import EnrolmentRequest, fingerprint

app = typer.Typer(no_args_is_help=True, help="A federation's coordinator: hospitals and studies.")
say = Console(highlight=False, soft_wrap=True, markup=False).print  # texts hold brackets

_FOLLOW_SECONDS = 1.0

Folder = Annotated[
    Path, typer.Option("--folder", "-C", envvar="FEDWARD_COORDINATOR", help="Coordinator's folder.")
]
Site = Annotated[str, typer.Argument(help="Name of the site.")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of the run; `status` lists them.")
]
Out = Annotated[Path | None, typer.Option("--out", help="File to write.")]
HERE = Path()


@app.callback()
def _group() -> None:
    """A federation's coordinator: hospitals and studies."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    host: Annotated[
        list[str], typer.Option(help="Public name or address; repeat for more. Invites carry it.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Public TLS port.")] = 8443,
    name: Annotated[str, typer.Option(help="Of the federation.")] = "federation",
    listen: Annotated[str, typer.Option(help="Address to take connections on.")] = "0.0.0.0",
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="SuperLink's port, on the loopback only.")
    ] = 9443,
) -> None:
    """Makes a coordinator: certificate authority, server certificate, keys, configuration."""
    config = Config.of(
        {
            "name": name,
            "hosts": host,
            "port": port,
            "listen": listen,
            "superlink_port": superlink_port,
        }
    )
    made = enrolment.init(folder, config)
    say(f"made {made.root}")
    say(f"  server certificate  {', '.join(config.names)}; renew within 13 months (`renew`)")
    say(f"  front               {made.nginx / 'nginx.conf'}, port {port}")
    say(f"back up, offline and encrypted: {' '.join(made.kept)}")
    say("key of this coordinator, to be read over the telephone:")
    say(f"  {fingerprint(made.identity().public)}", style="bold")


@app.command()
def invite(
    site: Site,
    out: Out = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="Until it expires.")] = 14,
    folder: Folder = HERE,
) -> None:
    """Writes the file by which a hospital joins; an earlier one for it is void."""
    path = out or Path(f"{site}.invite.json")
    made = enrolment.invite(CoordinatorFolder.at(folder), site, path, days=days)
    say(f"wrote {path}, good until {made.expires:%Y-%m-%d}; it holds no secret, e-mail will do")
    say(f"read to the hospital over the telephone: {fingerprint(made.coordinator)}")


@app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="The hospital's enrolment request.")],
    out: Out = None,
    yes: Annotated[bool, typer.Option("--yes", help="The fingerprint was compared.")] = False,
    folder: Folder = HERE,
) -> None:
    """Admits a hospital: checks its request, certifies its key, writes its admission."""
    at = CoordinatorFolder.at(folder)
    asked = EnrolmentRequest.read(request)
    register = enrolment.Register.read(at)
    enrolment.examine(register, asked)
    there = register.sites.get(asked.site)
    say(f"site {asked.site}; fingerprint of its key: {fingerprint(asked.identity)}")
    if there is not None and there.request != asked:
        say("it is enrolled with other keys, which this replaces; its old certificate is revoked")
    if not yes:
        typer.confirm("Did the hospital read you the same over the telephone?", abort=True)
    path = out or Path(f"{asked.site}.admission.json")
    enrolled = enrolment.enrol(at, asked, path)
    say(f"wrote {path}; certificate until {enrolled.facts.not_after:%Y-%m-%d}")
    _apply(at)


@app.command()
def revoke(site: Site, folder: Folder = HERE) -> None:
    """Ends a hospital's admission at once; a new invite lets it back in."""
    at = CoordinatorFolder.at(folder)
    enrolment.revoke(at, site)
    say(f"revoked {site}; studies that name it cannot be submitted, and the roster has changed")
    _apply(at)


@app.command()
def renew(
    site: Annotated[
        str | None, typer.Argument(help="Of this site; without, of the coordinator's server.")
    ] = None,
    out: Out = None,
    host: Annotated[list[str] | None, typer.Option(help="Server: other public names.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Server: a new key too.")] = False,
    folder: Folder = HERE,
) -> None:
    """Issues a new certificate, for the same key, before the old one expires."""
    at = CoordinatorFolder.at(folder)
    if site is None:
        facts = enrolment.renew_server(at, hosts=host or (), new_key=new_key)
        say(f"server certificate for {', '.join(facts.names)} until {facts.not_after:%Y-%m-%d}")
        say("the SuperLink takes it when `serve` starts next")
    elif host or new_key:
        raise CoordinatorError(
            "--host and --new-key are the server's", cure="a site with new keys needs a new invite"
        )
    else:
        path = out or Path(f"{site}.admission.json")
        enrolled = enrolment.renew_site(at, site, path)
        say(f"wrote {path}; certificate until {enrolled.facts.not_after:%Y-%m-%d}")
    _apply(at)


@app.command()
def roster(
    signed: Annotated[
        list[Path] | None, typer.Argument(help="Rosters that hospitals signed and sent back.")
    ] = None,
    folder: Folder = HERE,
) -> None:
    """Writes the roster of the enrolled hospitals, merges signatures, shows who has not signed."""
    at = CoordinatorFolder.at(folder)
    made = enrolment.roster(at, signed or ())
    missing = made.unsigned()
    table = Table(title=f"roster of {made.name}", title_justify="left", box=SIMPLE)
    for column in ("site", "fingerprint", "signed"):
        table.add_column(column)
    for name, key in made.sites.items():
        table.add_row(name, fingerprint(key), "no" if name in missing else "yes")
    say(table)
    say(f"wrote {at.roster}")
    say(f"not signed by {', '.join(missing)}" if missing else "signed by all: send it to each")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(envvar="FEDWARD_COORDINATOR")] = HERE,
    nginx: Annotated[
        bool | None,
        typer.Option("--nginx/--no-nginx", help="Run the front too [default: if installed]."),
    ] = None,
) -> None:
    """Runs SuperLink, ServerApps and the front in the foreground, until SIGTERM or Ctrl-C."""
    from deploy.coordinator.serve import Coordinator, stopped_by_signals

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    at = CoordinatorFolder.at(folder)
    program = None if nginx is False else front.binary()
    if nginx and program is None:
        raise CoordinatorError("nginx is not installed", cure="install it, or use --no-nginx")
    config = at.config()

    def ready() -> None:
        if program is None:
            say(f"serving on the loopback only; run: nginx -p {at.nginx} -c nginx.conf")
        else:
            say(f"serving on port {config.port}; logs in {at.logs}")

    coordinator = Coordinator(at, program)
    with stopped_by_signals(coordinator.stop):
        coordinator.run(ready)


@app.command()
def settle(
    study: Annotated[str, typer.Argument(help="Study file, or a ready study's name.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder [default: the study's name].")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Published adapter that the study starts from.")
    ] = None,
    folder: Folder = HERE,
) -> None:
    """Pins the hospitals' keys in a study, settles its noise and signs it, for their approval."""
    from common.study import Study
    from deploy.coordinator import runs

    to = out or Path(Study.load(study).name)
    settled = runs.settle(CoordinatorFolder.at(folder), study, to, start=start)
    say(f"wrote {to / 'study.toml'} and study.sig; hash {settled.hash}")
    say(f"when the hospitals have approved it: fedward coordinator submit {to / 'study.toml'}")


@app.command()
def submit(
    study: Annotated[str, typer.Argument(help="Study file, or a ready study's name.")],
    run_id: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Published adapter that the study starts from.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show rounds until it ends.")] = False,
    folder: Folder = HERE,
) -> None:
    """Signs a study with the hospitals' keys pinned in it, and runs it."""
    from deploy.coordinator import runs

    at = CoordinatorFolder.at(folder)
    run = runs.submit(at, study, run=run_id, start=start)
    say(f"submitted run {run}")
    _follow(at, run) if follow else say("`status` shows how it stands")


@app.command()
def resume(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", help="Show rounds until it ends.")] = False,
    folder: Folder = HERE,
) -> None:
    """Goes on with a run that failed, was stopped, or whose processes were killed."""
    from deploy.coordinator import runs

    at = CoordinatorFolder.at(folder)
    done = len(runs.lines(at, run))
    say("waiting, up to 90 s, for Flower to miss a ServerApp that was killed")
    runs.resume(at, run)
    say(f"resumed run {run}")
    if follow:
        _follow(at, run, shown=done)


@app.command()
def stop(run: RunName, folder: Folder = HERE) -> None:
    """Ends a run; what hospitals were charged stays charged."""
    from deploy.coordinator import runs

    runs.stop(CoordinatorFolder.at(folder), run)
    say(f"stopped run {run}; `resume {run}` goes on with it")


@app.command()
def status(folder: Folder = HERE) -> None:
    """Shows hospitals and runs."""
    from deploy.coordinator import runs
    from deploy.coordinator.superlink import SuperLink

    at = CoordinatorFolder.at(folder)
    register = enrolment.Register.read(at)
    online: set[bytes] | None = None
    if at.served:
        with SuperLink.connected(at) as superlink:
            online = {node.public_key for node in superlink.nodes() if node.online}
    say("serving" if at.served else "not serving: run `fedward coordinator serve`")
    keys = register.node_keys()
    hospitals = Table(title="hospitals", title_justify="left", box=SIMPLE)
    for column in ("site", "connected", "certificate until"):
        hospitals.add_column(column)
    for name, site in sorted(register.sites.items()):
        connected = "unknown" if online is None else "yes" if keys[name] in online else "no"
        hospitals.add_row(name, connected, _until(site.facts.not_after))
    for name, opened in sorted(register.invites.items()):
        if name not in register.sites:
            hospitals.add_row(name, "invited", f"invite until {_until(opened.expires)}")
    say(hospitals)
    table = Table(title="runs", title_justify="left", box=SIMPLE)
    for column in ("run", "study", "state", "rounds", "last", "detail"):
        table.add_column(column)
    for o in runs.outcomes(at):
        table.add_row(o.run, o.study, o.state, f"{o.completed}/{o.rounds}", o.phase, o.detail)
    say(table)


@app.command()
def pull(
    run: RunName,
    dest: Annotated[Path, typer.Argument(help="New folder for the results.")],
    partial: Annotated[bool, typer.Option("--partial", help="Also of an unfinished run.")] = False,
    folder: Folder = HERE,
) -> None:
    """Copies adapter, model card, report and study of a run, with their hashes."""
    from deploy.coordinator import runs

    files = runs.pull(CoordinatorFolder.at(folder), run, dest, partial=partial)
    say(f"copied {len(files)} files to {dest}; check them with `sha256sum -c {runs.CHECKSUMS}`")


def _apply(folder: CoordinatorFolder) -> None:
    """Tells what runs here of a change, and the person what else must be told."""
    from deploy.coordinator.superlink import SuperLink

    try:
        if front.reload(folder):
            say("the front has reloaded")
        else:
            say(f"where a front runs elsewhere on {folder.nginx}, reload it")
    finally:  # a front that fails leaves the SuperLink as a second lock
        if folder.served:
            # One at a time, too: an older list would let in again whom a later one has revoked.
            with folder.changing(), SuperLink.connected(folder) as superlink:
                superlink.reconcile(enrolment.Register.read(folder).node_keys())
            say("the SuperLink knows")


def _follow(folder: CoordinatorFolder, run: str, *, shown: int = 0) -> None:
    """Shows rounds as they are done.

    Raises:
        FedwardError: The run ended without completing.
    """
    from deploy.coordinator import runs
    from simulations.display import Display

    display = Display(Console(highlight=False), runs.outcome(folder, run).rounds)
    while True:
        stands = runs.outcome(folder, run)
        lines = runs.lines(folder, run)
        shown = min(shown, len(lines))  # a resumed run drops lines without checkpoint
        for line in lines[shown:]:
            display.line(line)
        shown = len(lines)
        if stands.state == "completed":
            say(f"completed; `pull {run} DEST` takes the results")
            return
        if stands.state not in ("waiting", "running"):
            raise FedwardError(
                f"run '{run}': {stands.state}" + (f" ({stands.detail})" if stands.detail else ""),
                cure=f"`resume {run}` goes on with it",
            )
        time.sleep(_FOLLOW_SECONDS)


def _until(date: datetime) -> str:
    left = (date - datetime.now(UTC)).days
    return f"{date:%Y-%m-%d}" + (f" ({left} days)" if left < 60 else "")

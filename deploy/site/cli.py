"""`fedward site`: setting a hospital's side up, looking after it, moving it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import FedwardError
from common.roster import Roster

Folder = Annotated[Path, typer.Argument(help="The site's folder.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DaemonUser = Annotated[
    str | None, typer.Option(help="Who runs the daemon and owns the state (as root).")
]
RelayUser = Annotated[
    str | None, typer.Option(help="Who runs the relay and owns its folder (as root).")
]
SocketGroup = Annotated[
    str | None, typer.Option(help="Group whose members reach the daemon's socket.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the passphrase [default: ask].")
]

_MARKS = {
    "pass": ("pass", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
    "skip": ("skip", "dim"),
}


class RosterAction(StrEnum):
    """What to do with a roster."""

    show = "show"
    sign = "sign"


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    invite: Annotated[Path, typer.Option(help="The coordinator's invite.")],
    shard: Annotated[
        Path | None, typer.Option(help="Folder of the hospital's data; not with --rejoin.")
    ] = None,
    rejoin: Annotated[
        bool,
        typer.Option("--rejoin", help="FOLDER is a site: give its relay new keys, keep the rest."),
    ] = False,
    proxy: Annotated[
        str | None, typer.Option(help="http://host:port [default: HTTPS_PROXY, if it is set].")
    ] = None,
    daemon_user: DaemonUser = None,
    relay_user: RelayUser = None,
    socket_group: SocketGroup = None,
) -> None:
    """Makes a site: keys, policy template, configuration, enrolment request."""
    from deploy.enrolment import Invite, fingerprint
    from deploy.site import setup

    console = _console()
    if rejoin:
        request = setup.rejoin(folder, invite)
        console.print(f"the relay of site '{request.site}' has new keys\n")
    elif shard is None:
        raise typer.BadParameter("give the hospital's data with --shard")
    else:
        owners = setup.Owners.named(daemon=daemon_user, relay=relay_user, group=socket_group)
        request = setup.init(folder, invite, shard, proxy=proxy, owners=owners)
        console.print(f"site '{request.site}' made in {folder}\n")
    console.print("Compare by telephone, on a number that you did not get with the invite:")
    console.print(f"  the coordinator's key  {fingerprint(Invite.read(invite).coordinator)}")
    console.print(f"  this site's key        {fingerprint(request.identity)}\n")
    console.print(
        f"1. If they agree, send {folder}/request.json to the coordinator (no secret in it).\n"
        f"2. Complete {folder}/policy.toml: lifetime caps and approvers (docs/policy.md).\n"
        f"3. With the coordinator's answer: fedward site accept {folder} ADMISSION\n"
        f"4. fedward site doctor {folder}"
    )


def accept(
    folder: Folder,
    admission: Annotated[Path, typer.Argument(help="The coordinator's answer.")],
) -> None:
    """Takes in the certificate that the coordinator issued, the first one or a renewed one."""
    from deploy.site import setup

    facts = setup.accept(folder, admission)
    _console().print(
        f"certificate {facts.serial} is in place, good until {facts.not_after:%Y-%m-%d}; a relay "
        "that runs takes it by itself"
    )


def roster(
    action: Annotated[RosterAction, typer.Argument(help="What to do.")],
    file: Annotated[Path, typer.Argument(help="The roster, as the coordinator sent it.")],
    folder: Annotated[Path | None, typer.Option(help="The site's folder; needed to sign.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Signed roster [default: beside FILE].")
    ] = None,
    yes: Yes = False,
) -> None:
    """Shows the roster of hospitals, or signs it after their fingerprints were compared."""
    from deploy.enrolment import EnrolmentRequest
    from deploy.site import setup
    from deploy.site.layout import SiteFolder

    if action is RosterAction.sign and folder is None:
        raise typer.BadParameter("give the site's folder with --folder")
    view = setup.RosterView.open(file, SiteFolder(folder) if folder else None)
    console = _console()
    _show_roster(console, view.roster)
    for line in view.changed:
        console.print(f"changed against the roster in force: {line}", style="bold yellow")
    if action is RosterAction.show or folder is None:
        return
    question = "Did you compare every fingerprint with its hospital, by telephone?"
    if not yes and not typer.confirm(question):
        console.print("nothing was signed")
        raise typer.Exit(1)
    site = EnrolmentRequest.read(SiteFolder(folder).request).site
    target = out or file.with_name(f"{file.stem}-{site}.json")
    signed = setup.sign_roster(folder, view.roster, target)
    console.print(f"signed; send {target} to the coordinator")
    if waiting := signed.unsigned():
        console.print(f"not in force yet: {', '.join(waiting)} must sign; then sign once more")
    else:
        console.print(
            f"all have signed: {setup.roster_path(SiteFolder(folder))} is in force from the "
            "daemon's next start"
        )


def _show_roster(console: Console, shown: Roster) -> None:
    from deploy.enrolment import fingerprint

    table = Table(title=f"roster '{shown.name}'", title_justify="left", box=SIMPLE)
    for name in ("site", "fingerprint", "signed"):
        table.add_column(name, no_wrap=True)
    unsigned = shown.unsigned()
    for site, key in sorted(shown.sites.items()):
        table.add_row(site, fingerprint(key), "no" if site in unsigned else "yes")
    console.print(table)


def doctor(
    folder: Folder,
    study: Annotated[
        str | None, typer.Option(help="A study's file or ready name: does its SLM fit?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Checks everything that a site needs; says the cure where something fails.

    Exit code 0: nothing fails; 1: something does. The output may name tables and columns of the
    shard: it is for the people of this hospital.
    """
    from common.study import Study
    from deploy.site.doctor.checks import examine

    found = examine(folder, Study.load(study) if study else None)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        table = Table(box=SIMPLE, show_header=False, padding=(0, 1, 0, 0))
        for finding in found:
            mark, style = _MARKS[finding.verdict]
            cure = f"\ncure: {finding.cure}" if finding.cure else ""
            # As text: what a hospital names may look like Rich's markup.
            table.add_row(Text(mark, style), finding.check, Text(f"{finding.text}{cure}"))
        _console().print(table)
    raise typer.Exit(1 if any(f.verdict == "fail" for f in found) else 0)


def join(
    relay: Annotated[Path, typer.Argument(help="The relay's folder: FOLDER/relay.")],
) -> None:
    """Runs the relay: the only process of a site that speaks to the outside."""
    from deploy.site.join import run

    run(relay)


def pause(
    folder: Folder,
    reason: Annotated[str, typer.Option(help="For the people here; stays here.")] = "",
) -> None:
    """Pauses the site: the daemon declines whatever would be charged, from now on."""
    from deploy.site import setup

    setup.pause(folder, reason)
    _console().print("paused; `fedward site unpause` goes on")


def unpause(folder: Folder) -> None:
    """Ends a pause."""
    from deploy.site import setup

    _console().print("goes on" if setup.unpause(folder) else "was not paused")


def backup(
    folder: Folder,
    destination: Annotated[Path, typer.Argument(help="Archive to write; must not exist.")],
    passphrase_file: PassphraseFile = None,
    with_vault: Annotated[
        bool, typer.Option("--with-vault", help="Also the embeddings (docs/backup.md).")
    ] = False,
) -> None:
    """Writes one encrypted archive: ledger, keys, policy, configuration. The daemon may run."""
    from deploy.site.backup import backup as write

    passphrase = _passphrase(passphrase_file, confirm=True)
    written = write(folder, destination, passphrase, with_vault=with_vault)
    console = _console()
    console.print(f"{destination}: {len(written.files)} files, read back and compared")
    console.print("Without the passphrase nobody can open it: keep it elsewhere, on paper.")


def restore(
    archive: Annotated[Path, typer.Argument(help="What `backup` wrote.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    passphrase_file: PassphraseFile = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Move a folder that is there aside.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Put back only this file, where it is missing. Repeatable."),
    ] = None,
    daemon_user: DaemonUser = None,
    relay_user: RelayUser = None,
    socket_group: SocketGroup = None,
) -> None:
    """Makes a site's folder from an archive, after all of it was checked."""
    from deploy.site.restore import restore as put_back
    from deploy.site.restore import restore_missing
    from deploy.site.setup import Owners

    passphrase, console = _passphrase(passphrase_file), _console()
    if only:
        restore_missing(archive, folder, passphrase, tuple(only))
        console.print(f"put back: {', '.join(only)}")
        return
    owners = None
    if daemon_user or relay_user or socket_group:
        owners = Owners.named(daemon=daemon_user, relay=relay_user, group=socket_group)
    done = put_back(archive, folder, passphrase, replace=replace, owners=owners)
    console.print(f"{folder} is as it was on {done.contents.header.made:%Y-%m-%d %H:%M} UTC")
    if done.aside:
        console.print(f"what was there lies in {done.aside}; it must never run again")
    if done.lacking:
        console.print(
            f"The ledger lacks line {done.lacking.lines}, which a receipt names: look for a newer "
            "copy; if there is none, `fedward site reconcile` (docs/backup.md).",
            style="bold red",
        )
    console.print(
        "Before the daemon is started:\n"
        f"1. fedward audit verify {folder}/state --receipts FILE, with every receipt of the "
        "coordinators\n"
        "2. if it says ledger-cut: docs/backup.md, `fedward site reconcile`\n"
        "3. erase again who was erased after the backup\n"
        "4. make sure that no other machine runs this site\n"
        f"Then start it and, last, `fedward site unpause {folder}`: until then it charges nothing."
    )


def upgrade(folder: Folder, yes: Yes = False) -> None:
    """After a new version was installed: checks that it reads this site, and lets the relay run its
    code."""
    from importlib.metadata import version

    from deploy.site.upgrade import plan_upgrade
    from deploy.site.upgrade import upgrade as carry_out

    change, console = plan_upgrade(folder), _console()
    console.print(f"version {version('fedward')} reads configuration, policy and ledger")
    if change.before == change.after:
        console.print("the relay's code is the same: nothing to do")
        return
    console.print(f"code of the relay  {change.before}\n               ->  {change.after}")
    console.print("The coordinator must run the same version: ask for its hash.", style="yellow")
    if not yes and not typer.confirm("Let the relay run the new code?"):
        console.print("nothing was changed")
        raise typer.Exit(1)
    carry_out(folder, change)
    console.print("done; restart daemon and relay")


def _passphrase(file: Path | None, *, confirm: bool = False) -> str:
    if file is None:
        asked: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm)
        return asked
    if file.stat().st_mode & 0o077 and os.name == "posix":
        raise FedwardError(f"{file} can be read by others", cure=f"chmod 600 {file}")
    try:
        return file.read_text().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError:
        raise FedwardError(f"{file} is no text", cure="write the passphrase in UTF-8") from None


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)

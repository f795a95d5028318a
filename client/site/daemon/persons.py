"""Commands of `fedward site` by which persons decide: review, approve, revoke, erase, and the care
of ledger and keys. They may run beside the daemon: ledger and vault are shared under locks."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from client.site.daemon.config import DaemonConfig, SiteConfig
from client.site.daemon.state import LEDGER, open_identity
from common.errors import FedwardError, PrivacyError
from common.files import sync_folder
from common.identity import Identity
from common.privacy.decisions import decide
from common.privacy.fields import is_hash
from common.privacy.ledger import Ledger
from common.privacy.receipts import read_receipts
from common.study import Study, resolve, unknown

if TYPE_CHECKING:  # torch
    from client.site.daemon.hospital import Hospital

Config = Annotated[
    Path,
    typer.Option("--config", envvar="FEDWARD_SITE_CONFIG", help="The daemon's configuration."),
]
SiteName = Annotated[
    str | None, typer.Option("--site", help="Which hosted site [default: the only one].")
]
Approver = Annotated[str, typer.Option("--as", help="Your name in the policy's approvers.")]
Key = Annotated[Path, typer.Option("--key", help="File of your private key.")]
StudyFile = Annotated[str, typer.Argument(help="Study file, as the coordinator sent it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `fedward site`."""
    app.command("review")(review)
    app.command("approve")(approve)
    app.command("revoke")(revoke)
    app.command("erase")(erase)
    app.command("receipt")(receipt)
    app.command("reconcile")(reconcile)
    app.command("rotate-key")(rotate_key)
    app.command("approver-key")(approver_key)


def review(
    study: StudyFile,
    config: Config = Path("site.toml"),
    site: SiteName = None,
    runs: Annotated[int, typer.Option(min=1, help="How often it shall be let run.")] = 1,
) -> None:
    """Says what a study would do, what would leave the hospital, and what it costs."""
    from client.site.daemon.review import review as judge
    from client.site.daemon.review_text import show

    hospital = _hospital(config, site)
    reviewed = judge(hospital, _resolved(study), runs)
    show(Console(), hospital.name, hospital.policy, reviewed)
    raise typer.Exit(0 if reviewed.approvable else 1)


def approve(
    study: StudyFile,
    name: Approver,
    key: Key,
    config: Config = Path("site.toml"),
    site: SiteName = None,
    runs: Annotated[int, typer.Option(min=1, help="How often it may run.")] = 1,
    days: Annotated[
        int | None, typer.Option(min=1, help="Until it expires [default: the policy's].")
    ] = None,
    yes: Yes = False,
) -> None:
    """Shows the review, asks, and signs the approval into the ledger."""
    from client.site.daemon.review import approve as sign_in
    from client.site.daemon.review import review as judge
    from client.site.daemon.review_text import show

    hospital = _hospital(config, site)
    person = _person(hospital.policy.approvers, name, key)
    reviewed = judge(hospital, _resolved(study), runs)
    console = Console()
    show(console, hospital.name, hospital.policy, reviewed)
    if not reviewed.approvable:
        raise typer.Exit(1)
    most = hospital.policy.approval_days
    if days is not None and days > most:
        raise FedwardError(
            f"{days} days are more than the policy's approval_days = {most}",
            cure="approve for fewer days, or change the policy",
        )
    until = datetime.now(UTC) + timedelta(days=days or most)
    expires = until.isoformat(timespec="milliseconds")
    if not yes and not typer.confirm(f"Approve until {until:%Y-%m-%d}?"):
        console.print("nothing was approved")
        raise typer.Exit(1)
    decision = decide(
        person,
        name,
        "approve",
        hospital.ledger.book.ledger_id,
        reviewed.study.hash,
        reserve=reviewed.reserve,
        expires=expires,
    )
    sign_in(hospital, reviewed, decision, expires)
    console.print(
        f"approved by {name} until {until:%Y-%m-%d}; ledger head {hospital.ledger.book.head}",
        highlight=False,
        soft_wrap=True,
    )


def revoke(
    study: Annotated[str, typer.Argument(help="Study file, or its hash.")],
    name: Approver,
    key: Key,
    config: Config = Path("site.toml"),
    site: SiteName = None,
) -> None:
    """Ends a study here. Under an `rdp` cap, what it did not release is free again."""
    chosen = _site(config, site)
    study_hash = study if is_hash(study) else _resolved(study).hash
    person = _person(chosen.policy.approvers, name, key)
    ledger = _ledger(chosen)
    decision = decide(person, name, "revoke", ledger.book.ledger_id, study_hash)
    ledger.revoke(study_hash, decision)
    Console().print(f"revoked; ledger head {ledger.book.head}", highlight=False, soft_wrap=True)


def erase(
    patient: Annotated[str, typer.Argument(help="patient_id, as in the shard.")],
    config: Config = Path("site.toml"),
    site: SiteName = None,
    yes: Yes = False,
) -> None:
    """Erases a patient: embeddings and key are destroyed, a re-import is read without them."""
    hospital = _hospital(config, site)
    if not yes and not typer.confirm("Erase this patient's embeddings? It cannot be undone."):
        raise typer.Exit(1)
    count = hospital.erase(patient)
    Console().print(
        f"{count} embeddings destroyed; the ledger keeps a keyed hash. The shard itself is the "
        "hospital's: import it again with the patient on the list of those who object. What was "
        "released before stays covered by its ε and δ.",
        highlight=False,
    )


def receipt(
    holder: Annotated[str, typer.Argument(help="Who will keep it.")],
    config: Config = Path("site.toml"),
    site: SiteName = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File [default: print].")] = None,
) -> None:
    """Gives someone outside a receipt: no earlier line of the ledger can then be cut unseen."""
    given = _ledger(_site(config, site)).give_receipt(holder).model_dump_json()
    if out is None:
        print(given)
    else:
        out.write_text(given + "\n")


def reconcile(
    config: Config = Path("site.toml"),
    site: SiteName = None,
    receipts: Annotated[
        list[Path] | None, typer.Option("--receipt", help="Receipts to hold the ledger against.")
    ] = None,
    studies: Annotated[
        list[str] | None,
        typer.Option(
            "--study", help="Each lost approval, in its order: STUDY, or STUDY:RUNS for more runs."
        ),
    ] = None,
) -> None:
    """Goes on after lines were lost (a restored backup): all that they may have released counts as
    spent, and every study needs a new approval."""
    ledger = _ledger(_site(config, site))
    for given in read_receipts(receipts or []):
        ledger.compare(given)
    line = ledger.reconcile([_with_runs(study) for study in studies or []])
    Console().print(
        f"reconciled with line {line.receipt.lines}; all that the lost lines may have released "
        "counts as spent. Every study needs a new approval; restart the daemon.",
        highlight=False,
    )


def rotate_key(config: Config = Path("site.toml"), site: SiteName = None) -> None:
    """Gives the site a new key; restart the daemon, and tell the coordinators."""
    chosen = _site(config, site)
    current, fresh_path = chosen.state / "site.key", chosen.state / "site.key.next"
    fresh = Identity.open(fresh_path)
    try:
        _ledger(chosen).rotate(fresh)
    except PrivacyError:  # a rotation that was cut short has the new key in the ledger already
        Ledger.open(chosen.state / LEDGER, chosen.name, fresh)
    os.replace(fresh_path, current)
    sync_folder(chosen.state)
    Console().print(f"the site's key is now {fresh.public}", highlight=False, soft_wrap=True)


def approver_key(
    file: Annotated[Path, typer.Argument(help="File of the private key; made on first use.")],
) -> None:
    """Prints an approver's public key, for the policy; keep the file where only you can read it."""
    print(Identity.open(file).public)


def _site(config: Path, name: str | None) -> SiteConfig:
    sites = {site.name: site for site in DaemonConfig.load(config).sites}
    if name is None and len(sites) > 1:
        raise FedwardError(
            f"{config} hosts {', '.join(sorted(sites))}", cure="choose one with --site"
        )
    chosen = sites.get(name) if name else next(iter(sites.values()))
    if chosen is None:
        raise unknown("site", str(name), sites)
    return chosen


def _ledger(site: SiteConfig) -> Ledger:
    path = site.state / LEDGER
    if not path.exists():
        raise FedwardError(
            f"no ledger in {site.state}", cure="start the daemon once: it begins one"
        )
    ledger = Ledger.open(path, site.name, open_identity(site.state, site.name))
    ledger.settle_policy(site.policy)
    return ledger


def _hospital(config: Path, name: str | None) -> Hospital:
    from client.site.daemon.bench import Bench
    from client.site.daemon.hospital import Hospital

    chosen, whole = _site(config, name), DaemonConfig.load(config)
    return Hospital(chosen, Bench(whole.device, whole.threads), simulated=whole.simulated)


def _person(approvers: dict[str, str], name: str, key: Path) -> Identity:
    if name not in approvers:
        raise FedwardError(
            f"the policy does not name '{name}' among its approvers",
            cure="add the name with the public key of `fedward site approver-key FILE`",
        )
    if not key.exists():
        raise FedwardError(f"no key at {key}", cure="`fedward site approver-key FILE` makes one")
    person = Identity.open(key)
    if approvers[name] != person.public:
        raise FedwardError(
            f"{key} is not the key that the policy gives for '{name}'",
            cure="use the right file, or mend the policy",
        )
    return person


def _resolved(study: str) -> Study:
    loaded = Study.load(study)
    return loaded if loaded.resolved else resolve(loaded)


def _with_runs(text: str) -> tuple[Study, int]:
    name, colon, runs = text.rpartition(":")
    if colon and runs.isdigit() and int(runs):
        return _resolved(name), int(runs)
    return _resolved(text), 1

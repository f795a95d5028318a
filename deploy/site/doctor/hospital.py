"""Checks of the hospital's own things: rules, shard, vault, ledger, roster, daemon."""

from __future__ import annotations

import json
import os
import pwd
import stat

import grpc

from client.site.daemon.config import DaemonConfig
from client.site.daemon.state import LEDGER
from client.site.encoders.vault import DATABASE, KEY_FILE, Vault
from common.privacy.book import Book
from common.privacy.policy import Policy
from common.roster import Roster
from deploy.site.doctor.visit import CheckFailed, CheckWarning, Visit, insist_readable
from deploy.site.evidence import receipts_of
from deploy.site.setup import (
    SOCKET_BYTES,
    insist_usual,
    invite_path,
    roster_path,
    site_identity,
)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def configuration(visit: Visit) -> str:
    insist_readable(visit.folder.config_file)
    insist_readable(visit.folder.policy_file)
    visit.config = DaemonConfig.load(visit.folder.config_file)
    names = [site.name for site in visit.config.sites]
    if visit.site not in names:
        raise CheckFailed(
            f"site.toml hosts {', '.join(names)}, but the site was enrolled as {visit.site}",
            cure="the name in [[sites]] is the one of the invite",
        )
    insist_usual(visit.folder)
    return f"site '{visit.site}'"


def policy(visit: Visit) -> str:
    insist_readable(visit.folder.policy_file)
    policy = Policy.load(visit.folder.policy_file)
    if policy.lifetime is None:
        raise CheckFailed("the policy has no lifetime caps", cure="see docs/policy.md")
    if visit.invite.coordinator not in policy.coordinators:
        raise CheckFailed(
            "the policy does not hear the coordinator of the invite",
            cure=f'add "{visit.invite.coordinator}" to `coordinators`',
        )
    if not policy.approvers:
        raise CheckWarning(
            "nobody may approve a study: nothing is allowed",
            cure="name the officer's key under [approvers]; decide the lifetime caps before",
        )
    return f"approvers: {', '.join(sorted(policy.approvers))}"


def permissions(visit: Visit) -> str:
    folder = visit.folder
    secrets = [
        folder.state,
        *folder.state.glob("*.key"),
        folder.state / "vault" / KEY_FILE,
        folder.relay.root,
        folder.relay.key,
        folder.relay.node_key,
    ]
    for path in secrets:
        if path.exists() and path.stat().st_mode & _OTHERS:
            mode = "700" if path.is_dir() else "600"
            raise CheckFailed(
                f"{path} is open to other users (mode {stat.S_IMODE(path.stat().st_mode):o})",
                cure=f"chmod {mode} {path}",
            )
    relay, state = folder.relay.root.stat().st_uid, folder.state.stat().st_uid
    rules = (folder.config_file, folder.policy_file, roster_path(folder), invite_path(folder))
    for path in (folder.root, *(path for path in rules if path.exists())):
        there = path.stat()
        if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or there.st_uid not in (0, state):
            raise CheckFailed(
                f"{path} may be changed by other users: they could write their own policy",
                cure=f"chown --reference={folder.state} {path}; chmod go-w {path}",
            )
    for path in (*folder.state.iterdir(), *(folder.state / "vault").glob("*")):
        if path.stat().st_uid != state:  # left by a command that root ran
            raise CheckFailed(
                f"{path} belongs to another user than {folder.state}: the daemon cannot write it",
                cure=f"chown -R --reference={folder.state} {folder.state}; and run the commands "
                "that persons give as the daemon's user",
            )
    if relay in (0, state):
        raise CheckWarning(
            "the relay runs as "
            + ("the daemon's user" if relay == state else "root")
            + ": a relay that is taken over could read the state",
            cure="give it a user of its own: --relay-user of `fedward site init`, or chown",
        )
    return "the relay's user cannot read the state; keys are their owners' alone"


def shard(visit: Visit) -> str:
    from client.site.shard.shard import Shard

    assert visit.config is not None
    site = next(site for site in visit.config.sites if site.name == visit.site)
    if not os.access(site.shard, os.R_OK | os.X_OK) and site.shard.exists():
        raise PermissionError(13, "Permission denied", str(site.shard))
    shard = Shard.open(site.shard)
    said = f"{site.shard} keeps the contract; tasks {', '.join(shard.tasks)}"
    relay, state = visit.folder.relay.root.stat().st_uid, visit.folder.state.stat().st_uid
    if relay != state and site.shard.stat().st_mode & stat.S_IXOTH:
        raise CheckWarning(
            f"{said}; every user of this machine may enter it, the relay's too",
            cure=f"chmod o= {site.shard}; its group, the daemon's alone",
        )
    return said


def vault(visit: Visit) -> str:
    vault = visit.folder.state / "vault"
    key = vault / KEY_FILE
    if not (vault / DATABASE).exists():
        return "not made yet; the first study makes it"
    if not key.exists():
        raise CheckFailed(
            f"the vault's key {key} is lost",
            cure="restore it, or remove the vault's folder: the embeddings are encoded again",
        )
    if os.geteuid() != vault.stat().st_uid:  # SQLite would leave files that the daemon cannot open
        return "the key is there; only its owner can try it"
    Vault.open(vault).close()
    return "the key opens the vault"


def ledger(visit: Visit) -> str:
    state = visit.folder.state
    path, identity = state / LEDGER, site_identity(visit.folder)
    if not path.exists():
        if any((state / name).exists() for name in ("population.key", "ledger.head")):
            raise CheckFailed(
                f"{path} is gone: what was released can no longer be counted",
                cure="restore the newest copy; see docs/backup.md",
            )
        return "not begun yet; the daemon begins it"
    book = Book.read(path)
    if book.site != visit.site or book.public_key != identity.public:
        raise CheckFailed(
            f"{path} is of site '{book.site}' and another key than site.key",
            cure="restore site.key and ledger.jsonl of the same backup",
        )
    missing = [r.lines for r in receipts_of(state) if not book.holds(r)]
    if missing:
        raise CheckFailed(
            f"the ledger lacks line {max(missing)}, which a receipt names",
            cure="restore the newest ledger.jsonl, or `fedward site reconcile`; see docs/backup.md",
        )
    return f"{len(book.lines)} lines, chain and signatures hold"


def roster(visit: Visit) -> str:
    path = roster_path(visit.folder)
    if not path.exists():
        raise CheckWarning(
            "no roster yet: the coordinator alone says who takes part",
            cure="`fedward site roster sign` the one that the coordinator sends",
        )
    roster = Roster.load(path)
    if unsigned := roster.unsigned():
        raise CheckFailed(
            f"{path} is not signed by {', '.join(unsigned)}",
            cure="ask the coordinator for the roster that all have signed",
        )
    if roster.sites.get(visit.site) != site_identity(visit.folder).public:
        raise CheckFailed(
            f"{path} does not list this site with its key", cure="ask for a new roster and sign it"
        )
    kept = {site.name: site.roster for site in visit.config.sites} if visit.config else {}
    if visit.config and kept.get(visit.site) is None:
        raise CheckWarning(
            f"{path} is whole, but site.toml does not name it",
            cure='add `roster = "roster.json"` below [[sites]], and restart the daemon',
        )
    return f"'{roster.name}', {len(roster.sites)} sites, signed by all"


def daemon(visit: Visit) -> str:
    assert visit.config is not None
    path = visit.config.socket
    if len(os.fsencode(path)) > SOCKET_BYTES:
        raise CheckFailed(
            f"{path} is longer than {SOCKET_BYTES} bytes", cure="move the site's folder"
        )
    if not path.exists():
        raise CheckWarning(
            "no daemon listens", cure=f"fedward site serve {visit.folder.config_file}"
        )
    there = path.stat()
    if there.st_mode & stat.S_IRWXO:
        raise CheckFailed(f"{path} is open to every user", cure="restart the daemon")
    _insist_reachable(visit, there)
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            answer = channel.unary_unary("/fedward.Site/Status")(b"", timeout=visit.timeout)
        except grpc.RpcError as error:
            raise CheckFailed(
                f"no daemon answers on {path} ({error.code().name})",
                cure="restart it; its log says why it ended",
            ) from None
    phases = {site["site"]: site["phase"] for site in json.loads(answer)}
    return f"the daemon answers: {phases.get(visit.site, 'another site')}"


def _insist_reachable(visit: Visit, there: os.stat_result) -> None:
    """The relay's user must own the socket, or be in its group."""
    relay = visit.folder.relay.root.stat()
    if relay.st_uid in (0, there.st_uid):
        return
    try:
        groups = os.getgrouplist(pwd.getpwuid(relay.st_uid).pw_name, relay.st_gid)
    except KeyError:
        groups = [relay.st_gid]
    if there.st_gid not in groups or not there.st_mode & stat.S_IWGRP:
        raise CheckFailed(
            f"the relay's user cannot use {visit.folder.socket}",
            cure="put it into the socket's group (`usermod -aG GROUP USER`; --socket-group of "
            "`site init`), then restart daemon and relay",
        )

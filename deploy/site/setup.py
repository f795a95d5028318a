"""Makes a site's folder from an invite, takes in what the coordinator returns, signs the roster.

A folder is made beside its place and renamed into it when it is whole: a set-up that is cut short
leaves nothing in the way of the next one, and a key that exists is never written over.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import tomli_w
from cryptography.hazmat.primitives import serialization

from client.site.daemon.config import ConfigError, DaemonConfig
from client.site.daemon.state import PAUSED
from client.site.encoders.vault import Vault
from common.identity import Identity
from common.privacy.policy import PolicyError
from common.roster import Roster
from deploy import pki
from deploy.enrolment import Admission, EnrolmentError, EnrolmentRequest, Invite, fingerprint
from deploy.site.layout import LayoutError, RelayConfig, RelayFolder, SiteFolder, install, pem
from simulations import bundle

SOCKET_BYTES = 100  # of a socket's path, as the daemon's configuration admits

_POLICY = """\
# What this hospital allows. It is the hospital's own file; every key: docs/policy.md.
# As written it allows nothing, since nobody may approve. Read by the daemon at its start.

# Whose requests are heard. Compare its fingerprint by telephone before the first approval:
#   {fingerprint}
coordinators = ["{coordinator}"]

# The most that any patient may spend over all studies together. DECIDE BOTH BEFORE THE FIRST
# APPROVAL: a cap that is raised later, in the light of results, bounds nothing but the larger one.
# 1.0 is small on purpose; docs/policy.md says how many studies fit a cap.
[lifetime.train]
epsilon = 1.0
delta = 1e-5

[lifetime.validation]
epsilon = 1.0
delta = 1e-5

# What one study may cost at most; without it, the lifetime alone bounds it.
# [study]
# epsilon = 1.0
# delta = 1e-5

# Who may approve and revoke studies: each person makes a key on their own machine with
# `fedward site approver-key FILE` and hands over what it prints.
[approvers]
# dr-weber = "64 hex digits"
"""

_CONFIG = """\
# The daemon's configuration; every key: docs/policy.md. Relative paths start at this folder.
# device = "cuda:1"     # which GPU; by default the first, without one the processor
# threads = 8           # of the processor
"""
_ROSTER = 'roster = "roster.json"\n'
_NO_ROSTER = f"# {_ROSTER}"  # until all hospitals have signed one


@dataclass(frozen=True)
class Owners:
    """Who owns a site's files.

    Attributes:
        daemon, relay: User and group of the daemon's files and of `relay/`, as numbers; None leaves
            them.
        group: Name of the group whose members may reach the daemon's socket.
    """

    daemon: tuple[int, int] | None = None
    relay: tuple[int, int] | None = None
    group: str | None = None

    @classmethod
    def named(
        cls, *, daemon: str | None = None, relay: str | None = None, group: str | None = None
    ) -> Owners:
        """Raises `LayoutError` where one of them does not exist, or only root could do it."""
        if (daemon or relay) and os.geteuid() != 0:
            raise LayoutError(
                "only root can give files to other users", cure="run it as root (sudo)"
            )
        if group is not None:
            try:
                grp.getgrnam(group)
            except KeyError:
                raise LayoutError(
                    f"there is no group '{group}'", cure=f"groupadd --system {group}"
                ) from None
        return cls(_user(daemon), _user(relay), group)

    @classmethod
    def of(cls, folder: SiteFolder) -> Owners:
        """Those of a site that is there."""
        state, root = folder.state.stat(), folder.root.stat()
        relay = folder.relay.root.stat() if folder.relay.root.exists() else state
        shared = root.st_mode & stat.S_IRWXG
        group = grp.getgrgid(root.st_gid).gr_name if shared else None
        if os.geteuid() != 0:
            return cls(group=group)
        return cls((state.st_uid, state.st_gid), (relay.st_uid, relay.st_gid), group)

    def apply(self, folder: SiteFolder) -> None:
        """Gives every file its owner, and the folders their modes: `state/` and `relay/` are their
        users' alone; members of the group come to `relay/` and to the socket."""
        for path in (folder.root, *folder.root.rglob("*")):
            inside = path.is_relative_to(folder.relay.root)
            if owner := self.relay if inside else self.daemon:
                os.chown(path, *owner, follow_symlinks=False)
        for path in (folder.root, folder.socket.parent):
            path.chmod(0o700 if self.group is None else 0o750)
            if self.group is not None:
                os.chown(path, -1, grp.getgrnam(self.group).gr_gid)
        if self.group is None and self.relay not in (None, self.daemon):
            folder.root.chmod(0o711)  # the relay's user must come through to relay/
        folder.state.chmod(0o700)
        folder.relay.root.chmod(0o700)


def _user(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise LayoutError(f"there is no user '{name}'", cure=f"useradd --system {name}") from None
    return found.pw_uid, found.pw_gid


def invite_path(folder: SiteFolder) -> Path:
    """The invite by which the site was made: whose admissions it takes."""
    return folder.root / "invite.json"


def roster_path(folder: SiteFolder) -> Path:
    """The roster that every hospital signed, once there is one."""
    return folder.root / "roster.json"


def site_identity(folder: SiteFolder) -> Identity:
    """The site's identity; unlike `Identity.open` it never begins one.

    Raises:
        LayoutError: There is none.
    """
    path = folder.state / "site.key"
    if not path.exists():
        raise LayoutError(
            f"{folder.root} has no key {path.name}",
            cure="restore it from the backup, or make the site with `fedward site init`",
        )
    return Identity.open(path)


def init(
    root: Path, invite: Path, shard: Path, *, proxy: str | None = None, owners: Owners | None = None
) -> EnrolmentRequest:
    """Makes the folder of a site with its keys, and the request to be enrolled.

    Args:
        root: Folder to make; must not exist.
        invite: The coordinator's file.
        shard: The hospital's data; not read here.
        proxy: `http://host:port` of the way out.

    Returns:
        What `request.json` holds.

    Raises:
        FedwardError: The invite is not for this installation, or the folder exists; nothing was
            made.
    """
    root, shard = root.absolute(), shard.absolute()
    accepted = _usable(invite)
    if root.exists() or root.is_symlink():
        raise LayoutError(
            f"{root} exists already; keys are never written over",
            cure="choose a folder that does not exist, or move this one away",
        )
    final = SiteFolder(root)
    if len(os.fsencode(final.socket)) > SOCKET_BYTES:
        raise LayoutError(
            f"the socket's path {final.socket} is longer than {SOCKET_BYTES} bytes, which Unix "
            "does not admit",
            cure="choose a folder nearer to the root, such as /var/lib/fedward",
        )
    if not shard.is_dir():
        raise LayoutError(
            f"there is no shard {shard}", cure="make one with `fedward import`, see docs"
        )
    if proxy is not None:
        check_proxy(proxy)
    root.parent.mkdir(parents=True, exist_ok=True)
    made = SiteFolder(Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent)))
    owners = owners or Owners()
    try:
        request = _fill(made, accepted, invite, shard, owners.group)
        made.relay.configure(
            RelayConfig(
                site=accepted.site,
                host=accepted.host,
                port=accepted.port,
                bundle=accepted.bundle,
                socket=final.socket,
                proxy=proxy,
            )
        )
        owners.apply(made)
        os.rename(made.root, root)
    except BaseException:
        shutil.rmtree(made.root)
        raise
    return request


def _usable(path: Path) -> Invite:
    """An invite that this installation can follow."""
    invite = Invite.read(path)
    if invite.expires < datetime.now(UTC):
        raise EnrolmentError(
            f"{path} expired on {invite.expires:%Y-%m-%d}",
            cure="ask the coordinator for a new invite; if it is fresh, set this machine's clock",
        )
    installed = version("fedward")
    if invite.version != installed:
        raise EnrolmentError(
            f"the coordinator runs Fedward {invite.version}, here is {installed}",
            cure=f"install {invite.version}, or ask the coordinator to upgrade",
        )
    here = bundle.sha256()
    if invite.bundle != here:
        raise EnrolmentError(
            f"the coordinator would ship code {invite.bundle[:16]}…, but version {installed} is "
            f"{here[:16]}… here: one of the two was changed",
            cure="install the unchanged release on both sides; do not go on before they agree",
        )
    return invite


def check_proxy(url: str) -> tuple[str, int]:
    """Host and port of an HTTP proxy. Raises `LayoutError` where the URL is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme != "http":
        raise LayoutError(f"'{url}' is no HTTP proxy", cure="write it as http://host:port")
    return host, port


def _fill(
    folder: SiteFolder, invite: Invite, source: Path, shard: Path, group: str | None
) -> EnrolmentRequest:
    for path in (folder.state, folder.socket.parent):
        path.mkdir(mode=0o700)
    identity = Identity.open(folder.state / "site.key")
    Vault.open(folder.state / "vault").close()
    request = _fill_relay(folder.relay, invite, identity)
    request.write(folder.request, identity)
    shutil.copyfile(source, invite_path(folder))
    folder.policy_file.write_text(
        _POLICY.format(coordinator=invite.coordinator, fingerprint=fingerprint(invite.coordinator))
    )
    here = {"name": invite.site, "shard": str(shard), "state": "state", "policy": "policy.toml"}
    top: dict[str, object] = {"socket": str(folder.socket.relative_to(folder.root))}
    if group is not None:
        top["socket_group"] = group
    text = f"{_CONFIG}{tomli_w.dumps(top)}\n[[sites]]\n{tomli_w.dumps(here)}{_NO_ROSTER}"
    folder.config_file.write_text(text)
    for path in (folder.policy_file, folder.config_file):
        path.chmod(0o600)
    return request


def _fill_relay(relay: RelayFolder, invite: Invite, identity: Identity) -> EnrolmentRequest:
    """Fresh keys of a relay, and the request that has them certified."""
    for path in (relay.root, relay.flower):
        path.mkdir(mode=0o700)
    key, node = pki.new_key(), pki.new_key()
    pki.write_secret(relay.key, key)
    pki.write_secret(relay.node_key, _openssh_private(node))
    relay.authority.write_text(invite.authority)
    return EnrolmentRequest(
        site=invite.site,
        nonce=invite.nonce,
        identity=identity.public,
        signing_request=pki.signing_request(key, invite.site),
        node_key=pki.openssh_public(node),
    )


def rejoin(root: Path, invite: Path) -> EnrolmentRequest:
    """Gives a site's relay new keys, after the old ones were revoked; the site stays the same, with
    its identity and ledger. The old relay's folder is moved aside. May be run again.

    Raises:
        FedwardError: The invite is not for this installation or site; nothing was changed.
    """
    folder, accepted = SiteFolder(root.absolute()), _usable(invite)
    site, identity = EnrolmentRequest.read(folder.request).site, site_identity(folder)
    if accepted.site != site:
        raise EnrolmentError(
            f"{invite} is for site '{accepted.site}', {root} is site '{site}'",
            cure="ask the coordinator for an invite with this site's name",
        )
    here = {"host": accepted.host, "port": accepted.port, "bundle": accepted.bundle}
    config = folder.relay.config().model_copy(update=here)
    aside = folder.root / f"relay.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    with tempfile.TemporaryDirectory(prefix=".rejoin.", dir=folder.root) as inside:
        made = RelayFolder(Path(inside) / "relay")
        request = _fill_relay(made, accepted, identity)
        made.configure(config)
        for path in (made.root, *made.root.rglob("*")):
            keep_owner(path, folder.relay.root)
        signed = Path(inside) / "request.json"
        request.write(signed, identity)
        os.rename(folder.relay.root, aside)
        os.rename(made.root, folder.relay.root)
        install(folder.request, signed.read_text(), like=folder.state)
    install(invite_path(folder), invite.read_text(), like=folder.state)
    return request


def _openssh_private(pem: str) -> str:
    """A private key in OpenSSH's form, the only one that `flower-supernode` reads."""
    encoded = pki.private_key(pem).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return encoded.decode()


def accept(root: Path, admission: Path) -> pki.Facts:
    """Takes in the certificate that the coordinator issued: the first one, or a renewed one.

    Raises:
        FedwardError: It is not the invite's coordinator's, not for this site's request and key, or
            not the newest; nothing was changed.
    """
    folder = SiteFolder(root)
    invite = Invite.read(invite_path(folder))
    request = EnrolmentRequest.read(folder.request)
    answer = Admission.read(admission, signer=invite.coordinator)
    if answer.site != invite.site or answer.request != request.digest:
        raise EnrolmentError(
            f"{admission} answers another request than {folder.request}",
            cure="send this request.json to the coordinator",
        )
    facts = pki.Facts.of(answer.certificate)
    wrong = certificate_problem(answer.certificate, facts, folder, invite)
    if wrong:
        raise EnrolmentError(
            f"the certificate in {admission} {wrong}", cure="ask the coordinator for another one"
        )
    install(folder.relay.certificate, answer.certificate, like=folder.relay.root)
    return facts


def certificate_problem(
    certificate: str, facts: pki.Facts, folder: SiteFolder, invite: Invite
) -> str:
    """What keeps a certificate from being used; empty if nothing does."""
    relay = folder.relay
    if not pki.belongs(certificate, pem(relay.key)):
        return f"does not belong to {relay.key}"
    if not pki.issued_by(certificate, pem(relay.authority)):
        return "is not issued by the coordinator's authority"
    if facts.names != (invite.site,):
        return f"is for {', '.join(facts.names)}, not for {invite.site}"
    if not facts.not_before <= datetime.now(UTC) < facts.not_after:
        return f"is valid from {facts.not_before:%Y-%m-%d} to {facts.not_after:%Y-%m-%d} only"
    if relay.certificate.exists():
        before = pki.Facts.of(pem(relay.certificate))
        if facts.not_after < before.not_after:
            return f"ends before the one in use ({before.not_after:%Y-%m-%d})"
    return ""


@dataclass(frozen=True)
class RosterView:
    """A roster beside the one in force.

    Attributes:
        changed: What differs from the roster in force, one line each; empty without one.
    """

    roster: Roster
    changed: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, folder: SiteFolder | None = None) -> RosterView:
        """Reads a roster, and that of the site's folder if there is one."""
        roster = Roster.load(path)
        if folder is None or not roster_path(folder).exists():
            return cls(roster, ())
        before, after = Roster.load(roster_path(folder)).sites, roster.sites
        changes = (
            *(f"{site} leaves" for site in sorted(before.keys() - after.keys())),
            *(f"{site} joins" for site in sorted(after.keys() - before.keys())),
            *(
                f"{site} has another key"
                for site in sorted(before.keys() & after.keys())
                if before[site] != after[site]
            ),
        )
        return cls(roster, changes)


def sign_roster(root: Path, roster: Roster, out: Path) -> Roster:
    """Signs a roster for the coordinator, and puts it in force once all have signed.

    Args:
        out: Where the signed one is written, to be sent to the coordinator.

    Raises:
        RosterError: It does not list this site with its key.
    """
    folder = SiteFolder(root)
    site = EnrolmentRequest.read(folder.request).site
    signed = roster.signed(site, site_identity(folder))
    signed.write(out)
    if not signed.unsigned():
        install(roster_path(folder), signed.model_dump_json(indent=1), like=folder.state)
        config = folder.config_file.read_text()
        if _NO_ROSTER in config:
            install(folder.config_file, config.replace(_NO_ROSTER, _ROSTER), like=folder.state)
    return signed


def keep_owner(path: Path, like: Path) -> None:
    """Gives a file that root wrote to the owner of another one."""
    if os.geteuid() == 0:
        there = like.lstat()
        os.chown(path, there.st_uid, there.st_gid, follow_symlinks=False)


def insist_usual(folder: SiteFolder) -> None:
    """Makes sure that the daemon's state is the folder's own: a pause or backup of another one
    would do nothing.

    Raises:
        FedwardError: It is not, or the configuration does not load.
    """
    sites = DaemonConfig.load(folder.config_file).sites
    if [site.state.resolve() for site in sites] != [folder.state.resolve()]:
        raise LayoutError(
            f"{folder.config_file} keeps its state outside {folder.state}",
            cure='put `state = "state"` there; how to back up by hand says docs/backup.md',
        )


def paused_path(folder: SiteFolder) -> Path:
    """While it exists, the daemon declines whatever would be charged (`site-paused`)."""
    return folder.state / PAUSED


def pause(root: Path, reason: str) -> None:
    """Pauses a site; a round that is being computed is finished.

    Args:
        reason: For the people here; it never leaves the hospital.

    Raises:
        LayoutError: The daemon would not see the pause.
    """
    folder = SiteFolder(root)
    if not folder.state.is_dir():
        raise LayoutError(f"{root} is no site's folder", cure="give the folder of `site init`")
    with contextlib.suppress(ConfigError, PolicyError):  # a mistake in it is no reason to go on
        insist_usual(folder)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    note = json.dumps({"since": since, "reason": reason})
    install(paused_path(folder), note, like=folder.state)


def unpause(root: Path) -> bool:
    """Ends a pause; whether there was one."""
    path = paused_path(SiteFolder(root))
    there = path.exists()
    path.unlink(missing_ok=True)
    return there

"""`fedward site doctor`: what keeps a site from taking part, and the cure.

Checks run in order; one that waits for another one is skipped when that one failed. Nothing is
changed anywhere. What a check says may name files, tables and columns of the hospital: it is for
the people there.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import pwd
import shutil
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import grpc

from client.site.daemon.config import DaemonConfig
from client.site.daemon.state import LEDGER
from client.site.encoders.vault import DATABASE, KEY_FILE, Vault
from client.site.model.files import locate
from common.errors import FedwardError
from common.privacy.book import Book
from common.privacy.policy import Policy
from common.roster import Roster
from common.study import Study
from common.systems import SYSTEMS
from deploy import pki
from deploy.enrolment import EnrolmentRequest, Invite
from deploy.site.backup import receipts_of
from deploy.site.gate import mutual_tls
from deploy.site.layout import LayoutError, RelayConfig, SiteFolder, pem
from deploy.site.setup import (
    SOCKET_BYTES,
    certificate_problem,
    check_proxy,
    insist_usual,
    invite_path,
    roster_path,
    site_identity,
)
from simulations import bundle

Verdict = Literal["pass", "warn", "fail", "skip"]

NETWORK_SECONDS = 5.0
RENEW_DAYS = 30
# Flower refuses a node whose clock is further ahead or behind (SYSTEM_TIME_TOLERANCE and
# TIMESTAMP_TOLERANCE of flwr.common.constant).
_AHEAD_SECONDS, _BEHIND_SECONDS = 5.0, 300.0
_GIB = 2**30
_DISK_LEAST, _DISK_GOOD = 1 * _GIB, 10 * _GIB
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Finding:
    """What one check found. `cure` is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    text: str
    cure: str = ""


class CheckFailed(FedwardError):
    """The site cannot take part like this."""


class CheckWarning(FedwardError):
    """The site can take part; somebody should look."""


@dataclass
class Visit:
    """One examination: what earlier checks found out for later ones."""

    folder: SiteFolder
    study: Study | None = None
    timeout: float = NETWORK_SECONDS
    config: DaemonConfig | None = None
    _relay: RelayConfig | None = field(default=None, repr=False)
    clock_offset: float | None = None

    @property
    def relay(self) -> RelayConfig:
        if self._relay is None:
            _insist_readable(self.folder.relay.config_file)
            self._relay = self.folder.relay.config()
        return self._relay

    @property
    def invite(self) -> Invite:
        return Invite.read(invite_path(self.folder))

    @property
    def site(self) -> str:
        return EnrolmentRequest.read(self.folder.request).site

    @property
    def proxy(self) -> str | None:
        """As the relay uses it: relay.toml's, or the environment's."""
        if self.relay.proxy is not None:
            return self.relay.proxy
        if urllib.request.proxy_bypass(self.relay.host):
            return None
        proxies = urllib.request.getproxies()
        found = proxies.get("https") or proxies.get("all")
        return f"http://{found}" if found and "://" not in found else found


@dataclass(frozen=True)
class Check:
    """`act` returns what is well, or raises; `after` names checks that must not have failed."""

    name: str
    act: Callable[[Visit], str]
    after: tuple[str, ...] = ()


def examine(
    root: Path, study: Study | None = None, *, timeout: float = NETWORK_SECONDS
) -> list[Finding]:
    """Runs every check.

    Args:
        study: Whose SLM shall fit this machine.
        timeout: Of each step over the network, seconds.

    Raises:
        LayoutError: `root` is no site's folder.
    """
    visit = Visit(SiteFolder(root.absolute()), study, timeout)
    if not visit.folder.state.is_dir() or not visit.folder.request.exists():
        raise LayoutError(
            f"{root} is no site's folder", cure="make one with `fedward site init`, or restore it"
        )
    found: dict[str, Finding] = {}
    for check in CHECKS:
        found[check.name] = _run(check, visit, found)
    return list(found.values())


def _run(check: Check, visit: Visit, before: dict[str, Finding]) -> Finding:
    for name in check.after:
        if before[name].verdict in ("fail", "skip"):
            return Finding(check.name, "skip", f"waits for '{name}'")
    try:
        return Finding(check.name, "pass", check.act(visit))
    except PermissionError as error:
        text = f"this user may not read {error.filename}"
        return Finding(check.name, "skip", text, "run it as root, or as the file's owner")
    except FedwardError as error:
        text = str(error).removesuffix(f"\n  cure: {error.cure}")
        verdict: Verdict = "warn" if isinstance(error, CheckWarning) else "fail"
        return Finding(check.name, verdict, text, error.cure)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return Finding(check.name, "fail", f"{place}{error.strerror or error}")


def _insist_readable(path: Path) -> None:
    """Modules of the house turn a missing permission into their own error; here it is a skip."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(13, "Permission denied", str(path))


# -- the installation -----------------------------------------------------------------------------


def _versions(visit: Visit) -> str:
    here = {"fedward": version("fedward"), "flwr": version("flwr")}
    try:
        here["torch"] = version("torch")
    except PackageNotFoundError:
        raise CheckFailed(
            "torch is not installed", cure="install fedward with the extra `site`"
        ) from None
    pinned = next(r for r in requires("fedward") or () if r.startswith("flwr=="))
    if pinned != f"flwr=={here['flwr']}":
        raise CheckFailed(f"flwr {here['flwr']} is installed, not {pinned}", cure="install it")
    wanted = visit.invite.version
    if wanted != here["fedward"]:
        raise CheckWarning(
            f"fedward {here['fedward']} is installed, the invite was made with {wanted}",
            cure="make sure that the coordinator runs the same version by now",
        )
    python = ".".join(str(part) for part in sys.version_info[:3])
    return ", ".join([f"python {python}", *(f"{name} {v}" for name, v in here.items())])


def _bundle(visit: Visit) -> str:
    here, pinned = bundle.sha256(), visit.relay.bundle
    if here != pinned:
        raise CheckFailed(
            f"the relay may run code {pinned[:16]}…, but this version's is {here[:16]}…",
            cure="after an upgrade: `fedward site upgrade FOLDER`; otherwise the installation was "
            "changed: install it again",
        )
    return f"code {here[:16]}… is the one that the relay may run"


def _gpu(visit: Visit) -> str:
    import torch

    asked = visit.config.device if visit.config else None
    available = torch.cuda.is_available()
    if asked and asked.startswith("cuda") and not available:
        raise CheckFailed(
            f"site.toml asks for {asked}, and torch finds no GPU",
            cure='install the driver and a torch with CUDA, or set device = "cpu"',
        )
    if not available or asked == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fits = _fits(visit.study, memory, memory, 4)
        if asked != "cpu":
            raise CheckWarning(
                f"no GPU: the processor computes{fits}", cure="fine for small models"
            )
        return f"the processor computes, as site.toml says{fits}"
    device = torch.device(asked or "cuda")
    try:
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckFailed(
            f"{device} cannot be used: {str(error).splitlines()[0]}",
            cure="`nvidia-smi` lists the GPUs; choose one with `device` in site.toml",
        ) from None
    name = torch.cuda.get_device_name(device)
    fits = _fits(visit.study, total, free, 2)
    return f"{name}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free{fits}"


def _fits(study: Study | None, total: int, free: int, width: int) -> str:
    """Whether the study's SLM fits. `width`: bytes of a weight, bf16 on a GPU, fp32 elsewhere."""
    if study is None or not SYSTEMS[study.model.system].has_slm:
        return ""
    files = locate(study.model.slm, study.model.revision)
    if files is None:
        raise CheckWarning(
            f"the study's model '{study.model.slm}' is not on this machine",
            cure=f"hf download {study.model.slm} --revision {study.model.revision}, as the "
            "daemon's user",
        )
    needed = files.parameters * width
    said = f"; the weights of '{study.model.slm}' take {needed / _GIB:.2f} GiB"
    if needed > total:
        raise CheckFailed(
            f"{said[2:]}, the memory is {total / _GIB:.1f} GiB",
            cure="choose a larger GPU, or a study with a smaller model",
        )
    if 1.5 * needed > free:  # activations and gradients of the adapter come on top
        raise CheckWarning(
            f"{said[2:]}, {free / _GIB:.1f} GiB are free", cure="end what else uses the memory"
        )
    return said


def _disk(visit: Visit) -> str:
    free = shutil.disk_usage(visit.folder.state).free
    text = f"{free / _GIB:.1f} GiB free for {visit.folder.state}"
    if free < _DISK_LEAST:
        raise CheckFailed(text, cure="make room: a charge that cannot be written is not released")
    if free < _DISK_GOOD:
        raise CheckWarning(text, cure="embeddings of a large hospital take more; make room")
    return text


# -- the folder -----------------------------------------------------------------------------------


def _policy(visit: Visit) -> str:
    _insist_readable(visit.folder.policy_file)
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


def _configuration(visit: Visit) -> str:
    _insist_readable(visit.folder.config_file)
    _insist_readable(visit.folder.policy_file)
    visit.config = DaemonConfig.load(visit.folder.config_file)
    names = [site.name for site in visit.config.sites]
    if visit.site not in names:
        raise CheckFailed(
            f"site.toml hosts {', '.join(names)}, but the site was enrolled as {visit.site}",
            cure="the name in [[sites]] is the one of the invite",
        )
    insist_usual(visit.folder)
    return f"site '{visit.site}'"


def _permissions(visit: Visit) -> str:
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


def _shard(visit: Visit) -> str:
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


def _vault(visit: Visit) -> str:
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


def _ledger(visit: Visit) -> str:
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


def _roster(visit: Visit) -> str:
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


def _socket(visit: Visit) -> str:
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


# -- the way to the coordinator -------------------------------------------------------------------


def _relay_config(visit: Visit) -> str:
    relay = visit.relay
    if relay.site != visit.site:
        raise CheckFailed(f"relay.toml is of site '{relay.site}'", cure=f"write {visit.site}")
    if visit.config and relay.socket != visit.config.socket:
        raise CheckFailed(
            f"relay.toml looks for the daemon at {relay.socket}, site.toml puts it at "
            f"{visit.config.socket}",
            cure="write the same socket in both, and restart both",
        )
    return f"coordinator {relay.host}:{relay.port}"


def _certificate(visit: Visit) -> str:
    relay = visit.folder.relay
    if not relay.certificate.exists():
        raise CheckFailed(
            "the coordinator has not admitted this site yet",
            cure="send request.json to the coordinator; then `fedward site accept`",
        )
    certificate = pem(relay.certificate)
    facts = pki.Facts.of(certificate)
    if problem := certificate_problem(certificate, facts, visit.folder, visit.invite):
        raise CheckFailed(f"{relay.certificate} {problem}", cure="ask the coordinator to renew it")
    authority = pki.Facts.of(pem(relay.authority))
    for what, until in (("certificate", facts.not_after), ("authority", authority.not_after)):
        days = (until - datetime.now(UTC)).days
        if days < RENEW_DAYS:
            raise CheckWarning(
                f"the {what} ends in {days} days, on {until:%Y-%m-%d}",
                cure="ask the coordinator to renew it",
            )
    return f"good until {facts.not_after:%Y-%m-%d}"


def _dns(visit: Visit) -> str:
    host = check_proxy(visit.proxy)[0] if visit.proxy else visit.relay.host
    addresses = _resolved(host, visit.timeout)
    return f"{'proxy ' if visit.proxy else ''}{host} is {', '.join(addresses)}"


def _resolved(host: str, timeout: float) -> list[str]:
    """Addresses of a name. The resolver takes no time limit, hence the thread."""
    found: list[str] = []
    trouble: list[str] = []

    def ask() -> None:
        try:
            found.extend(dict.fromkeys(str(i[4][0]) for i in socket.getaddrinfo(host, None)))
        except OSError as error:
            trouble.append(error.strerror or str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        why = trouble[0] if trouble else f"no answer within {timeout:g} s"
        raise CheckFailed(
            f"the name {host} does not resolve ({why})",
            cure="ask for its entry in the hospital's DNS, or add it to /etc/hosts",
        )
    return found


def _tcp(visit: Visit) -> str:
    host, port = check_proxy(visit.proxy) if visit.proxy else (visit.relay.host, visit.relay.port)
    try:
        socket.create_connection((host, port), timeout=visit.timeout).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise CheckFailed(
            f"{host}:{port} cannot be reached ({why})",
            cure="let the firewall pass outgoing TCP to it; ask whether it is running",
        ) from None
    return f"{host}:{port} answers"


def _proxy(visit: Visit) -> str:
    if visit.proxy is None:
        return "none is set"
    try:
        _dial(visit).close()
    except OSError as error:
        raise CheckFailed(
            f"the proxy does not connect to {visit.relay.host}:{visit.relay.port} ({error})",
            cure="have it allow CONNECT to that host and port",
        ) from None
    return f"connects to {visit.relay.host}:{visit.relay.port}"


def _tls(visit: Visit) -> str:
    _greet(visit, certificate=False).close()
    return "the server's certificate is by the coordinator's authority, for this name"


def _mutual_tls(visit: Visit) -> str:
    relay = visit.relay
    connection = http.client.HTTPConnection(relay.host, relay.port, timeout=visit.timeout)
    try:
        connection.sock = _greet(visit, certificate=True)
        connection.request("GET", "/v1/fleet/")
        response = connection.getresponse()
        now = time.time()
        response.read()
    except (ssl.SSLError, ConnectionError, http.client.HTTPException) as error:
        raise CheckFailed(
            f"the coordinator closes the connection ({error})",
            cure="it may have revoked this site: ask; otherwise ask for a new certificate",
        ) from None
    finally:
        connection.close()
    # 400, 403 and 429 are how the coordinator's front turns away whom it does not know.
    if response.status in (400, 403, 429):
        raise CheckFailed(
            f"the coordinator refuses this site's certificate (HTTP {response.status})",
            cure="it was revoked, or another one is enrolled: ask the coordinator",
        )
    # Its date is cut to whole seconds, so that on average it is half a second old.
    if sent := response.headers.get("Date"):
        visit.clock_offset = now - parsedate_to_datetime(sent).timestamp() - 0.5
    if response.status >= 500:
        raise CheckWarning(
            f"the coordinator's front answers, the SuperLink behind it does not "
            f"(HTTP {response.status})",
            cure="nothing to do here: tell the coordinator",
        )
    return f"the coordinator takes this site's certificate (HTTP {response.status})"


def _clock(visit: Visit) -> str:
    offset = visit.clock_offset
    if offset is None:
        raise CheckWarning("the coordinator does not tell its time", cure="look at this clock")
    text = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the coordinator's"
    if offset > _AHEAD_SECONDS or offset < -_BEHIND_SECONDS:
        raise CheckFailed(
            f"this clock is {text}: the coordinator refuses that",
            cure="synchronise the clock (chrony, systemd-timesyncd)",
        )
    if abs(offset) > _AHEAD_SECONDS / 2:
        raise CheckWarning(f"this clock is {text}", cure="synchronise the clock (chrony)")
    return f"this clock is {text}"


def _dial(visit: Visit) -> socket.socket:
    """A connection to the coordinator's port, through the proxy if there is one."""
    host, port = visit.relay.host, visit.relay.port
    if visit.proxy is None:
        return socket.create_connection((host, port), timeout=visit.timeout)
    connection = http.client.HTTPConnection(*check_proxy(visit.proxy), timeout=visit.timeout)
    parts = urlsplit(visit.proxy)
    headers = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    connection.connect()
    return connection.sock


def _greet(visit: Visit, *, certificate: bool) -> ssl.SSLSocket:
    """A TLS connection to the coordinator, of whom only its own authority vouches."""
    relay = visit.folder.relay
    if certificate:
        context = mutual_tls(relay.authority, relay.certificate, relay.key)
    else:
        context = ssl.create_default_context(cafile=str(relay.authority))
    connection = _dial(visit)
    try:
        return context.wrap_socket(connection, server_hostname=visit.relay.host)
    except ssl.SSLCertVerificationError as error:
        raise CheckFailed(
            f"the server's certificate does not hold: {error.verify_message}",
            cure="a date: set this clock, or the coordinator renews; a name: the invite's host is "
            "not the certificate's; an authority: somebody opens TLS on the way: have the "
            "firewall pass this connection untouched",
        ) from None
    except OSError as error:
        raise CheckFailed(
            f"no TLS with {visit.relay.host}:{visit.relay.port} ({error})",
            cure="ask whether the coordinator's front is running, and whether a firewall cuts it",
        ) from None


CHECKS = (
    Check("versions", _versions),
    Check("configuration", _configuration),
    Check("policy", _policy),
    Check("permissions", _permissions),
    Check("disk", _disk),
    Check("GPU", _gpu),
    Check("shard", _shard, ("configuration",)),
    Check("vault", _vault),
    Check("ledger", _ledger),
    Check("roster", _roster),
    Check("daemon", _socket, ("configuration",)),
    Check("relay", _relay_config),
    Check("bundle", _bundle, ("relay",)),
    Check("certificate", _certificate, ("relay",)),
    Check("DNS", _dns, ("relay",)),
    Check("TCP", _tcp, ("DNS",)),
    Check("proxy", _proxy, ("TCP",)),
    Check("TLS", _tls, ("proxy",)),
    Check("mutual TLS", _mutual_tls, ("certificate", "TLS")),
    Check("clock", _clock, ("mutual TLS",)),
)

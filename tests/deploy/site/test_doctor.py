"""Each check against a real fault: a real TLS server, a real ledger, real permissions."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site.daemon.config import DaemonConfig
from client.site.daemon.service import Daemon
from client.site.encoders.vault import Item, Vault
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.ledger import Ledger
from common.roster import Roster
from common.study import Study
from deploy.site import doctor, setup
from deploy.site.doctor import CHECKS, Finding, examine
from deploy.site.layout import SiteFolder

NETWORK = {"DNS", "TCP", "proxy", "TLS", "mutual TLS", "clock"}


def look(site: SiteFolder, *names: str, study: Study | None = None, **options: Any) -> Any:
    """Findings of some checks and of all that they wait for, by name."""
    wanted = set(names)
    for check in reversed(CHECKS):
        if check.name in wanted:
            wanted |= set(check.after)
    kept = tuple(check for check in CHECKS if check.name in wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHECKS", kept)
        found = examine(site.root, study, **options)
    return {finding.check: finding for finding in found}


def one(site: SiteFolder, name: str, **options: Any) -> Finding:
    finding: Finding = look(site, name, **options)[name]
    return finding


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items()}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


# -- the whole ------------------------------------------------------------------------------------


def test_a_site_that_is_well_fails_nothing(
    make_site: Callable[..., SiteFolder], coordinator: Any
) -> None:
    with coordinator.server() as server:
        site = make_site(port=server.port)
        found = examine(site.root)
    assert [f.check for f in found] == [check.name for check in CHECKS]
    assert [f for f in found if f.verdict in ("fail", "skip")] == []
    # What a new site has still to see to.
    warned = {f.check for f in found if f.verdict == "warn"}
    assert warned >= {"policy", "roster", "daemon"}
    assert warned <= {"policy", "roster", "daemon", "disk", "GPU", "permissions"}
    assert all(f.cure for f in found if f.verdict == "warn")


def test_only_a_sites_folder_is_examined(tmp_path: Path) -> None:
    with pytest.raises(FedwardError, match="no site's folder"):
        examine(tmp_path)


def test_every_check_waits_for_earlier_ones_only() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert set(check.after) <= seen
        seen.add(check.name)
    assert len(seen) == len(CHECKS)


# -- the network ----------------------------------------------------------------------------------


@pytest.fixture
def at(make_site: Callable[..., SiteFolder]) -> Callable[..., SiteFolder]:
    """A site whose coordinator is at a port of this machine."""

    def made(port: int, host: str = "localhost", **options: Any) -> SiteFolder:
        return make_site(port=port, host=host, **options)

    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nothing_listens(at: Callable[..., SiteFolder]) -> None:
    found = look(at(free_port()), *NETWORK)
    assert found["TCP"].verdict == "fail"
    assert "cannot be reached" in found["TCP"].text
    for name in ("proxy", "TLS", "mutual TLS", "clock"):
        assert found[name].verdict == "skip"
    assert found["proxy"].text == "waits for 'TCP'"


def test_a_name_that_does_not_resolve(at: Callable[..., SiteFolder]) -> None:
    found = look(at(8443, host="no-such-host.invalid"), *NETWORK)
    assert found["DNS"].verdict == "fail"
    assert "no-such-host.invalid" in found["DNS"].text
    assert found["TCP"].verdict == "skip"


def test_a_resolver_that_never_answers_is_not_waited_for(
    at: Callable[..., SiteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(30))
    begin = time.monotonic()
    finding = one(at(8443), "DNS", timeout=0.3)
    assert time.monotonic() - begin < 5
    assert "no answer within 0.3 s" in finding.text


def test_a_peer_that_never_speaks_is_not_waited_for(at: Callable[..., SiteFolder]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site = at(silent.getsockname()[1])
        begin = time.monotonic()
        found = look(site, "TLS", timeout=0.5)
    assert time.monotonic() - begin < 5
    assert verdicts(found)["TCP"] == "pass"
    assert verdicts(found)["TLS"] == "fail"
    assert "no TLS" in found["TLS"].text


def test_a_peer_that_speaks_no_tls(at: Callable[..., SiteFolder]) -> None:
    class Plain(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with serving(http.server.HTTPServer(("127.0.0.1", 0), Plain)) as server:
        assert one(at(server.server_address[1]), "TLS").verdict == "fail"


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"issuer": "stranger"}, r"self.signed certificate|unable to get local issuer"),
        ({"days": 0}, "expired"),
        ({"names": ("elsewhere.example",)}, "not valid for 'localhost'"),
    ],
)
def test_a_server_that_is_not_the_coordinators(
    at: Callable[..., SiteFolder],
    coordinator: Any,
    stranger: Any,
    fault: dict[str, Any],
    message: str,
) -> None:
    if "issuer" in fault:
        fault = {"issuer": stranger}
    with coordinator.server(**fault) as server:
        found = look(at(server.port), *NETWORK)
    assert found["TLS"].verdict == "fail"
    assert re.search(message, found["TLS"].text, flags=re.I), found["TLS"].text
    assert found["mutual TLS"].text == "waits for 'TLS'"


def test_a_public_authority_is_not_trusted(
    at: Callable[..., SiteFolder], coordinator: Any, stranger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's own trust store says nothing about the coordinator."""
    monkeypatch.setenv("SSL_CERT_FILE", str(stranger.folder / "ca.crt"))
    with coordinator.server(issuer=stranger) as server:
        assert one(at(server.port), "TLS").verdict == "fail"


def test_a_site_that_the_coordinator_does_not_know(
    at: Callable[..., SiteFolder], coordinator: Any, stranger: Any
) -> None:
    """Server and client certificates by different authorities: the handshake is broken off."""
    with coordinator.server() as server:
        site = at(server.port)
        server.context.load_verify_locations(cadata=stranger.authority.pem)
        strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        strict.load_cert_chain(coordinator.folder / "server.crt", coordinator.folder / "server.key")
        strict.verify_mode = ssl.CERT_REQUIRED
        strict.load_verify_locations(cadata=stranger.authority.pem)
        server.context = strict
        found = look(site, *NETWORK)
    assert found["TLS"].verdict == "pass"
    assert found["mutual TLS"].verdict == "fail"
    assert "closes the connection" in found["mutual TLS"].text
    assert found["clock"].verdict == "skip"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(404, "pass"), (405, "pass"), (400, "fail"), (403, "fail"), (429, "fail"), (502, "warn")],
)
def test_what_the_front_answers(
    at: Callable[..., SiteFolder], coordinator: Any, status: int, verdict: str
) -> None:
    with coordinator.server(status=status) as server:
        assert one(at(server.port), "mutual TLS").verdict == verdict


@pytest.mark.parametrize(
    ("skew", "verdict"),
    [(0, "pass"), (-4, "warn"), (-8, "fail"), (20, "warn"), (290, "warn"), (310, "fail")],
)
def test_the_clock_is_held_against_the_coordinators(
    at: Callable[..., SiteFolder], coordinator: Any, skew: float, verdict: str
) -> None:
    """A clock that is ahead is refused much sooner than one that is behind."""
    with coordinator.server(skew=skew) as server:
        finding = one(at(server.port), "clock")
    assert finding.verdict == verdict, finding
    said = float(finding.text.removeprefix("this clock is ").split()[0])
    assert said == pytest.approx(abs(skew), abs=1.0)


class Proxy(http.server.BaseHTTPRequestHandler):
    """CONNECT and nothing else; `allowed` ports only."""

    allowed: set[int] = set()
    asked: list[str] = []
    logins: list[str | None] = []

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.logins.append(self.headers["Proxy-Authorization"])
        host, _, port = self.path.rpartition(":")
        if int(port) not in self.allowed:
            self.send_error(403)
            return
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=self._pump, args=(there, self.connection), daemon=True)
            back.start()
            self._pump(self.connection, there)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[tuple[str, type[Proxy]]]:
    handler = type("OneProxy", (Proxy,), {"allowed": set(), "asked": [], "logins": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    with serving(server):
        yield f"http://user:p%40ss@127.0.0.1:{server.server_address[1]}", handler


def test_the_way_leads_through_the_proxy(
    at: Callable[..., SiteFolder],
    coordinator: Any,
    proxy: tuple[str, type[Proxy]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, handler = proxy
    with coordinator.server() as server:
        site = at(server.port)
        site.relay.configure(site.relay.config().model_copy(update={"proxy": url}))
        found = look(site, *NETWORK)
        assert found["proxy"].verdict == "fail"
        assert "403" in found["proxy"].text
        assert found["TLS"].verdict == "skip"

        handler.allowed.add(server.port)
        found = look(site, *NETWORK)
        assert set(verdicts(found).values()) == {"pass"}, found
        assert set(handler.asked) == {f"localhost:{server.port}"}
        assert set(handler.logins) == {"Basic dXNlcjpwQHNz"}

        # From the environment, as the relay takes it.
        site.relay.configure(site.relay.config().model_copy(update={"proxy": None}))
        monkeypatch.setenv("HTTPS_PROXY", url)
        handler.asked.clear()
        assert one(site, "proxy").text.startswith("connects")
        assert handler.asked
        monkeypatch.setenv("NO_PROXY", "localhost")
        assert one(site, "proxy").text == "none is set"


# -- certificate ----------------------------------------------------------------------------------


def test_a_certificate_that_ends_soon(site: SiteFolder, coordinator: Any) -> None:
    assert one(site, "certificate").verdict == "pass"
    site.relay.certificate.unlink()
    finding = one(site, "certificate")
    assert finding.verdict == "fail"
    assert "has not admitted" in finding.text
    setup.accept(site.root, coordinator.admit(site, days=29))
    finding = one(site, "certificate")
    assert finding.verdict == "warn"
    assert "ends in 28 days" in finding.text


def test_a_certificate_of_another_key_or_time(
    make_site: Callable[..., SiteFolder], coordinator: Any
) -> None:
    site, other = make_site(), make_site("other")
    site.relay.certificate.write_text(other.relay.certificate.read_text())
    assert "does not belong" in one(site, "certificate").text
    request = setup.EnrolmentRequest.read(site.request).signing_request
    expired = coordinator.authority.issue_site(request, "north", days=0)
    site.relay.certificate.write_text(expired)
    finding = one(site, "certificate")
    assert finding.verdict == "fail"
    assert "valid from" in finding.text


# -- the folder -----------------------------------------------------------------------------------


def test_what_other_users_can_read(site: SiteFolder) -> None:
    for path in (site.state, site.state / "site.key", site.state / "vault" / "vault.key"):
        before = path.stat().st_mode
        path.chmod(before | 0o040)
        finding = one(site, "permissions")
        assert finding.verdict == "fail"
        assert str(path) in finding.text
        path.chmod(before)
    site.relay.key.chmod(0o604)
    assert one(site, "permissions").cure == f"chmod 600 {site.relay.key}"
    site.relay.key.chmod(0o600)
    finding = one(site, "permissions")  # in these tests one user owns all
    assert finding.verdict == "warn"
    if os.geteuid() == 0:
        os.chown(site.relay.root, 65534, 65534)
        assert one(site, "permissions").verdict == "pass"
        os.chown(site.state / "site.key", 65534, 65534)
        assert "belongs to another user" in one(site, "permissions").text


def test_what_other_users_can_write(site: SiteFolder) -> None:
    """Who writes policy.toml may name themselves an approver."""
    for path in (site.root, site.policy_file, site.config_file):
        before = path.stat().st_mode
        path.chmod(before | 0o020)
        finding = one(site, "permissions")
        assert (finding.verdict, str(path) in finding.text) == ("fail", True)
        path.chmod(before)
    if os.geteuid() == 0:
        os.chown(site.policy_file, 65534, 65534)
        assert str(site.policy_file) in one(site, "permissions").text


def test_a_state_or_socket_that_lies_elsewhere(site: SiteFolder) -> None:
    usual = site.config_file.read_text()
    site.config_file.write_text(usual.replace('state = "state"', 'state = "elsewhere"'))
    assert "keeps its state outside" in one(site, "configuration").text
    site.config_file.write_text(usual.replace("run/daemon.sock", "run/other.sock"))
    finding = look(site, "configuration", "relay")["relay"]
    assert finding.verdict == "fail"
    assert "run/other.sock" in finding.text


@pytest.mark.skipif(os.geteuid() != 0, reason="one user owns all")
def test_a_shard_that_the_relays_user_may_enter(
    make_site: Callable[..., SiteFolder], shard: Path
) -> None:
    site, before = make_site(), shard.stat().st_mode
    os.chown(site.relay.root, 65534, 65534)
    try:
        shard.chmod(0o755)
        assert one(site, "shard").verdict == "warn"
        shard.chmod(0o750)
        assert one(site, "shard").verdict == "pass"
    finally:
        shard.chmod(before)


def test_the_shard_names_table_and_column(
    make_site: Callable[..., SiteFolder], tmp_path: Path, shard: Path
) -> None:
    import polars as pl

    site, copy = make_site(), tmp_path / "copy"
    assert one(site, "shard").verdict == "pass"
    copy.mkdir()
    for path in shard.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    pl.read_parquet(copy / "records.parquet").drop("cutoff_hours").write_parquet(
        copy / "records.parquet"
    )
    config = site.config_file
    config.write_text(config.read_text().replace(str(shard), str(copy)))
    finding = one(site, "shard")
    assert finding.verdict == "fail"
    assert "records.parquet" in finding.text
    assert "cutoff_hours" in finding.text


def test_the_policy(site: SiteFolder, coordinator: Any) -> None:
    text = site.policy_file.read_text()
    assert "nobody may approve" in one(site, "policy").text
    site.policy_file.write_text(text + f'dr-weber = "{"1" * 64}"\n')
    assert one(site, "policy").verdict == "pass"
    site.policy_file.write_text(text.replace(coordinator.identity.public, "2" * 64))
    assert "does not hear the coordinator" in one(site, "policy").text
    site.policy_file.write_text(text.replace("[lifetime.train]", "[lifetimes.train]"))
    found = look(site, "policy", "shard")
    assert "lifetimes" in found["policy"].text
    assert found["configuration"].verdict == "fail"
    assert found["shard"].verdict == "skip"
    site.policy_file.write_text(f'coordinators = ["{coordinator.identity.public}"]')
    assert "no lifetime" in one(site, "policy").text


def test_the_ledger(site: SiteFolder) -> None:
    assert "not begun" in one(site, "ledger").text
    path, key = site.state / "ledger.jsonl", Identity.open(site.state / "site.key")
    ledger = Ledger.open(path, "north", key)
    ledger.give_receipt("a board")
    old = path.read_bytes()
    ledger.give_receipt("another board")
    newest = path.read_bytes()
    assert one(site, "ledger").verdict == "pass"
    path.write_bytes(old)
    finding = one(site, "ledger")
    assert finding.verdict == "fail"
    assert "lacks line 3" in finding.text
    path.write_bytes(newest.replace(b"board", b"BOARD"))
    assert "line 2" in one(site, "ledger").text
    path.unlink()
    assert "is gone" in one(site, "ledger").text
    path.write_bytes(newest)
    (site.state / "site.key").unlink()
    Identity.open(site.state / "site.key")
    assert "another key" in one(site, "ledger").text


def test_looking_changes_nothing(site: SiteFolder) -> None:
    Ledger.open(site.state / "ledger.jsonl", "north", Identity.open(site.state / "site.key"))
    before = {p: p.read_bytes() for p in site.root.rglob("*") if p.is_file()}
    examine(site.root, timeout=0.2)
    kept = {p: p.read_bytes() for p in site.root.rglob("*") if p.is_file()}
    assert {p: d for p, d in kept.items() if "vault" not in p.parts} == {
        p: d for p, d in before.items() if "vault" not in p.parts
    }
    (site.state / "site.key").unlink()
    assert one(site, "ledger").verdict == "fail"
    assert not (site.state / "site.key").exists()


def test_the_vaults_key(site: SiteFolder) -> None:
    vault, key = site.state / "vault", site.state / "vault" / "vault.key"
    with Vault.open(vault) as opened:
        opened.write([(Item("e" * 64, "p", "i"), np.ones((1, 2), np.float32))])
    assert one(site, "vault").verdict == "pass"
    right = key.read_bytes()
    key.write_bytes(os.urandom(32))
    assert "does not belong" in one(site, "vault").text
    key.write_bytes(right[:-1])
    assert "not a vault key" in one(site, "vault").text
    key.unlink()
    assert "is lost" in one(site, "vault").text


def test_the_roster(site: SiteFolder, tmp_path: Path) -> None:
    assert one(site, "roster").verdict == "warn"
    north, south = Identity.open(site.state / "site.key"), Identity.open(tmp_path / "south.key")
    roster = Roster(name="t", sites={"north": north.public, "south": south.public})
    half = roster.signed("south", south)
    half.write(setup.roster_path(site))
    assert "not signed by north" in one(site, "roster").text
    half.signed("north", north).write(setup.roster_path(site))
    assert "site.toml does not name it" in look(site, "configuration", "roster")["roster"].text
    setup.sign_roster(site.root, half, tmp_path / "out.json")
    assert look(site, "configuration", "roster")["roster"].verdict == "pass"
    alone = Roster(name="t", sites={"south": south.public}).signed("south", south)
    alone.write(setup.roster_path(site))
    assert "does not list this site" in one(site, "roster").text


def test_the_daemon(site: SiteFolder) -> None:
    assert "no daemon listens" in one(site, "daemon").text
    config = DaemonConfig.load(site.config_file).model_copy(update={"device": "cpu", "threads": 1})
    with Daemon(config):
        assert one(site, "daemon") == Finding("daemon", "pass", "the daemon answers: idle")
        site.socket.chmod(0o666)
        assert "open to every user" in one(site, "daemon").text
        site.socket.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(site.relay.root, 65534, 65534)
            finding = one(site, "daemon")
            assert finding.verdict == "fail"
            assert "cannot use" in finding.text
            os.chown(site.relay.root, 0, 0)
    with socket.socket(socket.AF_UNIX) as dead:  # bound, and nobody behind it
        dead.bind(str(site.socket))
        site.socket.chmod(0o600)
        assert "no daemon answers" in one(site, "daemon", timeout=1.0).text


# -- the installation -----------------------------------------------------------------------------


def test_another_bundle_than_the_pinned_one(site: SiteFolder) -> None:
    assert one(site, "bundle").verdict == "pass"
    site.relay.configure(site.relay.config().model_copy(update={"bundle": "0" * 64}))
    finding = one(site, "bundle")
    assert finding.verdict == "fail"
    assert "site upgrade" in finding.cure


def test_versions(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = one(site, "versions")
    assert finding.verdict == "pass"
    for name in ("python", "fedward", "flwr 1.41.0", "torch"):
        assert name in finding.text
    there = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: "1.40.0" if n == "flwr" else there(n))
    assert one(site, "versions").verdict == "fail"
    monkeypatch.setattr(doctor, "version", lambda n: "9.9" if n == "fedward" else there(n))
    assert one(site, "versions").verdict == "warn"


def test_disk(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(site.root)
    for free, verdict in ((2**29, "fail"), (2**31, "warn"), (2**40, "pass")):
        shown = usage._replace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, shown=shown: shown)
        assert one(site, "disk").verdict == verdict


def test_the_slm_must_fit(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    study = Study.load("demo")
    config = site.config_file
    config.write_text('device = "cpu"\n' + config.read_text())
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "pass"
    assert "the weights of 'nano' take" in finding.text

    files = doctor.locate("nano", None)
    assert files is not None
    large = replace(files)
    monkeypatch.setitem(large.__dict__, "shapes", {"w": (10**6, 10**7)})
    monkeypatch.setattr(doctor, "locate", lambda *_: large)
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "fail"
    assert "smaller model" in finding.cure
    monkeypatch.setattr(doctor, "locate", lambda *_: None)
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "warn"
    assert "hf download" in finding.cure

    config.write_text(config.read_text().replace('"cpu"', '"cuda:7"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = look(site, "configuration", "GPU")["GPU"]
    assert finding.verdict == "fail"
    assert "asks for cuda:7" in finding.text


def test_a_gpu_is_measured_against_the_slm(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reports a GPU; the weights count 2 bytes each there."""
    import torch

    files = doctor.locate("nano", None)
    assert files is not None
    monkeypatch.setitem(files.__dict__, "shapes", {"w": (2**30, 2)})  # 4 GiB in bf16
    monkeypatch.setattr(doctor, "locate", lambda *_: files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for total, free, verdict in ((3, 3, "fail"), (8, 5, "warn"), (8, 7, "pass")):
        memory = (free * 2**30, total * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, memory=memory: memory)
        assert one(site, "GPU", study=Study.load("demo")).verdict == verdict


def test_what_may_not_be_read_is_skipped_not_failed(site: SiteFolder) -> None:
    """The relay's user examines what it may."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    code = (
        "import os, sys; from pathlib import Path\n"
        "import deploy.site.doctor as d\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "keep = ('configuration', 'policy', 'vault', 'ledger', 'shard')\n"
        "d.CHECKS = tuple(c for c in d.CHECKS if c.name in keep)\n"
        "visit = d.Visit(d.SiteFolder(Path(sys.argv[1])))\n"
        "found = {}\n"
        "for c in d.CHECKS: found[c.name] = d._run(c, visit, found)\n"
        "print(sorted({f.verdict for f in found.values()}))"
    )
    for parent in (site.root, *site.root.parents[:3]):
        parent.chmod(0o711)
    done = subprocess.run(
        [sys.executable, "-c", code, str(site.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['skip']"

"""The way to the coordinator against real faults: a real TLS server, a real proxy."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy.site import setup
from deploy.site.layout import SiteFolder
from tests.deploy.site.doctor.looking import look, one, verdicts

NETWORK = {"DNS", "TCP", "proxy", "TLS", "mutual TLS", "clock"}


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
    answer = threading.Event()

    def silent(*_: object) -> list[object]:
        answer.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    try:
        assert "no answer within 0.3 s" in one(at(8443), "DNS", timeout=0.3).text
    finally:
        answer.set()


def test_a_peer_that_never_speaks_is_not_waited_for(at: Callable[..., SiteFolder]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site = at(silent.getsockname()[1])
        found = look(site, "TLS", timeout=0.5)
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

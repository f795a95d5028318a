"""The gate against a coordinator of our own making: TLS on loopback, honest and hostile."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from deploy import pki
from deploy.site.gate import Upstream, application
from deploy.site.layout import RelayConfig, RelayFolder

CODE = b"the approved bundle"


class Coordinator:
    """Says what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, dict[str, str]]] = []
        self.answer = Response(b"answer")

    async def call(self, request: Request) -> Response:
        self.asked.append((request.url.path, await request.body(), dict(request.headers)))
        return self.answer

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.call, methods=["POST", "GET"])])


@contextlib.contextmanager
def serving(app: Any, **tls: Any) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **tls)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            server.force_exit = True
            thread.join(10)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = pki.Authority.create(folder, "test")
        self.coordinator = Coordinator()
        self.relay = RelayFolder(folder / "relay")
        self.relay.root.mkdir()
        key = pki.new_key()
        (folder / "server.key").write_text(key)
        (folder / "server.crt").write_text(self.authority.issue_server(key, ["localhost"]))
        self.relay.authority.write_text(self.authority.pem)
        self.admit(self.authority)

    def admit(self, authority: pki.Authority) -> None:
        key = pki.new_key()
        self.relay.key.write_text(key)
        certificate = authority.issue_site(pki.signing_request(key, "north"), "north")
        self.relay.certificate.write_text(certificate)

    @contextlib.contextmanager
    def coordinating(self) -> Iterator[int]:
        """The coordinator's port; it demands a certificate of its authority."""
        with serving(
            self.coordinator.app(),
            ssl_keyfile=str(self.folder / "server.key"),
            ssl_certfile=str(self.folder / "server.crt"),
            ssl_ca_certs=str(self.folder / "ca.crt"),
            ssl_cert_reqs=ssl.CERT_REQUIRED,
        ) as port:
            yield port

    @contextlib.contextmanager
    def gate(self, port: int, **changes: Any) -> Iterator[httpx.Client]:
        config = RelayConfig(
            site="north",
            host="localhost",
            port=port,
            bundle=hashlib.sha256(CODE).hexdigest(),
            socket=Path("/nowhere"),
            **changes,
        )
        upstream = Upstream(self.relay, config)
        app = application(self.relay, config, upstream)
        with serving(app) as own, httpx.Client(base_url=f"http://127.0.0.1:{own}") as client:
            yield client


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    with world.coordinating() as port, world.gate(port) as client:
        yield client


def test_it_carries_flowers_fleet_calls_both_ways(world: World, client: httpx.Client) -> None:
    world.coordinator.answer = Response(b"reply" * 1000, headers={"x-of-flower": "kept"})
    answer = client.post("/v1/fleet/push-object", content=b"up" * 500, headers={"x-key": "k"})
    assert (answer.status_code, answer.content) == (200, b"reply" * 1000)
    assert answer.headers["x-of-flower"] == "kept"
    ((path, body, headers),) = world.coordinator.asked
    assert (path, body, headers["x-key"]) == ("/v1/fleet/push-object", b"up" * 500, "k")
    assert headers["host"].startswith("localhost:")


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/"])
def test_nothing_but_the_fleet_api_passes(world: World, client: httpx.Client, path: str) -> None:
    assert client.post(path).status_code == 404
    assert client.get("/v1/fleet/pull-messages").status_code == 405
    assert client.post("/v1/fleet/../control/start-run").status_code == 404
    assert world.coordinator.asked == []


def test_a_refusal_of_the_coordinator_is_passed_on(world: World, client: httpx.Client) -> None:
    world.coordinator.answer = Response(b"no", status_code=401)
    answer = client.post("/v1/fleet/activate-node")
    assert (answer.status_code, answer.content) == (401, b"no")


@pytest.mark.parametrize("status", [403, 429])
def test_a_site_that_the_front_does_not_admit_is_told_to_end(
    world: World, client: httpx.Client, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """On 403 Flower's SuperNode would hang: a run that has ended is what that means to it."""
    world.coordinator.answer = HTMLResponse("<h1>nginx</h1>", status_code=status)
    with caplog.at_level(logging.ERROR, "fedward.relay"):
        assert client.post("/v1/fleet/activate-node").status_code == 401
    assert "does not admit this site" in caplog.text
    world.coordinator.answer = JSONResponse({"code": 1}, status_code=status)
    assert client.post("/v1/fleet/pull-messages").status_code == status


def test_a_redirect_is_refused(world: World, client: httpx.Client) -> None:
    world.coordinator.answer = RedirectResponse("http://127.0.0.1:1/inside")
    answer = client.post("/v1/fleet/pull-messages")
    assert (answer.status_code, answer.headers.get("location")) == (403, None)


def bundle(content: bytes) -> Response:
    return Response(GetFabResponse(fab=Fab(hash_str="x", content=content)).SerializeToString())


def test_only_the_pinned_bundle_passes(
    world: World, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    world.coordinator.answer = bundle(CODE)
    answer = client.post("/v1/fleet/get-fab")
    assert GetFabResponse.FromString(answer.content).fab.content == CODE
    for other in (bundle(CODE + b" "), bundle(b""), Response(b"\xff\xff")):
        world.coordinator.answer = other
        answer = client.post("/v1/fleet/get-fab")
        assert (answer.status_code, answer.content) == (403, b"")
    # The same path, written so that a router may take it for another.
    for path in ("/v1/fleet//get-fab", "/v1/fleet/get-fab/", "/v1/fleet/%67et-fab"):
        world.coordinator.answer = bundle(b"other")
        assert b"other" not in client.post(path).content, path


def test_an_answer_that_is_too_long_is_cut_off(world: World) -> None:
    world.coordinator.answer = Response(b"x" * (2**20 + 1))
    with (
        world.coordinating() as port,
        world.gate(port, max_message_bytes=2**20) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.post("/v1/fleet/pull-object")


def test_an_answer_that_would_unfold_is_refused(world: World, client: httpx.Client) -> None:
    """Twice compressed, 700 bytes are 300 MB."""
    bomb = gzip.compress(gzip.compress(bytes(2**20)))
    world.coordinator.answer = Response(bomb, headers={"content-encoding": "gzip, gzip"})
    for call in ("pull-object", "get-fab"):
        answer = client.post(f"/v1/fleet/{call}")
        assert (answer.status_code, answer.content) == (502, b"")
    assert {headers["accept-encoding"] for *_, headers in world.coordinator.asked} == {"identity"}


def test_a_coordinator_that_is_not_there_is_told_as_unavailable(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with world.gate(port) as client:
        assert client.post("/v1/fleet/pull-messages").status_code == 503
    assert "cannot be reached" in caplog.text


def test_a_coordinator_of_another_authority_hears_nothing(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = pki.Authority.create(tmp_path / "other", "other")
    world.relay.authority.write_text(other.pem)
    with world.coordinating() as port, world.gate(port) as client:
        assert client.post("/v1/fleet/pull-messages").status_code == 503
    assert world.coordinator.asked == []


def test_a_renewed_certificate_is_used_without_a_restart(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    world.admit(pki.Authority.create(tmp_path / "other", "other"))
    with world.coordinating() as port, world.gate(port) as client:
        assert client.post("/v1/fleet/pull-messages").status_code == 503
        world.admit(world.authority)
        assert client.post("/v1/fleet/pull-messages").status_code == 200


class Proxy(threading.Thread):
    """An HTTP proxy that only knows CONNECT."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.lines: list[bytes] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                head = near.recv(4096).split(b"\r\n")[0]
                self.lines.append(head)
                host, _, port = head.split()[1].decode().rpartition(":")
                far = socket.create_connection((host, int(port)))
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


def test_it_goes_through_the_hospitals_proxy(world: World) -> None:
    proxy = Proxy()
    proxy.start()
    with (
        world.coordinating() as port,
        world.gate(port, proxy=f"http://127.0.0.1:{proxy.port}") as client,
    ):
        assert client.post("/v1/fleet/pull-messages").status_code == 200
        assert proxy.lines == [f"CONNECT localhost:{port} HTTP/1.1".encode()]
    proxy.listener.close()

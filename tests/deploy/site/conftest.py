"""A coordinator that invites and admits, its TLS server, and a hospital with a real shard."""

from __future__ import annotations

import functools
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.identity import Identity
from deploy import pki
from deploy.enrolment import Admission, EnrolmentRequest, Invite
from deploy.site import setup
from deploy.site.backup import backup
from deploy.site.layout import SiteFolder
from deploy.site.sealing import Header
from simulations import bundle
from tests.deploy.site.life import WORDS, Life


class Coordinator:
    """Authority, key and files of a coordinator."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.authority = pki.Authority.create(folder, "Test federation")
        self.identity = Identity.open(folder / "coordinator.key")

    def invite(self, **changes: Any) -> Path:
        fields = {
            "site": "north",
            "host": "localhost",
            "port": 8443,
            "authority": self.authority.pem,
            "coordinator": self.identity.public,
            "version": version("fedward"),
            "bundle": bundle.sha256(),
            "nonce": "0" * 32,
            "expires": datetime.now(UTC) + timedelta(days=14),
            **changes,
        }
        path = self.folder / "invite.json"
        Invite.model_validate(fields).write(path, self.identity)
        return path

    def admit(self, folder: SiteFolder, *, days: int = 397, **changes: Any) -> Path:
        request = EnrolmentRequest.read(folder.request)
        fields = {
            "site": request.site,
            "request": request.digest,
            "certificate": self.authority.issue_site(
                request.signing_request, request.site, days=days
            ),
            "coordinator": self.identity.public,
            **changes,
        }
        path = self.folder / "admission.json"
        Admission.model_validate(fields).write(path, self.identity)
        return path

    def server(self, **options: Any) -> Server:
        return Server(self, **options)


class Server:
    """A coordinator's front on loopback: mutual TLS, and `status` for every request.

    Args:
        names: In its certificate.
        days: Until that ends; below 0, it has.
        issuer: Of its certificate, by default the coordinator.
        skew: By which its Date header is wrong, seconds.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        names: tuple[str, ...] = ("localhost",),
        days: int = 397,
        issuer: Coordinator | None = None,
        skew: float = 0.0,
        status: int = 404,
    ) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                return format_datetime(datetime.now(UTC) + timedelta(seconds=skew), usegmt=True)

            def log_message(self, *_: object) -> None:
                pass

        key, by = pki.new_key(), issuer or coordinator
        (by.folder / "server.key").write_text(key)
        certificate = by.authority.issue_server(key, names, days=days)
        (by.folder / "server.crt").write_text(certificate)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(by.folder / "server.crt", by.folder / "server.key")
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_verify_locations(cadata=coordinator.authority.pem)

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def get_request(this) -> Any:
                connection, address = super().get_request()
                return self.context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                ), address

            def handle_error(self, *_: object) -> None:  # handshakes that the tests spoil
                pass

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.port = self._listener.server_address[1]
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()


_bundle_sha256 = functools.cache(bundle.sha256)  # a second each, and always the same


@pytest.fixture(autouse=True)
def _one_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "sha256", _bundle_sha256)


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


@pytest.fixture
def stranger(tmp_path: Path) -> Coordinator:
    """Another coordinator, with an authority of its own."""
    return Coordinator(tmp_path / "stranger")


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory, ward_module: ModuleType) -> Path:
    folder: Path = tmp_path_factory.mktemp("shards") / "north"
    ward_module.make_shard(folder, "north")
    return folder


@pytest.fixture
def make_site(tmp_path: Path, coordinator: Coordinator, shard: Path) -> Callable[..., SiteFolder]:
    """Makes an admitted site; keyword arguments go to its invite."""

    def make(name: str = "site", *, admitted: bool = True, **invite: Any) -> SiteFolder:
        folder = SiteFolder(tmp_path / name)
        setup.init(folder.root, coordinator.invite(**invite), shard)
        if admitted:
            setup.accept(folder.root, coordinator.admit(folder))
        return folder

    return make


@pytest.fixture
def site(make_site: Callable[..., SiteFolder]) -> SiteFolder:
    return make_site()


@pytest.fixture
def quick_scrypt() -> Iterator[None]:
    """The least cost of scrypt that is admitted."""
    field = Header.model_fields["cost"]
    usual, field.default = field.default, 2**14
    Header.model_rebuild(force=True)
    yield
    field.default = usual
    Header.model_rebuild(force=True)


@pytest.fixture
def life(site: SiteFolder, quick_scrypt: None) -> Life:
    life = Life(site)
    life.go_on(3)
    return life


@pytest.fixture
def archive(life: Life, tmp_path: Path) -> Path:
    backup(life.site.root, tmp_path / "north.backup", WORDS)
    return tmp_path / "north.backup"

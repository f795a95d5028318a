"""Coordinators and hospitals for the tests: folders, keys, and real processes."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest

from common.identity import Identity
from deploy import pki
from deploy.coordinator import enrol, front
from deploy.coordinator.layout import Config, CoordinatorFolder
from deploy.enrolment import Admission, EnrolmentRequest, Invite
from simulations.flower import free_port

FLEET = "/v1/fleet/activate-node"
COMMAND = [sys.executable, "-c", "from deploy.coordinator.cli import app; app()"]


class Hospital:
    """What a hospital has after `site init`: keys, and the request that it sends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir(parents=True)
        self.identity = Identity.open(self.folder / "site.key")
        self.tls, self.node = pki.new_key(), pki.new_key()
        (self.folder / "relay.key").write_text(self.tls)

    @property
    def node_header(self) -> str:
        return front.node_header(pki.openssh_public(self.node))

    def request(self, invite: Invite, **other: str) -> EnrolmentRequest:
        """Answers an invite, signed."""
        fields = {
            "site": invite.site,
            "nonce": invite.nonce,
            "identity": self.identity.public,
            "signing_request": pki.signing_request(self.tls, invite.site),
            "node_key": pki.openssh_public(self.node),
        }
        return EnrolmentRequest.model_validate({**fields, **other})

    def admitted(self, coordinator: CoordinatorFolder) -> Hospital:
        """Joins: invite, request, admission."""
        invite = enrol.invite(coordinator, self.name, self.folder / "invite.json")
        path = self.folder / "request.json"
        self.request(invite).write(path, self.identity)
        out = self.folder / "admission.json"
        enrol.enrol(coordinator, EnrolmentRequest.read(path), out)
        self.install(Admission.read(out).certificate)
        return self

    def install(self, certificate: str) -> None:
        (self.folder / "relay.crt").write_text(certificate)

    def signed_headers(self) -> dict[str, str]:
        """What its SuperNode sends to prove that it holds the node key."""
        now = datetime.now(UTC).isoformat()
        proof = pki.private_key(self.node).sign(now.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "Content-Type": "application/protobuf",
            "flwr-public-key": self.node_header,
            "flwr-timestamp": now,
            "flwr-signature": b64encode(proof).decode(),
        }


Joining = Callable[[str], Hospital]


@dataclass
class Served:
    """A coordinator whose `serve` runs."""

    folder: CoordinatorFolder
    process: subprocess.Popen[bytes]
    hospitals: dict[str, Hospital]

    def connect(self, hospital: Hospital | None) -> http.client.HTTPSConnection:
        """A connection to the public port, with the hospital's certificate."""
        context = ssl.create_default_context(cafile=str(self.folder.authority))
        if hospital is not None:
            context.load_cert_chain(hospital.folder / "relay.crt", hospital.folder / "relay.key")
        port = self.folder.config().port
        return http.client.HTTPSConnection("localhost", port, context=context, timeout=10)

    def ask(
        self,
        hospital: Hospital | None,
        path: str = FLEET,
        *,
        headers: dict[str, str] | None = None,
        method: str = "POST",
        body: bytes = b"",
    ) -> int:
        """Status of the answer."""
        connection = self.connect(hospital)
        try:
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status
        finally:
            connection.close()


def hello(site: Hospital) -> bytes:
    """The request by which a site's SuperNode says that it is there."""
    key = front.node_public(pki.openssh_public(site.node))
    return ActivateNodeRequest(public_key=key, heartbeat_interval=30).SerializeToString()


def new_folder(root: Path) -> CoordinatorFolder:
    config = Config(
        name="ward",
        hosts=("coordinator.example",),
        port=free_port(),
        listen="127.0.0.1",
        superlink_port=free_port(),
    )
    return enrol.init(root, config)


def started(folder: CoordinatorFolder, *options: str) -> subprocess.Popen[bytes]:
    """`serve`, once hospitals can connect."""
    log = (folder.root / "serve.log").open("ab")
    process = subprocess.Popen(
        [*COMMAND, "serve", str(folder.root), *options], stdout=log, stderr=subprocess.STDOUT
    )
    until(lambda: b"serving on" in (folder.root / "serve.log").read_bytes(), process, seconds=60)
    return process


def until(
    true: Callable[[], bool],
    process: subprocess.Popen[bytes] | None = None,
    *,
    seconds: float = 30,
) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, "serve ended"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def ended(process: subprocess.Popen[bytes]) -> int:
    """Exit code of `serve` after SIGTERM."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    return process.wait(40)

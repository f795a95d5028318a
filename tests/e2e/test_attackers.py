"""What outsiders, enrolled sites, a relay and a coordinator can do to a running deployment beyond
their part: each attempt is refused or harmless, and stands in the log where its operator looks.

The tests share one deployment and run in their order; the last one revokes a site.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from safetensors.numpy import save

from client.relay.app import call
from common.identity import Identity, open_envelope
from common.messages import Answer, Arrays, Envelope, Request
from common.study import Study
from deploy import pki
from deploy.coordinator import runs
from deploy.coordinator.front import node_header
from deploy.coordinator.superlink import Node, SuperLink
from deploy.enrolment import EnrolmentRequest
from deploy.site.layout import SiteFolder
from simulations.bundle import assemble
from simulations.flower import environment, free_port, program
from tests.e2e.conftest import SITES, study
from tests.e2e.deployment import RELAY_USER, Deployment, Hospital, wait_for

REFUSED = (403, 429)  # many refusals from one address become 429
MIDWEST, SOUTH, WEST = SITES
# Well below what there is: whether a patient is there must not decide whether there are enough.
FEWER = {name: {"patients_declared": 60} for name in SITES}


class Coordinator:
    """Whoever holds the coordinator's key, and the relays' way to the daemons."""

    def __init__(self, deployment: Deployment, known: Study) -> None:
        self.identity, self.study, self.deployment = deployment.at.identity(), known, deployment

    def request(self, kind: Any, round: int = 0, *, site: str = MIDWEST, **changes: Any) -> Request:
        of: Study = changes.pop("of", self.study)
        values: dict[str, Any] = {
            "kind": kind,
            "run": "run",
            "site": site,
            "study_hash": of.hash,
            "round": round,
            "study": of.canonical().decode() if kind == "prepare" else None,
        }
        return Request(**{**values, **changes})

    def sealed(self, request: Request, arrays: Arrays | None = None) -> bytes:
        return self.identity.seal(request, arrays).pack()

    def send(self, packed: bytes, site: str = MIDWEST) -> tuple[Answer, Arrays, bytes]:
        """Bytes through the socket; what comes back is signed by the site, whatever was sent."""
        hospital = self.deployment.hospitals[site]
        back = call(str(hospital.folder.socket), packed, seconds=120)
        envelope = Envelope.unpack(back)
        key = EnrolmentRequest.read(hospital.folder.request).identity
        return open_envelope(envelope, Answer, [key]), envelope.arrays, back

    def ask(self, request: Request, arrays: Arrays | None = None) -> tuple[Answer, Arrays]:
        answer, released, _ = self.send(self.sealed(request, arrays), request.site)
        return answer, released

    def refusal(self, request: Request, arrays: Arrays | None = None) -> str | None:
        """The code, with which nothing else came."""
        answer, released = self.ask(request, arrays)
        assert answer.refusal is None or (answer.body, released) == ({}, {})
        return answer.refusal


@pytest.fixture(scope="module")
def coordinator(deployment: Deployment) -> Coordinator:
    """Its study is approved for one run, and prepared at one hospital."""
    path = deployment.settled(
        study("known", training={"steps_per_round": 1}, federation={"rounds": 2, "sites": FEWER})
    )
    deployment.approve(path, MIDWEST)
    made = Coordinator(deployment, Study.load(path))
    assert made.refusal(made.request("prepare")) is None
    return made


@pytest.fixture(scope="module")
def honest(deployment: Deployment) -> Path:
    """Another one, approved by all hospitals for two runs, which go on without one of three."""
    path = deployment.settled(
        study(
            "honest",
            training={"steps_per_round": 1},
            federation={"rounds": 2, "quorum": 0.5, "deadline_seconds": 25},
        )
    )
    deployment.approve(path, runs=2)
    return path


@pytest.fixture(scope="module")
def initial(coordinator: Coordinator) -> Arrays:
    return coordinator.ask(coordinator.request("initialise"))[1]


@contextmanager
def told(path: Path, *texts: str) -> Iterator[None]:
    """Within, each of `texts` is written to the log at `path`."""
    before = path.stat().st_size if path.exists() else 0
    yield

    def written() -> bool:
        with path.open("rb") as file:
            file.seek(before)
            new = file.read().decode(errors="replace")
        return all(re.search(text, new) for text in texts)

    wait_for(written, 10, f"{texts} in {path}", path.read_text)


def await_text(path: Path, text: str) -> None:
    wait_for(
        lambda: path.exists() and text in path.read_text(errors="replace"),
        120,
        f"'{text}' in {path}",
    )


def own_log(hospital: Hospital) -> Path:
    return hospital.folder.state / "daemon.log"


def charged(hospital: Hospital, of: Study) -> list[dict[str, Any]]:
    return [line for line in hospital.charges if line["study_hash"] == of.hash]


def front_log(deployment: Deployment) -> Path:
    return deployment.at.logs / "nginx-access.log"


def nodes(deployment: Deployment) -> list[Node]:
    with SuperLink.connected(deployment.at) as superlink:
        return superlink.nodes()


# -- outside ------------------------------------------------------------------------------------


def test_the_ca_file_alone_opens_nothing(deployment: Deployment) -> None:
    """Flower's own programs, with what everybody may have: the CA file and a key they made."""
    folder = deployment.folder / "stranger"
    folder.mkdir(mode=0o777)
    site = deployment.hospitals[MIDWEST].folder
    key, authority = folder / "own.key", shutil.copy(site.relay.authority, folder)
    pki.write_secret(
        key,
        ec.generate_private_key(ec.SECP384R1())
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        .decode(),
    )
    config = deployment.at.config()
    public, inner = f"localhost:{config.port}", f"localhost:{config.superlink_port}"
    trust = ["--root-certificates", authority]
    commands: dict[str, list[str]] = {
        "supernode": [
            *("flower-supernode", "--superlink", public, *trust, "--max-retries", "1"),
            *("--auth-supernode-private-key", str(key), "--host", "127.0.0.1"),
            *("--port", str(free_port())),
        ],
        "superexec": ["flower-superexec", "--runtime-api-address", public, *trust],
        # Even on the coordinator's machine, without the secret.
        "inside": ["flower-superexec", "--runtime-api-address", inner, *trust],
    }
    with (
        told(front_log(deployment), r'site="" serial=\S* "POST /v1/\S+" 403'),
        told(deployment.at.logs / "superlink.log", "SuperExec authentication failed"),
    ):
        started = {
            name: deployment.family.start(
                [program(words[0]), *words[1:]],
                env=environment(folder / name),
                cwd=folder,
                log=folder / f"{name}.log",
            )
            for name, words in commands.items()
        }
        for name in ("supernode", "superexec"):  # Flower's SuperNode lives on, and does nothing
            await_text(folder / f"{name}.log", "403 Forbidden")
        started.pop("supernode").terminate()
        for process in started.values():
            process.wait(60)
    assert len(nodes(deployment)) == len(SITES)

    statuses = {
        asked(deployment, None, path)
        for path in ("/v1/fleet/pull-messages", "/v1/control/list-runs", "/v1/runtime/acquire-task")
    }
    assert statuses <= set(REFUSED)
    control = ControlHttpClient.from_server_address(
        server_address=public,
        insecure=False,
        root_certificates=Path(authority).read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    with pytest.raises(httpx.HTTPStatusError, match=r"403|429"):
        control.ListNodes(ListNodesRequest())
    control.close()
    admitted = [line for line in front_log(deployment).read_text().splitlines() if '" 200 ' in line]
    assert admitted
    assert not [line for line in admitted if 'site=""' in line]


def asked(
    deployment: Deployment, site: SiteFolder | None, path: str, node_key: str | None = None
) -> int:
    """Status of a bare request to the public port, with the certificate and node key of sites."""
    connection = connected(deployment, site)
    try:
        return post(connection, path, node_key)
    finally:
        connection.close()


def connected(deployment: Deployment, site: SiteFolder | None) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(deployment.at.authority))
    if site is not None:
        context.load_cert_chain(site.relay.certificate, site.relay.key)
    port = deployment.at.config().port
    return http.client.HTTPSConnection("localhost", port, context=context, timeout=30)


def post(connection: http.client.HTTPSConnection, path: str, node_key: str | None = None) -> int:
    headers = {"Content-Type": "application/protobuf"}
    if node_key is not None:
        headers["flwr-public-key"] = node_key
    connection.request("POST", path, b"", headers)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def header_of(site: SiteFolder) -> str:
    return node_header(EnrolmentRequest.read(site.request).node_key)


# -- other sites --------------------------------------------------------------------------------


def test_a_site_cannot_connect_as_another(deployment: Deployment) -> None:
    """Two relays, each with its own certificate and the other's stolen node key, or the other way
    round: which is the same two folders."""
    for mine, theirs in ((MIDWEST, SOUTH), (SOUTH, MIDWEST)):
        own, other = (deployment.hospitals[name].folder for name in (mine, theirs))
        assert asked(deployment, own, "/v1/fleet/pull-messages", header_of(other)) in REFUSED
        assert asked(deployment, own, "/v1/fleet/pull-messages", header_of(own)) == 401
    thieves = []
    with told(front_log(deployment), rf'site="{MIDWEST}".* 403', rf'site="{SOUTH}".* 403'):
        for mine, theirs in ((MIDWEST, SOUTH), (SOUTH, MIDWEST)):
            folder = SiteFolder(deployment.folder / f"thief-{mine}")
            shutil.copytree(
                deployment.hospitals[mine].folder.relay.root,
                folder.relay.root,
                ignore=shutil.ignore_patterns("flower", "relay.log*"),
            )
            stolen = deployment.hospitals[theirs].folder.relay.node_key
            shutil.copy(stolen, folder.relay.node_key)
            thief = replace(deployment.hospitals[mine], name=f"thief-{mine}", folder=folder)
            if deployment.separate:
                for path in (folder.root, *folder.root.rglob("*")):
                    shutil.chown(path, RELAY_USER)
            deployment.start_relay(thief)
            thieves.append(thief)
        for thief in thieves:
            await_text(thief.folder.relay.log, "does not admit this site")
            await_text(thief.folder.relay.log, "SuperNode ended")
    for thief in thieves:
        assert thief.relay is not None
        thief.relay.terminate()
        thief.relay.wait(60)
        assert "SuperNode ID" not in thief.folder.relay.log.read_text()
    assert [node.online for node in nodes(deployment)] == [True] * len(SITES)


# -- the relay ----------------------------------------------------------------------------------


def test_a_request_that_is_sent_again_gets_the_same_bytes_for_nothing(
    deployment: Deployment, coordinator: Coordinator, initial: Arrays
) -> None:
    hospital = deployment.hospitals[MIDWEST]
    packed = coordinator.sealed(coordinator.request("train", 1), initial)
    answer, released, first = coordinator.send(packed)
    assert answer.refusal is None
    assert released.keys() == initial.keys()
    before = hospital.ledger
    assert [coordinator.send(packed)[2] for _ in range(3)] == [first] * 3
    assert hospital.ledger == before
    assert len(charged(hospital, coordinator.study)) == 1


def test_a_request_that_is_changed_or_turned_to_another_site_is_refused(
    deployment: Deployment, coordinator: Coordinator, initial: Arrays, tmp_path: Path
) -> None:
    hospital = deployment.hospitals[MIDWEST]
    before = hospital.charges
    stranger = Identity.open(tmp_path / "stranger.key")
    packed = coordinator.sealed(coordinator.request("train", 1), initial)
    envelope = Envelope.unpack(packed)
    other = sha256(b"another study").hexdigest()
    turned = {
        "another round": (b'"round":1', b'"round":2'),
        "another site": (MIDWEST.encode(), SOUTH.encode()),
        "another study": (coordinator.study.hash.encode(), other.encode()),
        "another run": (b'"run":"run"', b'"run":"ran"'),
        "another kind": (b'"kind":"train"', b'"kind":"evaluate"'),
        "another attempt": (b'"attempt":0', b'"attempt":1'),
    }
    with told(own_log(hospital), "signature-invalid", "message-malformed", "site-unknown"):
        for what, (old, new) in turned.items():
            assert envelope.header.count(old) == 1, what
            changed = envelope.model_copy(update={"header": envelope.header.replace(old, new)})
            assert coordinator.send(changed.pack())[0].refusal == "signature-invalid", what
        unsigned = envelope.model_copy(update={"signature": b""})
        assert coordinator.send(unsigned.pack())[0].refusal == "signature-invalid"
        forged = stranger.seal(coordinator.request("train", 2), initial)
        assert coordinator.send(forged.pack())[0].refusal == "signature-invalid"
        moved = {name: array + 1 for name, array in initial.items()}
        other_arrays = envelope.model_copy(update={"arrays": moved})
        assert coordinator.send(other_arrays.pack())[0].refusal == "message-malformed"
        # Signed, but for another hospital than the one whose relay brings it.
        for_south = coordinator.sealed(coordinator.request("train", 1, site=SOUTH), initial)
        assert coordinator.send(for_south)[0].refusal == "site-unknown"
        assert coordinator.refusal(coordinator.request("train", 1, study_hash=other)) == (
            "not-prepared"
        )
    assert hospital.charges == before


def test_whatever_a_relay_says_the_answer_is_harmless(
    deployment: Deployment, coordinator: Coordinator
) -> None:
    hospital = deployment.hospitals[MIDWEST]
    before, path = hospital.ledger, str(hospital.folder.socket)
    random = np.random.default_rng(0)
    huge = save({"a": np.zeros(16 * 2**20, np.float32)})
    promised = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    bomb = struct.pack("<Q", len(promised)) + promised.encode()
    with told(own_log(hospital), "message-malformed", "signature-invalid"):
        for packed in (
            b"",
            b"GET /etc/passwd HTTP/1.1\r\n\r\n",
            f"file://{hospital.shard}/records.parquet".encode(),
            struct.pack(">III", 2**32 - 1, 2**32 - 1, 2**32 - 1),
            struct.pack(">III", 2, 0, len(huge)) + b"{}" + huge,
            struct.pack(">III", 2, 0, len(bomb)) + b"{}" + bomb,
            struct.pack(">III", 60000, 64, 0) + b"[" * 60000 + bytes(64),
            random.bytes(64 * 2**20),
        ):
            answer, released, back = coordinator.send(packed)
            assert answer.refusal in ("message-malformed", "signature-invalid")
            assert (answer.body, released, answer.site) == ({}, {}, "")
            assert len(back) < 1000
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as mad:
        silent.connect(path)  # and never says a word
        mad.connect(path)
        mad.sendall(random.bytes(2**16))
        with grpc.insecure_channel(f"unix:{path}") as channel:
            for method in ("Read", "Shard", "Call/../Status", "Stop"):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(f"/fedward.Site/{method}")(b"", timeout=30)
                assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
            shown = json.loads(channel.unary_unary("/fedward.Site/Status")(b"", timeout=30))
    (status,) = shown
    assert status.keys() == {
        *("site", "phase", "study", "done", "total", "round", "step", "steps"),
        *("epsilon", "refusal"),
    }
    assert hospital.ledger == before
    assert coordinator.refusal(coordinator.request("prepare")) is None, "it still answers"


def test_a_relay_reads_nothing_but_its_own(deployment: Deployment) -> None:
    if not deployment.separate:
        pytest.skip("no other users here")
    hospital = deployment.hospitals[MIDWEST]
    closed = (
        hospital.folder.state,
        hospital.folder.policy_file,
        hospital.folder.state / "site.key",
    )
    for path in closed:
        tried = subprocess.run(
            ["setpriv", "--reuid", RELAY_USER, "--clear-groups", "head", "-c1", path],
            capture_output=True,
        )
        assert b"Permission denied" in tried.stderr


# -- the coordinator ----------------------------------------------------------------------------


def test_a_coordinator_gets_no_more_rounds_than_were_approved_by_whatever_adapter(
    deployment: Deployment, coordinator: Coordinator, initial: Arrays
) -> None:
    hospital, known = deployment.hospitals[MIDWEST], coordinator.study
    unfit = {
        "not finite": {name: np.full_like(a, np.nan) for name, a in initial.items()},
        "infinite": {name: np.full_like(a, np.inf) for name, a in initial.items()},
        "oversized": {name: np.repeat(a, 50, axis=0) for name, a in initial.items()},
        "of another type": {name: a.astype(np.float64) for name, a in initial.items()},
        "with more parts": {**initial, "lm_head.weight": np.zeros((4096, 1024), np.float32)},
        "empty": {},
    }
    with told(own_log(hospital), "refused train 2: adapter-invalid", "budget-exhausted"):
        for what, arrays in unfit.items():
            assert coordinator.refusal(coordinator.request("train", 2), arrays) == (
                "adapter-invalid"
            ), what
        assert len(charged(hospital, known)) == 1, "what is refused is not charged"
        # Made to overflow: it is answered, charged, and what it gives is noise that is finite.
        rounds = iter(range(2, 100))
        for scale in (3e38, -1e30):
            crafted = {name: np.full_like(a, scale) for name, a in initial.items()}
            answer, released = coordinator.ask(coordinator.request("train", next(rounds)), crafted)
            assert answer.refusal is None
            assert all(np.isfinite(array).all() for array in released.values())
        assert known.priced_rounds == len(charged(hospital, known)) == 3
        last = next(rounds)
        for more in (
            coordinator.request("train", last),
            coordinator.request("train", 2, attempt=1),
            coordinator.request("train", 1, run="another"),
        ):
            assert coordinator.refusal(more, initial) == "budget-exhausted"
    assert len(charged(hospital, known)) == known.priced_rounds
    refused = [line["code"] for line in hospital.ledger if line["line"] == "refused"]
    assert refused.count("budget-exhausted") == 3
    assert "VALID" in deployment.fedward("audit", "verify", hospital.folder.state)


def test_refusals_do_not_tell_whether_a_patient_is_there(
    deployment: Deployment, coordinator: Coordinator, initial: Arrays
) -> None:
    """The same questions before and after a patient is taken out of the shard."""
    hospital, known = deployment.hospitals[MIDWEST], coordinator.study
    wider = known.model_copy(update={"description": "another"})
    unfit = {name: np.full_like(a, np.nan) for name, a in initial.items()}
    probes: list[tuple[Request, Arrays | None]] = [
        (coordinator.request("train", 1, run="unprepared"), initial),
        (coordinator.request("prepare"), None),
        (coordinator.request("prepare", of=wider), None),
        (coordinator.request("prepare", study="{}"), None),
        (coordinator.request("prepare", code_hash="0" * 64), None),
        (coordinator.request("initialise", of=wider), None),
        (coordinator.request("train", 9), initial),
        (coordinator.request("train", 1, attempt=1), unfit),
        (coordinator.request("train", 1, site="elsewhere"), initial),
        (coordinator.request("evaluate", 1), unfit),
        (coordinator.request("evaluate", 1, of=wider), initial),
    ]

    def restarted() -> list[tuple[str | None, dict[str, Any]]]:
        assert hospital.daemon is not None
        hospital.daemon.terminate()
        hospital.daemon.wait(60)
        deployment.start_daemon(hospital)
        found = []
        for request, arrays in probes:
            answer, _, _ = coordinator.send(coordinator.sealed(request, arrays))
            # A receipt is the ledger's head, which gains a line of each refusal.
            found.append((answer.refusal, {k: v for k, v in answer.body.items() if k != "receipt"}))
        return found

    def without(patient: str) -> None:
        records = pl.read_parquet(hospital.shard / "records.parquet")
        gone = records.filter(pl.col("patient_id") == patient)["stay_id"].implode()
        for path in hospital.shard.glob("*.parquet"):
            frame = pl.read_parquet(path)
            frame.filter(~pl.col("stay_id").is_in(gone)).write_parquet(path)

    there = restarted()
    without(pl.read_parquet(hospital.shard / "records.parquet")["patient_id"][0])
    assert restarted() == there
    assert [code for code, _ in there] == [
        "not-prepared",
        None,
        "study-unapproved",
        "study-invalid",
        "code-mismatch",
        "not-prepared",
        "budget-exhausted",
        "adapter-invalid",
        "site-unknown",
        "adapter-invalid",
        "not-prepared",
    ]


def test_a_study_that_nobody_approved_does_not_begin(deployment: Deployment) -> None:
    settled = deployment.settled(study("unapproved", federation={"rounds": 1}))
    unapproved = Study.load(settled)
    with told(own_log(deployment.hospitals[SOUTH]), "refused prepare 0: study-unapproved"):
        deployment.submit(settled, "unapproved")
        failed = deployment.run_folder("unapproved") / "failed.json"
        wait_for(failed.exists, 180, "the failure", deployment.story)
    reason = json.loads(failed.read_text())["reason"]
    assert all(f"{site} study-unapproved" in reason for site in SITES)
    for hospital in deployment.hospitals.values():
        assert charged(hospital, unapproved) == []
        refused = [line for line in hospital.ledger if line["line"] == "refused"]
        assert refused[-1]["code"] == "study-unapproved"


def test_other_code_than_the_pinned_bundle_does_not_run(
    deployment: Deployment, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator ships a relay of its own, which would leave a mark; then an honest study."""
    marks = deployment.folder / "marks"
    marks.mkdir()
    marks.chmod(0o777)
    folder = assemble(tmp_path / "bundle")
    app = folder / "client" / "relay" / "app.py"
    mark = f"open({str(marks)!r} + f'/{{os.getpid()}}', 'w').close()"
    app.write_text(f"{app.read_text()}\n{mark}\n")
    subprocess.run([sys.executable, "-c", "import client.relay.app"], cwd=folder, check=True)
    (proof,) = marks.iterdir()
    proof.unlink()  # so the mark is made wherever this code is imported
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    evil = bytes(build_fab_from_disk(folder))
    found = sha256(evil).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(runs.bundle, "packed", lambda: evil)
        runs.submit(deployment.at, honest, run="evil")
    logs = [hospital.folder.relay.log for hospital in deployment.hospitals.values()]

    def refused() -> bool:
        return all(f"sent other code ({found})" in log.read_text() for log in logs)

    wait_for(refused, 120, "the gates' refusals", deployment.story)
    deployment.coordinate("stop", "evil")
    deployment.submit(honest, "honest")
    deployment.await_end("honest")
    assert all(line["sites"] == list(SITES) for line in deployment.lines("honest"))
    assert list(marks.iterdir()) == []
    assert deployment.lines("evil") == []


# -- the end of an admission --------------------------------------------------------------------


def test_a_revoked_site_is_cut_off_and_the_others_go_on(
    deployment: Deployment, honest: Path
) -> None:
    """In the middle of a study, and with a connection that was open before."""
    gone = deployment.hospitals[WEST]
    open_ = connected(deployment, gone.folder)
    path = "/v1/fleet/pull-messages"
    assert post(open_, path, header_of(gone.folder)) == 401, "the front lets it through"
    deployment.submit(honest, "revoked")
    deployment.await_round("revoked", 1)
    before = len(gone.charges)
    with told(front_log(deployment), r'" 40[03] '), told(gone.folder.relay.log, "SuperNode ended"):
        assert "reloaded" in deployment.coordinate("revoke", WEST)
        began = time.monotonic()

        def cut_off() -> bool:
            return asked(deployment, gone.folder, path, header_of(gone.folder)) in REFUSED

        wait_for(cut_off, 30, "the front's new workers")
        assert refuses(lambda: post(open_, path, header_of(gone.folder)))
        assert time.monotonic() - began < 30
        assert len(nodes(deployment)) == len(SITES) - 1
        report = deployment.await_end("revoked")
    assert report["rounds"] == 2
    last = [line for line in deployment.lines("revoked") if line["kind"] == "train"][-1]
    assert sorted(last["sites"]) == [MIDWEST, SOUTH]
    assert last["lost"].keys() == {WEST}
    assert len(gone.charges) <= before + 1
    refusal = deployment.coordinate("submit", honest, "--run-id", "later", fails=True)
    assert f"unknown site '{WEST}'" in refusal


def refuses(attempt: Callable[[], int]) -> bool:
    """By a status, or by closing the connection."""
    try:
        return attempt() in REFUSED
    except (OSError, http.client.HTTPException):
        return True

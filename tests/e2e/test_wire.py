"""Every byte that a relay sends in a whole private study, and everything that is written outside
the hospital: typed fields of known names, and no trace of what stands in the shard."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import polars as pl
import pytest
from flwr.app import Message as FlowerMessage
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    validate_object_content,
)
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from google.protobuf.message import Message

from common.envelope import MESSAGE_TYPES, error_code, from_record, to_record
from common.identity import open_envelope
from common.messages import Answer, Arrays, Envelope, Request
from common.study import Study
from deploy.enrolment import EnrolmentRequest
from tests.e2e import recording
from tests.e2e.conftest import REGIONS, SITES, study
from tests.e2e.deployment import Deployment, Hospital, deployed, wait_for

RECORDED = SITES[0]  # the first one is also asked for the initial adapter
ROUNDS = 2
STEM = "canaryq7"
CANARIES = {
    part: f"{STEM}-{part}"
    for part in ("patient", "stay", "record", "note", "category", "file", "shard", "source")
}
BODIES = {
    "roster": {"sites", "version", "code_hash"},
    "prepare": {
        *("ready", "spec", "encoders", "slm", "simulated", "public_key", "receipt"),
    },
    "initialise": set(),
    "train": {"steps", "epsilon", "rounds_charged", "receipt"},
    "evaluate": {"release", "epsilon", "rounds_charged", "receipt"},
}
HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "user-agent"),
    *("content-type", "content-length", "transfer-encoding"),
    *("flwr-public-key", "flwr-timestamp", "flwr-signature"),
    *("flwr-package-name", "flwr-package-version", "flwr-component-name"),
}


# -- the search ---------------------------------------------------------------------------------


def forms(text: str) -> Iterator[bytes]:
    """Bytes by which `text` shows: encoded, in hex, and in base64 at any place of a longer text."""
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        raw = text.encode(encoding)
        yield raw
        yield raw.hex().encode()
        for lead in range(3):
            whole = base64.b64encode(bytes(lead) + raw)
            # Characters that share no bits with what stands before and after.
            core = whole[-(-lead * 8 // 6) : (lead + len(raw)) * 8 // 6]
            yield core
            yield core.translate(bytes.maketrans(b"+/", b"-_"))


_PACKED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08|PK\x03\x04")


def layers(data: bytes, depth: int = 3) -> Iterator[bytes]:
    """The bytes, and what is packed into them anywhere by zlib, gzip or zip."""
    yield data
    if not depth:
        return
    for found in _PACKED.finditer(data):
        start, window = found.start(), 47
        if found[0][:2] == b"PK":
            sizes = (data[start + at : start + at + 2] for at in (26, 28))  # of name and extra
            name, extra = (int.from_bytes(size, "little") for size in sizes)
            start, window = start + 30 + name + extra, -15
        try:
            inner = zlib.decompressobj(window).decompress(memoryview(data)[start:], 2**27)
        except zlib.error:
            continue  # these bytes stand there by chance
        if inner:
            yield from layers(inner, depth - 1)


CANARY = tuple(dict.fromkeys(forms(STEM)))


def shows(data: bytes, sought: tuple[bytes, ...] = CANARY) -> bool:
    """Whether a canary stands in `data`, in whatever case and packing."""
    return any(
        shape in text
        for layer in layers(data)
        for text in (layer, layer.lower())
        for shape in sought
    )


def _zipped(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.bin", data)
    return target.getvalue()


@pytest.mark.parametrize(
    "hidden",
    [
        lambda b: b,
        lambda b: b.upper(),
        lambda b: b.decode().encode("utf-16"),
        lambda b: b.hex().upper().encode(),
        base64.b64encode,
        lambda b: base64.urlsafe_b64encode(b"xy" + b),
        lambda b: base64.b64encode(b"x" + b.decode().encode("utf-16-be") + b"more"),
        zlib.compress,
        _zipped,
        lambda b: _zipped(zlib.compress(base64.b64encode(b))),
        gzip.compress,
    ],
)
def test_the_search_finds_what_is_hidden(hidden: Any) -> None:
    before, after = (bytes(np.random.default_rng(s).bytes(4000)) for s in (1, 2))
    text = f"patient {CANARIES['patient']} was here".encode()
    assert shows(before + hidden(text) + after)
    assert not shows(before + hidden(b"nobody was here") + after)


# -- what was recorded --------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One call of the SuperNode through the gate."""

    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    status: int | None
    request: bytes
    answer: bytes


@dataclass
class Traffic:
    """What a relay's recorder kept, taken apart.

    Attributes:
        pushed: Contents of the objects that the relay sent, by their hash.
        pulled: Likewise of those that it received.
    """

    exchanges: list[Exchange]
    pushed: dict[str, bytes] = field(default_factory=dict)
    pulled: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Traffic:
        exchanges = []
        for path in sorted(folder.glob("*.json")):
            head = json.loads(path.read_text())
            exchanges.append(
                Exchange(
                    head["path"],
                    head["query"],
                    tuple((n, v) for n, v in head["headers"]),
                    head.get("status"),
                    path.with_suffix(".request").read_bytes(),
                    path.with_suffix(".answer").read_bytes(),
                )
            )
        made = cls(exchanges)
        for exchange in exchanges:
            if exchange.path.endswith("/push-object"):
                content = PushObjectRequest.FromString(exchange.request).object_content
                made.pushed[get_object_id(content)] = content
            if exchange.path.endswith("/pull-object") and exchange.status == 200:
                content = PullObjectResponse.FromString(exchange.answer).object_content
                made.pulled[get_object_id(content)] = content
        return made

    def trees(self) -> list[ObjectTree]:
        """Of the messages that were sent."""
        calls = [e for e in self.exchanges if e.path.endswith("/push-messages")]
        return [
            tree
            for call in calls
            for tree in PushMessagesRequest.FromString(call.request).message_object_trees
        ]

    def sent(self) -> list[FlowerMessage]:
        return [self._whole(tree.object_id) for tree in self.trees()]

    @cached_property
    def requests(self) -> dict[str, tuple[Request, Arrays]]:
        """The coordinator's requests by the digest that answers name."""
        found = {}
        for call in self.exchanges:
            if not call.path.endswith("/pull-messages") or call.status != 200:
                continue
            for tree in PullMessagesResponse.FromString(call.answer).message_object_trees:
                envelope = from_record(self._whole(tree.object_id).content)
                request = Request.model_validate_json(envelope.header)
                found[sha256(envelope.header).hexdigest()] = (request, envelope.arrays)
        return found

    def _whole(self, identifier: str) -> FlowerMessage:
        # An array that the coordinator has already is named by its hash and not sent again.
        contents = {**self.pulled, **self.pushed}
        message = inflate_object_from_contents(identifier, contents)
        assert isinstance(message, FlowerMessage)
        return message

    def codes(self) -> list[str]:
        """Those of the relay itself."""
        return [code for message in self.sent() if (code := error_code(message))]

    def answers(self, public_key: str) -> list[tuple[Request, Answer, Envelope, Arrays]]:
        """The daemon's answers, each with its request and the arrays of that."""
        found = []
        for message in self.sent():
            if error_code(message):
                continue
            envelope = from_record(message.content)
            # By its hash: records of these names, and nothing between and behind the arrays.
            assert to_record(envelope).object_id == message.content.object_id
            answer = open_envelope(envelope, Answer, [public_key])
            request, arrays = self.requests[answer.request_digest]
            found.append((request, answer, envelope, arrays))
        return found


@dataclass(frozen=True)
class Observed:
    """A deployment after a whole study, and after one that met a broken shard."""

    deployment: Deployment
    hospital: Hospital
    settled: Study
    whole: Traffic
    broken: Traffic


@pytest.fixture(scope="module")
def observed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Observed]:
    if not REGIONS.is_dir():
        pytest.skip(f"{REGIONS} is not here")
    shards = {name: REGIONS / name for name in SITES}
    shards[RECORDED] = planted(REGIONS / RECORDED, tmp_path_factory.mktemp("shard") / RECORDED)
    with deployed(shards) as made:
        hospital = made.hospitals[RECORDED]
        _end(hospital.relay)
        made.start_relay(hospital, command=[sys.executable, recording.__file__])
        settled = made.settled(study("wire", federation={"rounds": ROUNDS, "quorum": 1.0}))
        later = made.settled(study("broken", federation={"rounds": 1, "quorum": 0.5}))
        made.approve(settled)
        made.approve(later)
        made.submit(settled, "wire")
        made.await_end("wire")
        recorded = hospital.folder.relay.root / "recorded"
        whole = Traffic.read(recorded)

        _end(hospital.daemon)
        name_a_canary_in_an_error(hospital.shard)
        made.submit(later, "broken")
        # Without a daemon the relay has only its own code to send; with it, the daemon has one.
        wait_for(lambda: _sent(recorded, b"daemon-unreachable"), 120, "a code", made.story)
        made.start_daemon(hospital)
        made.await_end("broken")
        yield Observed(made, hospital, Study.load(settled), whole, Traffic.read(recorded))


def _sent(recorded: Path, what: bytes) -> bool:
    return any(what in content for content in Traffic.read(recorded).pushed.values())


def _end(process: Any) -> None:
    process.terminate()
    process.wait(60)


def planted(source: Path, target: Path) -> Path:
    """A copy of a shard in which every identifier and every text holds a canary."""
    copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    target.chmod(0o755)

    def marked(column: str, canary: str) -> pl.Expr:
        return (pl.lit(f"{CANARIES[canary]}-") + pl.col(column)).alias(column)

    for table in ("records", "events", "notes"):
        frame = pl.read_parquet(source / f"{table}.parquet").with_columns(marked("stay_id", "stay"))
        if table == "records":
            frame = frame.with_columns(
                marked("record_id", "record"), marked("patient_id", "patient")
            )
            stay = frame["stay_id"][0]
        if table == "notes":
            frame = frame.with_columns(marked("text", "note"), marked("category", "category"))
        frame.write_parquet(target / f"{table}.parquet")
    pl.DataFrame(
        {"stay_id": [stay], "hours": [1.0], "path": [f"{CANARIES['file']}.png"], "view": ["PA"]}
    ).write_parquet(target / "images.parquet")
    (target / f"{CANARIES['file']}.png").write_bytes(b"no study asks for it")
    described = (target / "shard.toml").read_text()
    (target / "shard.toml").write_text(
        re.sub(r'^(name|description) = "', rf"\g<0>{CANARIES['shard']} ", described, flags=re.M)
    )
    return target


def name_a_canary_in_an_error(shard: Path) -> None:
    """The shard becomes one whose reader complains, and quotes the cell that is wrong."""
    path = shard / "events.parquet"
    frame = pl.read_parquet(path)
    wrong = pl.when(pl.int_range(pl.len()) == 3).then(pl.lit(CANARIES["source"]))
    frame.with_columns(wrong.otherwise(pl.col("source")).alias("source")).write_parquet(path)


# -- the wire -----------------------------------------------------------------------------------


def test_the_whole_study_was_recorded(observed: Observed) -> None:
    answers = observed.whole.answers(public_key(observed.hospital))
    kinds = Counter(request.kind for request, *_ in answers)
    settled = observed.settled
    assert kinds["train"] == ROUNDS
    assert kinds["evaluate"] == settled.evaluation.releases
    assert kinds["prepare"] == kinds["initialise"] == 1
    assert kinds["roster"] >= 1
    charged = [c for c in observed.hospital.charges if c["study_hash"] == settled.hash]
    assert len(charged) == ROUNDS + settled.evaluation.releases


def test_no_canary_is_on_the_wire(observed: Observed) -> None:
    sought = (*CANARY, *forms(str(observed.hospital.shard)))
    for exchange in observed.broken.exchanges:
        head = json.dumps([exchange.path, exchange.query, exchange.headers]).encode()
        for part in (head, exchange.request, exchange.answer):
            assert not shows(part, sought), exchange.path
    # A canary may be cut in two by Flower's pieces of 5 MB: messages as they are put together.
    for message in observed.broken.sent():
        if not error_code(message):
            assert not shows(from_record(message.content).pack(), sought)


def test_no_canary_is_written_outside_the_hospital(observed: Observed) -> None:
    """Coordinator (runs, database, logs), relays (logs, Flower's folder), public documents."""
    root = observed.deployment.folder
    inside = [root / "shards", *(root / name / "state" for name in SITES)]
    read: Counter[str] = Counter()
    for path in root.rglob("*"):
        if not path.is_file() or any(folder in path.parents for folder in inside):
            continue
        if path.name.endswith("-daemon.log") or "recorded" in path.parts:
            continue
        assert not shows(path.read_bytes() + str(path).encode()), path
        read[path.name] += 1
    for name in ("rounds.jsonl", "report.json", "superlink.log", "superexec.log", "relay.log"):
        assert read[name], name
    assert read["rounds.jsonl"] == 2
    assert read["superlink.sqlite"] == 1
    assert read[f"{RECORDED}-relay.log"] == 1


def test_all_that_the_relay_sends_is_flowers_typed_messages(observed: Observed) -> None:
    """Flower's fields only, and of objects only those that its messages are made of."""
    traffic = observed.broken
    for exchange in traffic.exchanges:
        assert exchange.query == ""
        assert {name for name, _ in exchange.headers} - HEADERS == set()
        assert_exact(PROTOBUF_REQUEST_TYPES["POST", exchange.path](), exchange.request)
    for content in traffic.pushed.values():
        validate_object_content(content)
    named = {node.object_id for tree in traffic.trees() for node in iterate_object_tree(tree)}
    assert traffic.pushed.keys() <= named, "an object that is no part of a message"
    for message in traffic.sent():
        assert not message.has_error(), "Flower would send an exception's text"
        assert message.metadata.message_type in MESSAGE_TYPES.values()
        assert message.metadata.group_id == ""
        if error_code(message) is None:
            continue
        assert message.content.keys() == {"error"}
        assert message.content["error"].keys() == {"code"}


def assert_exact(message: Message, body: bytes) -> None:
    """`body` is a message of this type, and no byte of it lies outside the known fields."""
    message.ParseFromString(body)
    message.DiscardUnknownFields()  # type: ignore[attr-defined]
    assert message.ByteSize() == len(body), type(message).__name__


def test_answers_hold_the_known_fields_and_arrays(observed: Observed) -> None:
    settled = observed.settled
    histograms = (len(settled.tasks), 2, settled.evaluation.bins)
    answers = observed.whole.answers(public_key(observed.hospital))
    adapter = next(given for request, *_, given in answers if request.kind == "train")
    expected: dict[str, dict[str, tuple[Any, ...]]] = {
        "train": _shapes(adapter),
        "initialise": _shapes(adapter),
        "evaluate": {"histograms": (np.dtype(np.float64), histograms)},
    }
    for request, answer, envelope, _ in answers:
        assert answer.canonical() == envelope.header, "nothing between the fields"
        assert len(envelope.signature) == 64
        assert answer.refusal is None
        assert answer.body.keys() == BODIES[request.kind]
        assert _shapes(envelope.arrays) == expected.get(request.kind, {})


def _shapes(arrays: Arrays) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def test_trouble_leaves_as_a_code_and_nothing_else(observed: Observed) -> None:
    """The hospital's own log has the story, with the canary; outside there is one word."""
    story = (observed.hospital.folder.state / "daemon.log").read_text()
    assert f"source is '{CANARIES['source']}'" in story
    assert set(observed.broken.codes()) == {"daemon-unreachable"}
    refused = [
        (request.kind, answer.refusal, answer.body, answer.arrays_digest, envelope.arrays)
        for request, answer, envelope, _ in observed.broken.answers(public_key(observed.hospital))
        if answer.refusal
    ]
    assert refused == [("prepare", "data-problem", {}, "", {})]
    lines = observed.deployment.lines("broken")
    assert all(RECORDED not in line["sites"] for line in lines)
    report = json.loads((observed.deployment.run_folder("broken") / "report.json").read_text())
    assert "data-problem" in json.dumps(report)


def public_key(hospital: Hospital) -> str:
    return EnrolmentRequest.read(hospital.folder.request).identity

"""Sites that sign whatever they like: left out with a code, and the run goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.envelope import error_code, error_record, from_record
from common.identity import Identity, open_envelope
from common.messages import Answer, Envelope, Request, roster_proof
from common.roster import Roster
from server import publish, report

Change = Callable[[dict[str, Any], dict[str, Any]], None]


def lines(world: Any) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (world.folder / "out" / "rounds.jsonl").read_text().splitlines()]


def misbehaving(world: Any, kind: str, change: Change, site: str = "alpha") -> None:
    """The site's own answers to `kind`, changed before they are signed."""
    act = world.sites._act

    def changed(request: Request, arrays: Any) -> Any:
        body, out = act(request, arrays)
        if (request.kind, request.site) == (kind, site):
            change(body, out)
        return body, out

    world.sites._act = changed


@pytest.mark.parametrize(
    "body",
    [
        {"steps": "many"},
        {"steps": -1},
        {"steps": None},
        {"epsilon": 5},
        {"epsilon": "abc"},
        {"epsilon": {"train": "low"}},
        {"epsilon": {"train": -1.0}},
        {"epsilon": {"<script>": 1.0}},
    ],
    ids=str,
)
def test_figures_that_are_none_leave_the_site_out(world: Any, body: dict[str, Any]) -> None:
    misbehaving(world, "train", lambda said, _: said.update(body))
    finished = world.federation().run()
    rows = [r for r in lines(world) if r["kind"] == "train"]
    assert all(r["refused"] == {"alpha": "answer-invalid"} for r in rows)
    assert all(r["sites"] == ["beta", "gamma", "delta"] for r in rows)
    assert "alpha" not in finished.progress.steps


@pytest.mark.parametrize(
    "histograms",
    [
        np.full((1, 2, 16), np.nan),
        np.zeros((1, 2, 15)),
        np.zeros((1, 2, 16), dtype=np.complex64),
        np.zeros((1, 2, 16), dtype=np.bool_),
    ],
    ids=["nan", "shape", "complex", "truth"],
)
def test_histograms_that_are_none_leave_the_site_out(world: Any, histograms: Any) -> None:
    misbehaving(world, "evaluate", lambda _, out: out.update(histograms=histograms))
    # Nor did it ever train.
    misbehaving(world, "train", lambda _, out: out.clear())
    finished = world.federation().run()
    evaluation = lines(world)[-1]
    assert evaluation["refused"] == {"alpha": "answer-invalid"}
    assert evaluation["sites"] == ["beta", "gamma", "delta"]
    assert finished.progress.left_out == {"alpha": {"adapter-invalid": 4, "answer-invalid": 1}}


@pytest.mark.parametrize("damage", ["absent", "text", "no numbers"])
def test_a_site_that_describes_nothing_is_not_ready(world: Any, damage: str) -> None:
    def change(body: dict[str, Any], _: Any) -> None:
        if damage == "absent":
            del body["spec"]
        elif damage == "text":
            body["spec"] = "an adapter"
        else:
            body["spec"] = {**body["spec"], "trainable_parameters": "many"}

    misbehaving(world, "prepare", change)
    assert world.federation().run().progress.refused == {"alpha": "answer-invalid"}


def test_what_is_published_is_described_as_most_sites_do(world: Any) -> None:
    def lie(body: dict[str, Any], _: Any) -> None:
        body["spec"] = {**body["spec"], "trainable_parameters": 7, "slm": {}, "dims": {}}
        body["encoders"] = {"age": "of our own"}

    misbehaving(world, "prepare", lie)
    finished = world.federation().run()
    described = report.build(finished)
    publish.write(world.folder / "out", finished.study, finished.adapter, finished.spec, described)
    assert described.trainable_parameters == 14
    assert described.encoders == {"age": "demographics"}


@pytest.mark.parametrize(
    "lie",
    [
        {"slm": {}},
        {"slm": {"name": "nano"}},
        {"slm": {"name": "nano", "sha256": "00", "parameters": "many"}},
        {"slm": {"name": "nano\ud800", "sha256": "00"}},
        {"slm": {"name": "nano\n# A heading", "sha256": "00"}},
        {"dims": {}},
    ],
    ids=ascii,
)
def test_what_cannot_be_published_is_not_ready(world: Any, lie: dict[str, Any]) -> None:
    """Where no two sites agree the first one is believed, and the study ended unpublished."""
    act = world.sites._act

    def changed(request: Request, arrays: Any) -> Any:
        body, out = act(request, arrays)
        if request.kind == "prepare":
            said = lie if request.site == "alpha" else {"bytes": request.site}
            body["spec"] = {**body["spec"], **said}
        return body, out

    world.sites._act = changed
    finished = world.federation().run()
    assert finished.progress.refused == {"alpha": "answer-invalid"}
    described = report.build(finished)
    publish.write(world.folder / "out", finished.study, finished.adapter, finished.spec, described)


@pytest.mark.parametrize("damage", ["shape", "more", "nan"])
def test_an_initial_adapter_that_does_not_fit_is_another_sites(world: Any, damage: str) -> None:
    def change(_: dict[str, Any], out: dict[str, Any]) -> None:
        if damage == "shape":
            out["bias"] = np.ones(3, np.float32)
        elif damage == "more":
            out["more"] = np.ones(10**6, np.float32)
        else:
            out["bias"][0] = np.nan

    misbehaving(world, "initialise", change)
    assert world.federation().run().adapter["bias"].shape == (2,)
    assert [c[1] for c in world.sites.calls if c[0] == "initialise"] == ["alpha", "beta"]


@pytest.mark.parametrize("proof", ["", "ab" * 64, "no hex", 5, None])
def test_a_node_cannot_say_that_it_hosts_another_ones_site(world: Any, proof: Any) -> None:
    """Else it could let another hospital's rounds lapse."""
    act = world.sites._act

    def claims(request: Request, arrays: Any) -> Any:
        body, out = act(request, arrays)
        if request.kind == "roster":
            body["sites"][1]["proof"] = proof
        return body, out

    world.sites._act = claims
    exchange = world.federation().exchange
    exchange.discover(seconds=5)
    assert "beta" not in exchange.hosts
    assert ("alpha" in exchange.hosts) == (proof in ("", "ab" * 64))  # the others, malformed


@pytest.mark.parametrize("code", ["On strike!", "a\nround 9: 4 of 4 sites", "x" * 65, ""])
def test_a_code_that_has_not_the_form_of_one_is_no_answer(world: Any, code: str) -> None:
    call, key = world.sites.__call__, world.sites.keys["alpha"]

    def sites(packed: bytes) -> bytes:
        request = Request.model_validate_json(Envelope.unpack(packed).header)
        if (request.kind, request.site) != ("train", "alpha"):
            return call(packed)
        answer = Answer(site="alpha", request_digest=request.digest)
        return key.seal(answer.model_copy(update={"refusal": code})).pack()

    world.grid.sites = sites
    world.federation().run()
    rows = [r for r in lines(world) if r["kind"] == "train"]
    assert all(r["lost"] == {"alpha": "answer-invalid"} for r in rows)


def test_a_code_of_its_own_is_shown_as_it_is(world: Any) -> None:
    world.sites.behave = lambda r: "on-holiday" if (r.kind, r.site) == ("train", "alpha") else None
    finished = world.federation().run()
    assert lines(world)[0]["refused"] == {"alpha": "on-holiday"}
    site = next(s for s in report.build(finished).sites if s.name == "alpha")
    assert site.left_out == {"on-holiday": 4}


def test_an_answer_that_cannot_be_believed_is_asked_for_once_more_at_each_node(
    world: Any, tmp_path: Any
) -> None:
    """Not until the deadline: every time costs the site the transfer of an adapter."""
    federation = world.federation()
    federation.exchange.discover(seconds=5)
    world.sites.keys["gamma"] = Identity.open(tmp_path / "thief.key")
    began, pushed = world.clock.now, len(world.grid.pushed)
    world.grid.fate = lambda node, e: 900.0 if b'"site":"delta"' in e.header else None
    outcome = federation.exchange.ask("prepare", ["gamma", "delta"], seconds=1000)
    assert outcome.lost == {"gamma": "answer-invalid"}
    assert set(outcome.answers) == {"delta"}
    assert len(world.grid.pushed) - pushed == 2 * len(world.grid.nodes) + 1
    assert world.clock.now - began >= 900


def test_a_header_that_is_nested_without_end_is_malformed(tmp_path: Any) -> None:
    key = Identity.open(tmp_path / "a.key")
    header = b"[" * 200_000
    with pytest.raises(Exception, match="does not parse"):
        open_envelope(Envelope(header=header, signature=key.sign(header)), Answer, [key.public])


def npy(shape: str) -> bytes:
    """A few bytes that say they are an array of that shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    return buffer.getvalue()


def stored(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(content, dtype=np.uint8))
    return buffer.getvalue()


_LONG = b'{"a":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000000000000000]}}'


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"PK\x03\x04", npy("(10**15,)"), npy(f"({10**15},)"), zipped()),
        *(stored(b""), stored(b"\xff" * 64), stored(len(_LONG).to_bytes(8, "little") + _LONG)),
    ],
    ids=[
        *("empty", "half a zip", "a shape that is none", "a petabyte", "an archive"),
        *("no safetensors", "a header without end", "a petabyte of safetensors"),
    ],
)
def test_bytes_that_are_no_array_are_no_envelope(data: bytes) -> None:
    record = RecordDict(
        {
            "envelope": ConfigRecord({"header": b"{}", "signature": b""}),
            "arrays": ArrayRecord({"arrays": Array("|u1", (2,), "numpy.ndarray", data)}),
        }
    )
    with pytest.raises(ValueError, match="does not hold an envelope"):
        from_record(record)


@pytest.mark.parametrize("code", ["x" * 10**6, "a\nb", "", "No"])
def test_a_code_of_the_relay_is_a_code(code: str, world: Any) -> None:
    asked = Message(RecordDict(), dst_node_id=1, message_type="query")
    asked.metadata.__dict__["_message_id"] = "m"
    assert error_code(Message(error_record(code), reply_to=asked)) == "relay-failed"
    assert error_code(Message(error_record("daemon-late"), reply_to=asked)) == "daemon-late"
    no_text = RecordDict({"error": ConfigRecord({"code": [1, 2]})})
    assert error_code(Message(no_text, reply_to=asked)) == "relay-failed"
    no_record = RecordDict({"error": ArrayRecord([np.zeros(2)])})
    assert error_code(Message(no_record, reply_to=asked)) == "relay-failed"


def test_no_roster_request_can_have_a_site_sign_the_hospitals_roster(tmp_path: Path) -> None:
    identity = Identity.open(tmp_path / "site.key")
    statement = Roster(name="f", sites={"a": identity.public}).statement()
    assert not statement.startswith(roster_proof(""))
    assert not roster_proof("").startswith(statement.partition(b"\0")[0] + b"\0")

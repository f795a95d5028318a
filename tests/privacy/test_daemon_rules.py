"""Rule 7 (charge first, then act, never refund) and rule 9 (only the daemon touches data)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from client.site.daemon import guard as guard_module
from client.site.daemon import work as work_module
from client.site.daemon.answers import Answers
from client.site.training.entropy import Entropy
from common.errors import EncoderError
from common.identity import Identity, open_envelope
from common.messages import Answer, Envelope
from common.privacy.policy import SENTENCE


@pytest.fixture
def hospital(ward: ModuleType, tmp_path: Path) -> Any:
    return ward.Ward(tmp_path)


@pytest.fixture(scope="session")
def study(ward: ModuleType) -> Any:
    return ward.make_study()


class PowerCut(BaseException):
    """Ends the process where it stands: no handler of the daemon sees it."""


# -- rule 7 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_charge_is_durable_before_a_patient_is_touched(
    hospital: Any, study: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = hospital.prepared(study)
    seen: list[int] = []
    work = work_module.TrainingRound if kind == "train" else work_module.Evaluation
    real = work.run

    def run(self: Any) -> Any:
        seen.append(len(hospital.charges()))
        return real(self)

    monkeypatch.setattr(work, "run", run)
    answer, arrays = hospital.ask(hospital.request(kind, study, 1), initial)
    assert answer.refusal is None
    assert arrays
    assert seen == [1]


@pytest.mark.parametrize("cut", ["in the work", "before the answer is stored"])
def test_a_crash_after_the_charge_leaves_it_spent(
    hospital: Any, study: Any, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = hospital.prepared(study)
    request = hospital.request("train", study, 1)

    def crash(*_: Any) -> Any:
        raise PowerCut

    where: Any = (work_module.TrainingRound, "run") if cut == "in the work" else (Answers, "write")
    with monkeypatch.context() as patch:
        patch.setattr(*where, crash)
        with pytest.raises(PowerCut):
            hospital.send(request, initial)
    hospital.restart()
    assert len(hospital.charges()) == 1
    assert hospital.hospitals["a"].ledger.book.epsilon(1e-3)["train"] > 0

    hospital.prepared(study)
    answer, arrays = hospital.ask(request, initial)
    assert (answer.refusal, arrays) == ("answer-lost", {}), "fresh noise is not free"
    assert len(hospital.charges()) == 1
    answer, arrays = hospital.ask(hospital.request("train", study, 1, attempt=1), initial)
    assert answer.refusal is None
    assert arrays
    assert len(hospital.charges()) == 2


def test_the_same_request_gets_the_same_bytes_and_is_charged_once(
    hospital: Any, study: Any
) -> None:
    initial = hospital.prepared(study)
    request = hospital.request("train", study, 1)
    first = hospital.send(request, initial)
    assert hospital.send(request, initial) == first
    hospital.restart()
    assert hospital.send(request, initial) == first, "also after a restart, unprepared"
    assert len(hospital.charges()) == 1


def test_another_request_for_a_charged_round_needs_a_higher_attempt(
    hospital: Any, study: Any
) -> None:
    initial = hospital.prepared(study)
    hospital.ask(hospital.request("train", study, 1), initial)
    moved = {name: array + 1 for name, array in initial.items()}
    for arrays in (initial, moved):
        answer, released = hospital.ask(hospital.request("train", study, 1), arrays)
        assert (answer.refusal, released) == ("request-changed", {})
    assert len(hospital.charges()) == 1
    answer, _ = hospital.ask(hospital.request("train", study, 1, attempt=1), moved)
    assert answer.refusal is None
    assert len(hospital.charges()) == 2


def test_spare_rounds_serve_and_nothing_goes_beyond_them(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    hospital = ward.Ward(tmp_path, simulated=False)
    hospital.approve(study)
    initial = hospital.prepared(study)
    assert (study.federation.rounds, study.priced_rounds) == (2, 3)
    for number in (1, 2, 3):
        answer, _ = hospital.ask(hospital.request("train", study, number), initial)
        assert answer.refusal is None
        assert answer.body["rounds_charged"] == number
    hospital.restart()
    hospital.prepared(study)
    for request in (
        hospital.request("train", study, 4),
        hospital.request("train", study, 3, attempt=1),
        hospital.request("train", study, 1, run="another"),
    ):
        answer, released = hospital.ask(request, initial)
        assert (answer.refusal, released) == ("budget-exhausted", {})
    assert hospital.ask(hospital.request("evaluate", study, 1), initial)[0].refusal is None
    answer, _ = hospital.ask(hospital.request("evaluate", study, 2), initial)
    assert answer.refusal == "budget-exhausted"
    spent = hospital.hospitals["a"].ledger.book.epsilon(study.privacy.delta)
    assert 0.9 * study.privacy.epsilon < spent["train"] <= study.privacy.epsilon
    refused = [line for line in hospital.ledger_lines() if line["line"] == "refused"]
    assert [line["code"] for line in refused] == ["budget-exhausted"] * 4


def test_the_answer_states_the_price_of_the_ledger(hospital: Any, study: Any) -> None:
    initial = hospital.prepared(study)
    answer, _ = hospital.ask(hospital.request("train", study, 1), initial)
    spent = hospital.hospitals["a"].ledger.book.epsilon(study.privacy.delta, study.hash)
    assert answer.body["epsilon"] == spent
    assert spent["train"] > 0 == spent["validation"]
    assert answer.body["steps"] == study.training.steps_per_round
    (charge,) = hospital.charges()
    assert charge["event"]["steps"] == study.training.steps_per_round
    assert charge["event"]["noise_multiplier"] == study.privacy.noise_multiplier
    assert hospital.ledger_lines()[0]["entropy"] == "os", "also in a simulation"


def test_two_runs_of_one_seed_share_neither_noise_nor_participation(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    released = []
    for name in ("one", "two"):
        world = ward.Ward(tmp_path / name)
        initial = world.prepared(study)
        released.append(world.ask(world.request("train", study, 1), initial)[1])
    for name, array in released[0].items():
        assert not np.array_equal(array, released[1][name])


def test_seeded_entropy_never_serves_a_private_study(
    hospital: Any, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded(*_: Any) -> Entropy:
        raise AssertionError("seeded")

    monkeypatch.setattr(Entropy, "seeded", seeded)
    initial = hospital.prepared(study)
    for kind in ("train", "evaluate"):
        assert hospital.ask(hospital.request(kind, study, 1), initial)[0].refusal is None


# -- rule 9 ---------------------------------------------------------------------------------


def test_unsigned_foreign_and_altered_requests_are_refused(
    hospital: Any, study: Any, tmp_path: Path
) -> None:
    initial = hospital.prepared(study)
    stranger = Identity.open(tmp_path / "stranger.key")
    request = hospital.request("train", study, 1)
    assert hospital.ask(request, initial, identity=stranger)[0].refusal == "signature-invalid"

    sealed = hospital.coordinator.seal(request, initial)
    altered = {
        "header": sealed.header.replace(b'"round":1', b'"round":2'),
        "signature": bytes(64),
        "arrays": {name: array + 1 for name, array in initial.items()},
    }
    expected = ["signature-invalid", "signature-invalid", "message-malformed"]
    for (part, value), code in zip(altered.items(), expected, strict=True):
        packed = sealed.model_copy(update={part: value}).pack()
        assert _refusal(hospital, packed) == code
    for packed in (b"", b"nonsense", sealed.pack()[:-1], sealed.pack()[:40] + b"\xff" * 400):
        assert _refusal(hospital, packed) in ("message-malformed", "signature-invalid")
    assert hospital.charges() == []


@pytest.mark.parametrize(
    ("where", "patched"),
    [
        ("training", lambda: (work_module.Trainer, "run")),
        ("evaluation", lambda: (work_module, "score_histograms")),
        ("encoding", lambda: (sys.modules["client.site.daemon.hospital"], "encode_site")),
        ("guard", lambda: (guard_module, "ready")),
    ],
)
@pytest.mark.parametrize("error", [ValueError, EncoderError])
def test_what_an_exception_says_of_a_patient_never_leaves(
    ward: ModuleType,
    hospital: Any,
    study: Any,
    where: str,
    patched: Callable[[], tuple[Any, str]],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error(f"record of {ward.SECRET} in /data/{ward.SECRET}.parquet")

    initial = {} if where == "encoding" else hospital.prepared(study)
    monkeypatch.setattr(*patched(), fail)
    kind = {"encoding": "prepare", "evaluation": "evaluate"}.get(where, "train")
    packed = hospital.send(hospital.request(kind, study, 0 if kind == "prepare" else 1), initial)
    assert ward.SECRET.encode() not in packed
    assert b"Traceback" not in packed
    envelope = Envelope.unpack(packed)
    code = "internal" if where == "guard" and error is not EncoderError else "data-problem"
    assert f'"refusal":"{code}"'.encode() in envelope.header
    assert envelope.arrays == {}
    assert ward.SECRET in hospital.log(), "the hospital has the full story"
    assert ward.SECRET not in str(hospital.guard.status())
    assert ward.SECRET not in str(hospital.ledger_lines())


def test_without_privacy_only_if_the_policy_says_so(ward: ModuleType, tmp_path: Path) -> None:
    open_study = ward.make_study(private=False)
    strict = ward.Ward(tmp_path / "strict")
    answer, _ = strict.ask(strict.request("prepare", open_study))
    assert answer.refusal == "mode-forbidden"
    assert strict.ask(strict.request("train", open_study, 1))[0].refusal == "not-prepared"

    lenient = ward.Ward(tmp_path / "lenient", without_privacy=SENTENCE)
    initial = lenient.prepared(open_study)
    answer, _ = lenient.ask(lenient.request("train", open_study, 1), initial)
    assert answer.body["epsilon"] == {"train": None, "validation": 0.0}
    assert lenient.charges()[0]["event"]["kind"] == "unprotected"
    lenient.restart()
    assert lenient.hospitals["a"].ledger.book.epsilon(1e-5)["train"] == float("inf")


def test_a_site_counts_its_own_training_patients(ward: ModuleType, tmp_path: Path) -> None:
    world = ward.Ward(tmp_path)
    greedy = ward.make_study(federation={"sites": {"a": {"patients_declared": ward.PATIENTS}}})
    answer, _ = world.ask(world.request("prepare", greedy))
    assert (answer.refusal, answer.body) == ("patients-too-few", {})
    assert "study-approved" not in [line["line"] for line in world.ledger_lines()]

    policy = ward.Ward(tmp_path / "strict", min_patients=ward.PATIENTS)
    answer, _ = policy.ask(policy.request("prepare", ward.make_study()))
    assert answer.refusal == "patients-too-few"


def test_a_study_that_promises_less_than_it_spends_is_refused(
    hospital: Any, ward: ModuleType
) -> None:
    honest = ward.make_study()
    for part in ("privacy", "evaluation"):
        quiet = getattr(honest, part).model_copy(update={"noise_multiplier": 0.3})
        study = honest.model_copy(update={part: quiet})
        assert hospital.ask(hospital.request("prepare", study))[0].refusal == "privacy-refused"
    open_ended = honest.privacy.model_copy(update={"noise_multiplier": None})
    study = honest.model_copy(update={"privacy": open_ended})
    assert hospital.ask(hospital.request("prepare", study))[0].refusal == "study-invalid"


def test_answers_that_are_no_release_say_nothing_of_the_patients(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    """Two hospitals with other patients say the same, keys and their own name apart."""
    bodies = []
    for seed in (0, 7):
        folder = tmp_path / str(seed)
        ward.make_shard(folder / "shards" / "a", "a", seed)
        world = ward.Ward(folder, simulated=False)
        world.approve(study)
        prepare, _ = world.ask(world.request("prepare", study))
        initialise, initial = world.ask(world.request("initialise", study))
        body = {k: v for k, v in prepare.body.items() if k not in ("public_key", "receipt")}
        bodies.append((body, initialise.body, {n: a.tobytes() for n, a in initial.items()}))
    assert bodies[0] == bodies[1]
    assert bodies[0][0]["ready"] is True


def _refusal(hospital: Any, packed: bytes) -> str | None:
    envelope = Envelope.unpack(hospital.guard.call(packed))
    keys = [h.identity.public for h in hospital.hospitals.values()]
    return open_envelope(envelope, Answer, keys).refusal

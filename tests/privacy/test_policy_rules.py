"""The hospital's policy at the daemon: what is not allowed is refused, each with its own code."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from client.site.daemon.review import review
from client.site.encoders.registry import fingerprints
from common.errors import Refusal
from common.privacy.lifetime import Cap, Lifetime
from common.privacy.policy import PerStudy


@pytest.fixture
def study(ward: ModuleType) -> Any:
    return ward.make_study()


def refusal(world: Any, study: Any) -> str | None:
    code: str | None = world.ask(world.request("prepare", study))[0].refusal
    return code


def test_a_study_must_be_approved_and_unchanged(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    world = ward.Ward(tmp_path, simulated=False)
    assert refusal(world, study) == "study-unapproved"
    world.approve(study)
    assert refusal(world, study) is None
    described = study.model_copy(update={"description": "x"})
    assert refusal(world, described) == "study-unapproved", "one byte more is another study"
    lines = [line for line in world.ledger_lines() if line["line"] == "refused"]
    assert [line["code"] for line in lines] == ["study-unapproved"] * 2


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"tasks": ("pneumonia",)}, "task-forbidden"),
        ({"modes": ()}, "mode-forbidden"),
        ({"study": PerStudy(epsilon=2.0, delta=1e-3)}, "study-too-costly"),
        ({"study": PerStudy(epsilon=50.0, delta=1e-6)}, "study-too-costly"),
        ({"min_patients": 1000}, "patients-too-few"),
        ({"encoders": ("0" * 64,)}, "encoder-forbidden"),
        ({"slms": ("0" * 64,)}, "slm-forbidden"),
        (
            {
                "lifetime": Lifetime(
                    train=Cap(epsilon=3.0, delta=1e-3, order=2),
                    validation=Cap(epsilon=30.0, delta=1e-3, order=2),
                )
            },
            "lifetime-exceeded",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_the_policy_forbids_can_be_neither_approved_nor_run(
    ward: ModuleType, tmp_path: Path, study: Any, rule: dict[str, Any], code: str
) -> None:
    world = ward.Ward(tmp_path, simulated=False, **rule)
    shown = review(world.hospitals["a"], study)
    assert not shown.approvable
    assert [demand.code for demand in shown.demands if not demand.holds] == [code]
    with pytest.raises(Refusal) as refused:
        world.approve(study)
    assert refused.value.code == code

    lenient = ward.Ward(tmp_path / "lenient", simulated=False)
    lenient.approve(study)
    strict = {**lenient.config.sites[0].policy.model_dump(), **rule}
    lenient.set_policy(strict)  # the policy was tightened after the approval
    if code == "lifetime-exceeded":
        initial = lenient.prepared(study)
        assert lenient.ask(lenient.request("train", study, 1), initial)[0].refusal == code
    else:
        assert refusal(lenient, study) == code
    assert lenient.charges() == []


def test_the_cap_of_one_study_holds_over_all_that_it_ever_released(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    """Revoking and approving anew does not begin anew."""
    world = ward.Ward(tmp_path, simulated=False, study=PerStudy(epsilon=9.0, delta=1e-3))
    world.approve(study)
    initial = world.prepared(study)
    for number in (1, 2):
        assert world.ask(world.request("train", study, number), initial)[0].refusal is None
    world.revoke(study)
    shown = review(world.hospitals["a"], study)
    assert [d.code for d in shown.demands if not d.holds] == ["study-too-costly"]
    assert shown.price["train"] > 9.0
    runs = review(ward.Ward(tmp_path / "two", simulated=False).hospitals["a"], study, 2)
    assert runs.price["train"] > study.privacy.epsilon * 1.2, "two runs cost more than one"


def test_an_unapproved_study_costs_the_daemon_nothing(
    ward: ModuleType, tmp_path: Path, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a coordinator asks for is worked out only once a person let it in."""
    world = ward.Ward(tmp_path, simulated=False)

    def costly(*_: object) -> None:
        raise AssertionError("priced")

    monkeypatch.setattr("client.site.daemon.demands.epsilon_by_population", costly)
    monkeypatch.setattr("client.site.daemon.hospital.encode_site", costly)
    receipt = {**world.hospitals["a"].ledger.receipt().model_dump(mode="json"), "site": "b"}
    assert refusal(world, study) == "study-unapproved"
    asked = world.request("prepare", study, receipts=(receipt,))
    assert world.ask(asked)[0].refusal == "study-unapproved"
    assert not (tmp_path / "sites" / "a" / "witness.json").exists()


def test_encoders_and_models_named_by_hash_may_run(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    open_world = ward.Ward(tmp_path / "open", simulated=False)
    shown = review(open_world.hospitals["a"], study)
    assert shown.encoders == fingerprints(study)
    assert shown.slm is not None
    assert shown.parameters
    world = ward.Ward(
        tmp_path / "named",
        simulated=False,
        encoders=tuple(shown.encoders.values()),
        slms=(shown.slm,),
    )
    world.approve(study)
    assert refusal(world, study) is None


def test_rounds_per_day(ward: ModuleType, tmp_path: Path, study: Any) -> None:
    world = ward.Ward(tmp_path, simulated=False, rounds_per_day=1)
    world.approve(study)
    initial = world.prepared(study)
    assert world.ask(world.request("train", study, 1), initial)[0].refusal is None
    assert world.ask(world.request("train", study, 2), initial)[0].refusal == "rounds-per-day"
    assert world.ask(world.request("evaluate", study, 1), initial)[0].refusal is None


def test_answers_leave_at_the_slot_whatever_they_say(
    ward: ModuleType, tmp_path: Path, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ward.Ward(tmp_path, release_slot=0.5)
    initial = world.prepared(study)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for request, arrays in (
        (world.request("train", study, 1), initial),
        (world.request("train", study, 1), initial),
        (world.request("train", study, 2), {}),
    ):
        before = len(slept)
        world.ask(request, arrays)
        assert len(slept) == before + 1
        assert 0 < slept[-1] <= 0.5
    world.ask(world.request("prepare", study))
    assert len(slept) == 3, "nothing of the patients is in it"


# -- receipts ---------------------------------------------------------------------------------


def test_a_restored_backup_refuses_until_it_is_reconciled(
    ward: ModuleType, tmp_path: Path, study: Any
) -> None:
    world = ward.Ward(tmp_path, simulated=False)
    world.approve(study)
    initial = world.prepared(study)
    state = tmp_path / "sites" / "a"
    backup = {name: (state / name).read_bytes() for name in ("ledger.jsonl", "ledger.head")}
    answer, _ = world.ask(world.request("train", study, 1), initial)
    receipt = answer.body["receipt"]
    assert receipt["lines"] == len(world.ledger_lines())

    for name, content in backup.items():
        (state / name).write_bytes(content)
    world.restart()
    told = world.request("prepare", study, receipts=(receipt,))
    assert world.ask(told)[0].refusal == "ledger-behind"
    assert refusal(world, study) == "ledger-behind", "also when nobody tells again"
    world.hospitals["a"].ledger.reconcile()
    assert refusal(world, study) == "study-revoked"
    spent = world.hospitals["a"].ledger.book.epsilon(study.privacy.delta)
    assert spent["train"] > 0.9 * study.privacy.epsilon, "the whole reserve counts as spent"
    world.approve(study)
    initial = world.prepared(study)
    assert world.ask(world.request("train", study, 1, attempt=1), initial)[0].refusal is None


def test_receipts_of_others_are_witnessed_and_foreign_ones_refused(
    ward: ModuleType, tmp_path: Path
) -> None:
    study = ward.make_study(("a", "b"))
    world = ward.Ward(tmp_path, ("a", "b"))
    world.prepared(study)
    receipts = [
        world.hospitals[name].ledger.receipt().model_dump(mode="json") for name in ("a", "b")
    ]
    assert world.ask(world.request("prepare", study, receipts=receipts))[0].refusal is None
    witnessed = (tmp_path / "sites" / "a" / "witness.json").read_text()
    assert receipts[1]["head"] in witnessed
    assert receipts[0]["head"] not in witnessed
    backwards = {**receipts[1], "lines": 1}
    world.ask(world.request("prepare", study, receipts=(backwards,)))
    assert (tmp_path / "sites" / "a" / "witness.json").read_text() == witnessed
    forged = {**receipts[0], "lines": 500}
    answer, _ = world.ask(world.request("prepare", study, receipts=(forged,)))
    assert answer.refusal == "receipt-foreign"
    answer, _ = world.ask(world.request("prepare", study, receipts=({"site": "a"},)))
    assert answer.refusal == "message-malformed"
    assert refusal(world, study) is None, "a coordinator cannot stop a hospital with it"

"""A hospital that fails in every way it can: the study goes on, and nobody else notices."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from common.study import Study
from tests.e2e import hostile as faults
from tests.e2e.conftest import SITES, study
from tests.e2e.deployment import Deployment

BAD = "region-west"
GOOD = tuple(s for s in SITES if s != BAD)
DEADLINE = 30
ROUNDS: tuple[tuple[faults.Fault, str | None], ...] = (
    (faults.slow, None),
    (faults.not_a_number, "adapter-invalid"),
    (faults.wrong_shapes, "adapter-invalid"),
    (faults.wrong_names, "adapter-invalid"),
    (faults.too_many_bytes, "adapter-invalid"),
    (faults.lying_body, "answer-invalid"),
    (faults.invented_code, "on-holiday"),
    (faults.stale, "answer-invalid"),
    (faults.of_another_study, "answer-invalid"),
    (faults.unsigned, "answer-invalid"),
    (faults.garbage, "relay-failed"),
    (faults.hang, "no-answer"),
    (faults.cut_off, "no-answer"),
    (faults.honest, None),
)
"""What the hospital does in each round, and the code that it must get for it."""
NUMBER = {fault: number for number, (fault, _) in enumerate(ROUNDS, start=1)}


@dataclass(frozen=True)
class Run:
    """What a study left, by round of training; `bad` and `good` are ledgers of the study alone."""

    deployment: Deployment
    rounds: dict[int, dict[str, Any]]
    evaluation: dict[str, Any]
    report: dict[str, Any]
    ledgers: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(deployment: Deployment) -> Run:
    federation = {"rounds": len(ROUNDS), "quorum": 0.6, "deadline_seconds": DEADLINE}
    settled = deployment.settled(study("faults", federation=federation))
    deployment.approve(settled)
    script = {("train", number): fault for fault, number in NUMBER.items()}
    script["evaluate", 1] = faults.not_a_number
    bad = deployment.hospitals[BAD]
    with faults.hostile(deployment, bad, script):
        deployment.submit(settled, "faults")
        deployment.await_round("faults", NUMBER[faults.cut_off], 900)
        assert bad.relay is not None
        os.kill(bad.relay.pid, signal.SIGCONT)
        report = deployment.await_end("faults")
    lines = deployment.lines("faults")
    hash_ = Study.load(settled).hash
    return Run(
        deployment,
        {line["round"]: line for line in lines if line["kind"] == "train"},
        next(line for line in lines if line["kind"] == "evaluate"),
        report,
        {
            name: [line for line in h.ledger if line.get("study_hash") == hash_]
            for name, h in deployment.hospitals.items()
        },
    )


@pytest.mark.parametrize(("fault", "code"), ROUNDS, ids=[f.__name__ for f, _ in ROUNDS])
def test_it_is_left_out_with_its_reason(run: Run, fault: faults.Fault, code: str | None) -> None:
    line = run.rounds[NUMBER[fault]]
    left_out = {**line["refused"], **line["lost"]}
    assert left_out == ({} if code is None else {BAD: code})
    assert line["sites"] == [s for s in SITES if code is None or s != BAD]
    assert line["aggregated"]
    assert line["seconds"] < DEADLINE + 5


def test_the_report_says_what_became_of_each_site(run: Run) -> None:
    codes = Counter(code for _, code in ROUNDS if code)
    codes[run.evaluation["refused"][BAD]] += 1
    left_out = {site["name"]: site["left_out"] for site in run.report["sites"]}
    assert left_out == {BAD: dict(codes), **{name: {} for name in GOOD}}
    assert run.report["rounds"] == run.report["rounds_asked"] == len(ROUNDS)


def test_an_evaluation_that_is_no_number_is_left_out(run: Run) -> None:
    assert run.evaluation["refused"] == {BAD: "answer-invalid"}
    assert run.evaluation["sites"] == list(GOOD)


def test_every_hospital_is_charged_once_for_a_round(run: Run) -> None:
    for name, lines in run.ledgers.items():
        charged = [line for line in lines if line["line"] == "released"]
        rounds = Counter(c["round"] for c in charged if c["event"]["population"] == "train")
        late = {NUMBER[faults.hang]} if name == BAD else set()
        assert rounds == Counter(set(run.rounds) - late), name
        assert [c["round"] for c in charged if c["event"]["population"] == "validation"] == [1]


def test_late_work_is_given_up_before_it_is_charged(run: Run) -> None:
    """The relay's patience ended before the daemon's turn at its ledger came."""
    refused = [line for line in run.ledgers[BAD] if line["line"] == "refused"]
    assert [(line["request"], line["code"]) for line in refused] == [("train", "request-late")]


def test_what_is_published_is_sound(run: Run) -> None:
    adapter = run.deployment.adapter("faults")
    assert adapter
    assert all(np.isfinite(array).all() for array in adapter.values())
    assert sum(a.nbytes for a in adapter.values()) < 1_000_000

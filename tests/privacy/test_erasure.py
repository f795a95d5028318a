"""Rule 12: a patient leaves for good, and what was released stays covered."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.errors import PrivacyError


def record_ids(world: Any, study: Any) -> set[str]:
    populations = world.hospitals["a"].prepared(study.hash).populations
    return {*populations.train.record_ids, *populations.validation.record_ids}


def test_an_erased_patient_is_gone_and_stays_gone(ward: ModuleType, tmp_path: Path) -> None:
    study = ward.make_study()
    world = ward.Ward(tmp_path)
    initial = world.prepared(study)
    patient = f"a-{ward.SECRET}-7"
    assert f"r{patient}" in record_ids(world, study)

    assert world.hospitals["a"].erase(patient) == 1
    assert world.ask(world.request("train", study, 1), initial)[0].refusal == "not-prepared"
    world.prepared(study)
    left = record_ids(world, study)
    assert f"r{patient}" not in left
    assert len(left) == ward.PATIENTS - 1
    world.restart()  # the shard still holds the patient, as after a new import
    world.prepared(study)
    assert record_ids(world, study) == left

    ledger = (tmp_path / "sites" / "a" / "ledger.jsonl").read_text()
    assert ledger.count("patient-erased") == 1
    assert ward.SECRET not in ledger
    (tmp_path / "sites" / "a" / "erasure.key").unlink()
    world.restart()
    assert world.ask(world.request("prepare", study))[0].refusal == "data-problem"
    with pytest.raises(PrivacyError, match=r"erasure\.key"):
        world.hospitals["a"].erase("another")


def test_the_commitment_cannot_be_tried_without_the_sites_key(
    ward: ModuleType, tmp_path: Path
) -> None:
    commitments = set()
    for name in ("one", "two"):
        world = ward.Ward(tmp_path / name)
        world.hospitals["a"].erase("10000032")
        (line,) = [entry for entry in world.ledger_lines() if entry["line"] == "patient-erased"]
        commitments.add(line["commitment"])
    assert len(commitments) == 2

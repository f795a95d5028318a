"""Runs: submitted to a real SuperLink, executed by a real ServerApp, with no hospital to answer."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import FedwardError, StudyError
from common.identity import Identity
from common.study import Study
from deploy.coordinator import enrol, runs
from deploy.coordinator.cli import app
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.superlink import SuperLinkError
from deploy.enrolment import EnrolmentError, StudySignature
from tests.deploy.coordinator.ward import Joining, Served

STUDY = """
schema_version = 1
name = "lonely"
[sources.lab]
modality = "series"
encoder = "series-statistics"
series = ["sodium"]
[tasks.death]
[privacy]
mode = "none"
[federation]
rounds = 2
startup_seconds = {seconds}
[federation.sites.a]
patients_declared = 100
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "lonely.toml"
    path.write_text(STUDY.format(seconds=3))
    return path


def state(folder: CoordinatorFolder, run: str, *wanted: str) -> runs.Outcome:
    deadline = time.monotonic() + 60
    while (found := runs.outcome(folder, run)).state not in wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.3)
    return found


def test_a_study_without_hospitals_fails_with_its_reason_and_resumes(
    served: Served, study: Path
) -> None:
    folder = served.folder
    run = "alone"
    command = ["submit", str(study), "--run-id", run, "--follow", "-C", str(folder.root)]
    followed = CliRunner().invoke(app, command)
    assert followed.exit_code == 1
    assert "run 'alone': failed" in str(followed.exception)
    failed = state(folder, run, "failed")
    assert "0 of 1" in failed.detail
    assert failed.rounds == 2
    out = folder.runs / run
    settled = Study.load(out / "study.toml")
    assert settled.federation.sites["a"].public_key == served.hospitals["a"].identity.public
    signed = StudySignature.read(out / "study.sig", signer=folder.identity().public)
    assert signed.study == settled.hash
    with pytest.raises(CoordinatorError, match="there is a run 'alone' already"):
        runs.submit(folder, study, run="alone")
    before = json.loads((out / "flower.json").read_text())
    runs.resume(folder, run)
    assert json.loads((out / "flower.json").read_text()) != before
    assert state(folder, run, "failed").detail == failed.detail
    assert Study.load(out / "study.toml").hash == settled.hash


def test_a_run_is_stopped_and_resumed(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "patient.toml"
    path.write_text(STUDY.format(seconds=600))
    folder = served.folder
    run = runs.submit(folder, path)
    assert state(folder, run, "running").phase == "starting"
    runs.stop(folder, run)
    assert state(folder, run, "stopped")
    with pytest.raises(CoordinatorError, match="does not run"):
        runs.stop(folder, run)
    runs.resume(folder, run)
    state(folder, run, "running", "waiting")
    runs.stop(folder, run)


def test_a_site_that_is_not_enrolled_stops_the_submission(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(seconds=3).replace("sites.a", "sites.c"))
    before = set(served.folder.runs.iterdir())
    with pytest.raises(StudyError, match="unknown site 'c'") as error:
        runs.submit(served.folder, path)
    assert "enrol" in error.value.cure
    assert set(served.folder.runs.iterdir()) == before


def test_a_study_that_pins_another_key_is_refused(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(seconds=3) + f'public_key = "{"0" * 64}"\n')
    with pytest.raises(CoordinatorError, match="pins another key"):
        runs.submit(served.folder, path)


def test_what_is_settled_is_signed_and_submitted_as_it_is(
    folder: CoordinatorFolder, hospital: Joining, study: Path, tmp_path: Path
) -> None:
    hospital("a").admitted(folder)
    settled = runs.settle(folder, study, tmp_path / "out")
    signature = StudySignature.read(tmp_path / "out" / "study.sig", signer=folder.identity().public)
    assert signature.study == settled.hash == Study.load(tmp_path / "out" / "study.toml").hash
    again = runs.settle(folder, tmp_path / "out" / "study.toml", tmp_path / "again")
    assert again.hash == settled.hash
    with pytest.raises(CoordinatorError, match="exists already"):
        runs.settle(folder, study, tmp_path / "out")


def test_without_a_superlink_nothing_is_submitted(
    folder: CoordinatorFolder, hospital: Joining, study: Path
) -> None:
    hospital("a").admitted(folder)
    with pytest.raises(SuperLinkError, match="does not answer"):
        runs.submit(folder, study)
    assert not list(folder.runs.iterdir())


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 65])
def test_odd_names_of_runs_are_refused(
    folder: CoordinatorFolder, hospital: Joining, study: Path, name: str
) -> None:
    hospital("a").admitted(folder)
    if name:
        with pytest.raises(CoordinatorError, match="no name for a run"):
            runs.submit(folder, study, run=name)
    with pytest.raises(CoordinatorError, match="there is no run"):
        runs.pull(folder, name, folder.root / "dest")


def test_a_signature_is_for_one_study_and_one_coordinator(
    folder: CoordinatorFolder, tmp_path: Path
) -> None:
    text = STUDY.format(seconds=3)
    runs.sign(folder, Study.from_toml(text), tmp_path)
    path = tmp_path / "study.sig"
    raw = json.loads(path.read_text())
    other = Study.from_toml(text.replace("rounds = 2", "rounds = 3"))
    path.write_text(json.dumps({**raw, "content": {**raw["content"], "study": other.hash}}))
    with pytest.raises(EnrolmentError, match="was changed"):
        StudySignature.read(path)
    path.write_text(json.dumps(raw))
    stranger = Identity.open(tmp_path / "stranger.key").public
    with pytest.raises(EnrolmentError, match="somebody else"):
        StudySignature.read(path, signer=stranger)


# -- from the folder alone -----------------------------------------------------------------------


@pytest.fixture
def done(folder: CoordinatorFolder) -> Path:
    """A run as the ServerApp leaves it, in the middle."""
    out = folder.runs / "run"
    (out / "adapter").mkdir(parents=True)
    runs.sign(folder, Study.from_toml(STUDY.format(seconds=3)), out)
    (out / "adapter" / "projectors.safetensors").write_bytes(b"arrays")
    line = {"round": 1, "completed": 1, "kind": "train", "refused": {"b": "budget"}, "lost": {}}
    (out / "rounds.jsonl").write_text(json.dumps(line) + '\n{"round": 2, "to')
    (out / "checkpoint").mkdir()
    return out


def test_a_torn_line_and_missing_sites_are_read(folder: CoordinatorFolder, done: Path) -> None:
    found = runs.outcome(folder, "run")
    assert (found.state, found.phase, found.completed, found.rounds) == ("unknown", "train", 1, 2)
    assert found.detail == "without b (budget)"
    assert len(runs.lines(folder, "run")) == 1
    (done / "rounds.jsonl").unlink()
    assert runs.outcome(folder, "run").phase == "starting"


def test_only_a_completed_run_is_pulled(
    folder: CoordinatorFolder, done: Path, tmp_path: Path
) -> None:
    with pytest.raises(CoordinatorError, match="has not completed"):
        runs.pull(folder, "run", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    assert "report.json" not in runs.pull(folder, "run", tmp_path / "part", partial=True)
    (done / "report.json").write_text("{}")
    files = runs.pull(folder, "run", tmp_path / "dest")
    assert {"report.json", "study.toml", "study.sig", "adapter/projectors.safetensors"} <= set(
        files
    )
    sums = (tmp_path / "dest" / runs.CHECKSUMS).read_text().splitlines()
    assert len(sums) == len(files)
    for text in sums:
        digest, name = text.split("  ")
        assert hashlib.sha256((tmp_path / "dest" / name).read_bytes()).hexdigest() == digest
    assert not (tmp_path / "dest" / "checkpoint").exists()
    with pytest.raises(CoordinatorError, match="exists already"):
        runs.pull(folder, "run", tmp_path / "dest")
    with pytest.raises(CoordinatorError, match="has completed"):
        runs.resume(folder, "run")


def test_a_failure_is_told(folder: CoordinatorFolder, done: Path) -> None:
    (done / "failed.json").write_text('{"code": "x", "reason": "too few sites", "cure": ""}')
    found = runs.outcome(folder, "run")
    assert (found.state, found.detail) == ("failed", "too few sites")
    (done / "failed.json").write_text('{"reason": "no [red] in [/x]"}')  # rich would read it
    said = CliRunner().invoke(app, ["status", "-C", str(folder.root)])
    assert said.exit_code == 0
    assert "[red]" in said.output
    shutil.rmtree(done)
    with pytest.raises(FedwardError, match="there is no run 'run'"):
        runs.outcome(folder, "run")
    assert runs.outcomes(folder) == []
    assert enrol.Register.read(folder).sites == {}

"""A hosted hospital: who validates, what stays inside, and what a restart keeps."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site.daemon import hospital as hospital_module
from client.site.daemon.answers import Answers
from client.site.model import slm
from common.errors import PrivacyError
from common.privacy.policy import SENTENCE


@pytest.fixture
def study(ward_module: Any) -> Any:
    return ward_module.make_study()


def test_the_split_is_random_and_secret_and_lasts(ward_module: Any, tmp_path: Path) -> None:
    study, other_seed = ward_module.make_study(), ward_module.make_study(seed=5)
    keys: dict[str, bytes] = {}
    for name, simulated in (("real", False), ("real2", False), ("sim", True), ("sim2", True)):
        world = ward_module.Ward(tmp_path / name, simulated=simulated)
        if not simulated:
            world.approve(study)
            world.approve(other_seed)
        world.prepared(study)
        path = tmp_path / name / "sites" / "a" / "population.key"
        keys[name] = path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        before = _validation_patients(world, study)
        world.restart()
        world.prepared(other_seed)
        assert path.read_bytes() == keys[name], "fixed for the site's life"
        assert _validation_patients(world, other_seed) == before
    assert keys["real"] != keys["real2"]
    assert keys["sim"] == keys["sim2"]
    assert len(set(keys.values())) == 3
    third = ward_module.Ward(tmp_path / "sim3", simulated=True)
    third.prepared(other_seed)
    assert (tmp_path / "sim3/sites/a/population.key").read_bytes() != keys["sim"]


def test_another_validation_fraction_would_move_patients_and_is_refused(
    ward_module: Any, tmp_path: Path, study: Any
) -> None:
    world = ward_module.Ward(tmp_path)
    world.prepared(study)
    other = study.model_copy(
        update={"evaluation": study.evaluation.model_copy(update={"validation_fraction": 0.45})}
    )
    world.restart()
    answer, _ = world.ask(world.request("prepare", other))
    assert answer.refusal == "validation-fraction-fixed"


def test_populations_are_disjoint(ward_module: Any, tmp_path: Path, study: Any) -> None:
    world = ward_module.Ward(tmp_path)
    world.prepared(study)
    populations = world.hospitals["a"].prepared(study.hash).populations
    train, validation = populations.train.record_ids, populations.validation.record_ids
    assert len(train) + len(validation) == ward_module.PATIENTS
    assert not set(train) & set(validation)
    assert 5 < len(validation) < 30


def test_without_privacy_a_round_is_a_function_of_study_site_and_round(
    ward_module: Any, tmp_path: Path
) -> None:
    study = ward_module.make_study(private=False, privacy={"sample_rate": 0.5})
    rounds = []
    for name in ("one", "two"):
        world = ward_module.Ward(tmp_path / name, without_privacy=SENTENCE)
        initial = world.prepared(study)
        first = world.ask(world.request("train", study, 1), initial)[1]
        if name == "two":  # a restart in between changes nothing
            world.restart()
            world.prepared(study)
        second = world.ask(world.request("train", study, 2), first)[1]
        again = world.ask(world.request("train", study, 2, attempt=1), first)[1]
        rounds.append((first, second, again))
    for (first, second, again), (first_b, second_b, _) in [(rounds[0], rounds[1])]:
        for name in first:
            assert np.array_equal(first[name], first_b[name])
            assert np.array_equal(second[name], second_b[name])
            assert np.array_equal(second[name], again[name])
        assert any(not np.array_equal(first[n], initial[n]) for n in first)


def test_hospitals_share_one_language_model(ward_module: Any, tmp_path: Path) -> None:
    study = ward_module.make_study(("a", "b"))
    world = ward_module.Ward(tmp_path, ("a", "b"))
    initial = {site: world.prepared(study, site) for site in ("a", "b")}
    a, b = (world.hospitals[site] for site in ("a", "b"))
    dims = a.prepared(study.hash).dims
    assert a.bench.resident(study, dims) is b.bench.resident(study, dims)
    for name, array in initial["a"].items():
        assert array.dtype == np.float32
        assert np.array_equal(array, initial["b"][name])
    answer, _ = world.ask(world.request("train", study, 1, site="b"), initial["b"])
    assert answer.site == "b"
    assert world.charges("a") == []
    again = world.ask(world.request("initialise", study))[1]
    for name, array in again.items():
        assert np.array_equal(array, initial["a"][name]), "training moves no initial adapter"


def test_the_language_model_is_loaded_once_in_a_daemons_life(
    ward_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what a round costs beside training does not grow with it."""
    loads = []
    load = slm._load
    monkeypatch.setattr(slm, "_load", lambda *which: loads.append(which) or load(*which))
    slm._resident.cache_clear()
    world = ward_module.Ward(tmp_path)
    for study in (ward_module.make_study(), ward_module.make_study(seed=7)):
        initial = world.prepared(study)
        for number in (1, 2):
            answer, _ = world.ask(world.request("train", study, number), initial)
            assert answer.refusal is None
        world.ask(world.request("evaluate", study, 1), initial)
    assert len(loads) == 1


def test_evaluation_is_noised_and_exact_values_stay(
    ward_module: Any, tmp_path: Path, study: Any
) -> None:
    world = ward_module.Ward(tmp_path)
    initial = world.prepared(study)
    answer, arrays = world.ask(world.request("evaluate", study, 1), initial)
    assert set(answer.body) == {"release", "epsilon", "rounds_charged", "receipt"}
    assert answer.body["epsilon"]["validation"] > 0 == answer.body["epsilon"]["train"]
    histograms = arrays["histograms"]
    assert histograms.shape == (1, 2, 4)
    assert histograms.dtype == np.float64
    exact = tmp_path / "sites" / "a" / "exact"
    for name in ("release-1.json", "release-1.npz"):
        assert stat.S_IMODE((exact / name).stat().st_mode) == 0o600
    support = json.loads((exact / "release-1.json").read_text())["tasks"]["death"]["support"]
    assert support == world.hospitals["a"].prepared(study.hash).populations.validation.n_records
    assert abs(histograms.sum() - support) > 1e-6
    for path in (tmp_path / "sites" / "a").rglob("*"):
        if path.is_file() and path.name != "ledger.jsonl":
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_adapters_that_do_not_fit_cost_nothing(
    ward_module: Any, tmp_path: Path, study: Any
) -> None:
    world = ward_module.Ward(tmp_path)
    initial = world.prepared(study)
    name = next(iter(initial))
    for broken in (
        {},
        {**initial, "more": np.zeros(3, np.float32)},
        {**initial, name: initial[name][..., :-1]},
        {**initial, name: initial[name].astype(np.float64)},
        {**initial, name: np.full_like(initial[name], np.nan)},
    ):
        answer, _ = world.ask(world.request("train", study, 1), broken)
        assert answer.refusal == "adapter-invalid"
    assert world.charges() == []


def test_policy_speaks_before_anything_is_read(ward_module: Any, tmp_path: Path) -> None:
    study = ward_module.make_study()
    for name, policy, site, code in (
        ("approval", {"simulated": False}, "a", "study-unapproved"),
        ("nobody", {"coordinators": ()}, "a", "signature-invalid"),
        ("elsewhere", {}, "b", "site-unknown"),
    ):
        world = ward_module.Ward(tmp_path / name, **policy)
        answer, _ = world.ask(world.request("prepare", study, site=site))
        assert answer.refusal == code
        assert not (tmp_path / name / "sites" / "a" / "vault").exists()
    world = ward_module.Ward(tmp_path / "by hash", simulated=False)
    world.approve(study)
    world.prepared(study)
    other, _ = world.ask(world.request("prepare", ward_module.make_study(seed=1)))
    assert other.refusal == "study-unapproved"
    wrong = world.request("prepare", study, study_hash=ward_module.make_study(seed=1).hash)
    assert world.ask(wrong)[0].refusal == "message-malformed"
    stale = world.request("prepare", study, code_hash="0" * 64)
    assert world.ask(stale)[0].refusal == "code-mismatch"
    pinned = ward_module.make_study(
        federation={"sites": {"a": {"patients_declared": 30, "public_key": "0" * 64}}}
    )
    world = ward_module.Ward(tmp_path / "pinned")
    assert world.ask(world.request("prepare", pinned))[0].refusal == "site-unknown"


def test_roster_names_sites_and_keys(ward_module: Any, tmp_path: Path) -> None:
    world = ward_module.Ward(tmp_path, ("a", "b"))
    study = ward_module.make_study(("a", "b"))
    answer, _ = world.ask(world.request("roster", study, site=""))
    assert [entry["name"] for entry in answer.body["sites"]] == ["a", "b"]
    assert answer.body["sites"][1]["public_key"] == world.hospitals["b"].identity.public
    assert len(answer.body["code_hash"]) == 64


def test_work_needs_preparing_again_after_a_restart(
    ward_module: Any, tmp_path: Path, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ward_module.Ward(tmp_path)
    initial = world.prepared(study)
    world.restart()
    assert world.ask(world.request("train", study, 1), initial)[0].refusal == "not-prepared"
    assert world.charges() == []
    world.prepared(study)
    assert world.ask(world.request("train", study, 1), initial)[0].refusal is None
    states = json.loads((tmp_path / "sites/a/status.json").read_text())
    assert (states["phase"], states["step"], states["steps"]) == ("ready", 2, 2)
    assert states["epsilon"]["train"] > 0


def test_a_lost_ledger_is_not_begun_anew(ward_module: Any, tmp_path: Path, study: Any) -> None:
    world = ward_module.Ward(tmp_path)
    world.prepared(study)
    for name, what in (("site.key", "key of site"), ("ledger.jsonl", "ledger of site")):
        path = tmp_path / "sites" / "a" / name
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(PrivacyError, match=f"the {what} 'a' is gone"):
            world.restart()
        assert not path.exists(), "nothing is begun anew"
        path.write_bytes(kept)


def test_a_broken_shard_is_one_code_outside_and_a_story_inside(
    ward_module: Any, tmp_path: Path, study: Any
) -> None:
    world = ward_module.Ward(tmp_path)
    (tmp_path / "shards" / "a" / "records.parquet").write_bytes(b"not parquet")
    answer, _ = world.ask(world.request("prepare", study))
    assert (answer.refusal, answer.body) == ("data-problem", {})
    assert "records.parquet" in world.log()
    assert world.guard.status()[0]["refusal"] == "data-problem"
    assert world.guard.status()[0]["phase"] == "idle"


def test_a_full_disk_releases_nothing(
    ward_module: Any, tmp_path: Path, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ward_module.Ward(tmp_path)
    initial = world.prepared(study)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "write", full)
        answer, arrays = world.ask(world.request("train", study, 1), initial)
        assert (answer.refusal, arrays) == ("internal", {})
    answer, arrays = world.ask(world.request("train", study, 1, attempt=1), initial)
    assert answer.refusal is None
    assert arrays
    assert len(world.charges()) == 2


def test_an_ending_daemon_charges_nothing_more(
    ward_module: Any, tmp_path: Path, study: Any
) -> None:
    world = ward_module.Ward(tmp_path)
    initial = world.prepared(study)
    world.hospitals["a"].stopping = True
    assert world.ask(world.request("train", study, 1), initial)[0].refusal == "internal"
    assert world.charges() == []


def test_only_the_latest_answers_are_kept(ward_module: Any, tmp_path: Path) -> None:
    study = ward_module.make_study(
        private=False, training={"steps_per_round": 1}, federation={"rounds": 12}
    )
    world = ward_module.Ward(tmp_path, without_privacy=SENTENCE)
    arrays = world.prepared(study)
    requests = [world.request("train", study, number) for number in range(1, 13)]
    for request in requests:
        world.ask(request, arrays)
    kept = list((tmp_path / "sites" / "a" / "answers").iterdir())
    assert len(kept) == 8
    assert world.ask(requests[0], arrays)[0].refusal == "answer-lost"
    assert world.ask(requests[-1], arrays)[0].refusal is None
    assert len(world.charges()) == 12


def test_answers_are_named_by_digests_only(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    for name in ("../escape", "", "g" * 64, "A" * 64):
        with pytest.raises(ValueError, match="digest"):
            answers.write(name, b"")


def test_logs_rotate_privately(tmp_path: Path) -> None:
    log = hospital_module._log_file("a", tmp_path / "daemon.log")
    log.handlers[0].maxBytes = 200  # type: ignore[attr-defined]
    for number in range(20):
        log.error("story %d of Ödön", number)
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def _validation_patients(world: Any, study: Any) -> list[str]:
    return list(world.hospitals["a"].prepared(study.hash).populations.validation.record_ids)

"""What `simulate` refuses before anything starts, the cohort, and the plan."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from client.site.encoders.registry import dimensions
from client.site.model.system import adapter_spec, build
from client.site.shard.importers.timeline import CHEXPERT_TASKS, OUTCOME_TASKS
from client.site.shard.shard import Shard
from common.errors import FedwardError, ModelError, PrivacyError, StudyError
from common.privacy.pricing import epsilon
from common.study import Study
from simulations import simulate, synthetic_hospitals
from simulations.plan import make_plan, parse_sites, show_plan
from simulations.run import find_shards


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic_hospitals(tmp_path_factory.mktemp("cohort"), 2, patients=12)


@pytest.fixture
def study() -> Study:
    raw = Study.load("demo").model_dump(mode="json")
    raw["federation"]["sites"] = {}
    return Study.model_validate(raw)


def test_more_hospitals_than_shards(study: Study, cohort: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="3 hospitals asked for, but there are 2"):
        simulate(study, cohort, tmp_path / "out", hospitals=3)
    assert not (tmp_path / "out").exists()


def test_a_roster_without_shards(cohort: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="unknown site in the study's roster 'lakeview'"):
        simulate("demo", cohort, tmp_path / "out")


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_epsilon_that_means_nothing(
    study: Study, cohort: dict[str, Path], tmp_path: Path, epsilon: float
) -> None:
    with pytest.raises((StudyError, PrivacyError), match="epsilon"):
        simulate(study, cohort, tmp_path / "out", epsilon=epsilon)


def test_an_unknown_study_and_an_empty_folder(tmp_path: Path, study: Study) -> None:
    with pytest.raises(StudyError, match="no study at"):
        simulate("nonsense", tmp_path, tmp_path / "out")
    with pytest.raises(FedwardError, match="no shard in it"):
        simulate(study, tmp_path, tmp_path / "out")


def test_an_earlier_run_is_not_overwritten(
    study: Study, cohort: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(FedwardError, match="holds an earlier run"):
        simulate(study, cohort, tmp_path)


def test_two_shards_of_one_hospital(tmp_path: Path, cohort: dict[str, Path]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.toml").write_text('name = "x"\nhospital = "same"\n')
    with pytest.raises(FedwardError, match="are both hospital 'same'"):
        find_shards(tmp_path)
    assert find_shards(next(iter(cohort.values())).parent) == dict(sorted(cohort.items()))


def test_synthetic_hospitals_come_through_the_importer(
    tmp_path: Path, cohort: dict[str, Path]
) -> None:
    again = synthetic_hospitals(tmp_path, 2, patients=12)
    for name, path in cohort.items():
        first, second = Shard.open(path), Shard.open(again[name])
        assert first.records.equals(second.records)
        assert first.events is not None
        assert first.events.equals(second.events)
        assert first.images is not None
        assert second.images is not None
        assert first.images.equals(second.images)
        assert set(first.tasks) == {*CHEXPERT_TASKS, *OUTCOME_TASKS}


def test_plan_prices_what_the_ledger_will_charge() -> None:
    plan = make_plan(Study.load("demo"))
    study = plan.study
    assert plan.reserved is not None
    assert plan.declared is not None
    train = [e for e in study.reserved_events("riverside") if e.population == "train"]
    assert plan.reserved["train"] == epsilon(train, study.privacy.delta)
    assert plan.declared["train"] < plan.reserved["train"] <= study.privacy.epsilon
    assert plan.bytes_up == 4 * (plan.parameters or 0) > 0


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["q_proj", "down_proj"]}])
def test_plan_counts_what_the_model_has(decoder: bool, lora: dict[str, object] | None) -> None:
    raw = Study.load("hannover").model_dump(mode="json")
    raw["privacy"]["mode"] = "none"
    raw["model"] |= {"decoder": decoder, "lora": lora}
    study = Study.model_validate(raw)
    model = build(study, dimensions(study))
    assert make_plan(study).parameters == adapter_spec(model)["trainable_parameters"]


def test_plan_says_what_it_cannot_know() -> None:
    raw = Study.load("hannover").model_dump(mode="json")
    raw["model"] |= {"slm": "nobody/such-a-model", "revision": "0" * 40}
    console = Console(file=io.StringIO(), width=120)
    show_plan(Study.model_validate(raw), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "nobody/such-a-model is not on this machine" in text
    assert "trainable parameters" not in text
    raw["model"]["slm"] = "/nowhere"
    with pytest.raises(ModelError, match="slm folder /nowhere"):
        make_plan(Study.model_validate(raw))


def test_plan_names_the_study_that_it_starts_from(study: Study) -> None:
    raw = study.model_dump(mode="json") | {"start": {"adapter": "a" * 64, "study": "b" * 64}}
    console = Console(file=io.StringIO(), width=120)
    show_plan(Study.model_validate(raw), console, sites=parse_sites("north=400,south=200"))
    assert f"adapter {'a' * 16} of study {'b' * 16}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_plan_of_other_sites_and_its_table(study: Study) -> None:
    console = Console(file=io.StringIO(), width=120)
    show_plan(study, console, sites=parse_sites("north=400, south=200"), epsilon=2.0, rounds=3)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 × 10" in text
    assert "0.667" in text
    with pytest.raises(StudyError, match="'south' is not name=patients"):
        parse_sites("north=1,south")

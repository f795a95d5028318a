"""Studies: identity, resolution, and clear errors for every mistake in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import FedwardError, StudyError
from common.privacy.pricing import epsilon
from common.study import Model, Study, resolve, unknown

TOML = """
name = "small"
[sources.lab]
modality = "series"
encoder = "series-statistics"
series = ["sodium", "lactate"]
[tasks.hospital_mortality]
prevalence = 0.1
[training]
steps_per_round = 5
[training_without_privacy]
optimizer = "sgd"
learning_rate = 0.25
[federation]
rounds = 4
[federation.sites.north]
patients_declared = 300
[federation.sites.south]
patients_declared = 100
"""


def test_round_trip_keeps_the_hash() -> None:
    for study in (Study.from_toml(TOML), resolve(Study.from_toml(TOML))):
        assert Study.from_toml(study.to_toml()).hash == study.hash


def test_canonical_form_reads_back_in_the_same_order() -> None:
    """Tokens, designated entries and sums over sites follow the order of the file."""
    text = TOML.replace("[training]", "[tasks.a_later_one]\nprevalence = 0.2\n[training]", 1)
    study = Study.from_toml(text)
    again = Study.model_validate(json.loads(study.canonical()))
    assert list(again.tasks) == list(study.tasks) == ["hospital_mortality", "a_later_one"]
    assert list(again.federation.sites) == ["north", "south"]
    assert again.hash == study.hash == Study.from_toml(study.to_toml()).hash


def test_every_override_makes_another_study() -> None:
    study = Study.from_toml(TOML)
    variants = [
        resolve(study),
        resolve(study, epsilon=2),
        resolve(study, rounds=3),
        resolve(study, private=False),
        resolve(study, seed=1),
        resolve(study, sites={"north": None}),
    ]
    assert len({v.hash for v in variants}) == len(variants)
    assert all(v.resolved for v in variants)
    assert not study.resolved


def test_resolved_study_prices_at_its_target() -> None:
    study = resolve(Study.from_toml(TOML), epsilon=3.0)
    events = study.reserved_events("north")
    for population in ("train", "validation"):
        own = [e for e in events if e.population == population]
        assert 2.9 < epsilon(own, study.privacy.delta) <= 3.0
    assert study.priced_rounds == 5
    assert study.expected_batch("north") == pytest.approx(30)
    assert study.weight("north") + study.weight("south") == 1


def test_without_privacy_uses_its_own_training_and_no_noise() -> None:
    study = resolve(Study.from_toml(TOML), private=False)
    assert study.training.optimizer == "sgd"
    assert study.privacy.noise_multiplier is None
    assert epsilon(study.reserved_events("north"), 1e-5) == float("inf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("rounds = 4", "rounds = 0"), "federation.rounds"),
        (("rounds = 4", "ruonds = 4"), "federation.ruonds: unknown key"),
        (('"series-statistics"', '"bert"'), "unknown encoder 'bert'"),
        (('"series-statistics"', '"huggingface:org/bert"'), "revision"),
        (('"series-statistics"', '"hashed-text"'), "reads text"),
        (("[training]", '[model]\nslm = "gpt5"\n[training]'), "unknown slm 'gpt5'"),
        (("[training]", '[model]\nslm = "google/gemma-2b"\n[training]'), "revision"),
        (
            ("[training]", "[model]\nsystem = ['m-llm']\n[training]"),
            "model.system: Input should be",
        ),
        (
            ("[training]", "[model]\nsystem = { a = 1 }\n[training]"),
            "model.system: Input should be",
        ),
        (("[training]", "[privacy]\nepsilon = -1\n[training]"), "privacy.epsilon"),
        (("[training]", "[privacy]\ndelta = 0.005\n[training]"), "1/patients_declared"),
        (("[tasks.hospital_mortality]", "[tasks.y_hospital_mortality]"), "leave out 'y_'"),
        (('"lactate"', '"sodium"'), "twice"),
        (("name = ", "name "), "not valid TOML"),
    ],
)
def test_mistakes_name_the_key(change: tuple[str, str], said: str) -> None:
    with pytest.raises(StudyError) as caught:
        Study.from_toml(TOML.replace(*change), origin="mine.toml")
    assert said in str(caught.value)
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize("system", ["adacomed", "llama-fusion", "m-llm"])
@pytest.mark.parametrize("option", [{"projectors": "isolated"}, {"decoder": True}, {"beta": 1.0}])
def test_options_of_uni_mlm_are_refused_elsewhere(system: str, option: dict[str, object]) -> None:
    (key,) = option
    with pytest.raises(ValidationError, match=f"'{key}' is of uni-mlm alone: {system} has no use"):
        Model.model_validate({"system": system, **option})
    written_out = Model.model_validate({"system": system}).model_dump(mode="json")
    assert Model.model_validate(written_out).system == system


def test_resolve_refuses_what_cannot_run() -> None:
    study = Study.from_toml(TOML)
    with pytest.raises(FedwardError, match="epsilon"):
        resolve(study, epsilon=0)
    with pytest.raises(FedwardError, match="no declared number"):
        resolve(study, sites={"east": None})
    assert resolve(study, sites={"east": 50}).federation.sites["east"].patients_declared == 50


def test_unknown_study_file_lists_the_ready_ones() -> None:
    with pytest.raises(StudyError, match="no study at"):
        Study.load("nothing.toml")


def test_unknown_suggests_the_nearest() -> None:
    assert "did you mean 'hospital_mortality'" in str(
        unknown("task", "hospital_mortalty", ["hospital_mortality", "readmission"])
    )


@pytest.mark.parametrize("hidden", ["\x1b[2K", "\u202e", "\r", "\u2028"])
def test_a_text_cannot_rewrite_what_a_person_reads(hidden: str) -> None:
    """A review prints the study's texts on the approver's terminal."""
    raw = Study.from_toml(TOML).model_dump(mode="json")
    for change in (
        {"description": f"plain{hidden}"},
        {"tasks": {"hospital_mortality": {"description": f"x{hidden}"}}},
        {"model": {"slm": f"./folder{hidden}"}},
    ):
        with pytest.raises(ValidationError, match="control character"):
            Study.model_validate({**raw, **change})


def test_numbers_that_have_no_meaning_are_refused() -> None:
    raw = Study.from_toml(TOML).model_dump(mode="json")
    with pytest.raises(ValidationError, match="finite"):
        Study.model_validate({**raw, "training": {"weight_decay": float("inf")}})
    federation = {**raw["federation"], "rounds": 100_000}
    with pytest.raises(ValidationError, match="more than a study may have"):
        Study.model_validate({**raw, "federation": federation})


def test_a_study_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text(TOML)
    above = tmp_path / "above.toml"
    above.write_text(
        'name = "above"\n[base]\nstudy = "below.toml"\nsources = ["lab"]\n'
        "[sources.lab]\ntokens = 1\n[tasks.sepsis]\nprevalence = 0.2\n[training]\nmomentum = 0.5\n"
    )
    below, study = Study.load(tmp_path / "below.toml"), Study.load(above)
    assert (study.name, list(study.sources)) == ("above", ["lab"])
    assert study.sources["lab"] == below.sources["lab"]
    assert list(study.tasks) == [*below.tasks, "sepsis"]
    assert study.training == below.training.model_copy(update={"momentum": 0.5})
    assert study.federation == below.federation
    assert Study.from_toml(study.to_toml()).hash == study.hash


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ('study = "above.toml"', "above.toml is based on itself"),
        ('study = "sub/../above.toml"', "above.toml is based on itself"),
        ('study = "odd.toml"\ntasks = ["pneumonia"]', "unknown task 'pneumonia'"),
        ('study = "nowhere.toml"', "no study at .*nowhere.toml"),
        ('study = "demo"\ntasks = ["pneumonja"]', "unknown task 'pneumonja'; did you mean 'pneumo"),
        ('study = "demo"\ntask = ["pneumonia"]', r"\[base\]: task"),
        ("", r"\[base\]: study"),
    ],
)
def test_a_base_that_cannot_be_is_refused(base: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "odd.toml").write_text("tasks = 3")
    above = tmp_path / "above.toml"
    above.write_text(f'name = "above"\n[base]\n{base}\n')
    with pytest.raises(StudyError, match=said):
        Study.load(above)


def test_a_linear_start_may_be_for_privacy_alone() -> None:
    study = Study.load("adacomed-mortality")
    for private in (True, False):
        settled = resolve(study, sites={"a": 450}, private=private)
        assert (settled.model.linear_start is not None) is private

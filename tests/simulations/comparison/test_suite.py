"""What a suite may say: mistakes and keys without effect are told, narrowed arms stay sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import StudyError
from common.study import Study
from simulations.comparison.suite import Suite, cells, study_of


def studies(arms: Any, base: str = "demo", **changes: Any) -> dict[str, Study]:
    raw = {"name": "x", "study": base, "privacy": ["none"], "arms": arms, **changes}
    study = Study.load(base)
    return {
        f"{cell.row.name}, {cell.arrangement}": study_of(study, cell, {"somewhere": 100})
        for cell in cells(Suite.model_validate(raw), study)
    }


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"study": {"privacy": 3}}, "study.privacy is a section, not 3"),
        ({"study": {"sources": "lab"}}, "study.sources is a section"),
        ({"study": {"evaluation": {"validation_fraction": 0.5}}}, "own evaluation.validation"),
        ({"study": {"federation": {"sites": {"a": {"patients_declared": 9}}}}}, "own federation"),
        ({"study": {"seed": 3}}, "own seed"),
        ({"study": {"model": {"slm": "x"}}, "kind": "haim"}, "model.slm has no effect"),
        ({"study": {"training": {"momentum": 0.1}}, "kind": "dp-logistic"}, "momentum has no"),
    ],
)
def test_what_makes_no_difference_in_an_arm_is_told(arm: Any, told: str) -> None:
    with pytest.raises(StudyError, match=f"arm 'a'.*{told}"):
        studies({"a": arm})


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"key": "evaluation.validation_fraction", "values": [0.1]}, "own evaluation.validation"),
        ({"key": "model.logit_gain", "values": [1.0], "arm": "trees"}, "logit_gain has no effect"),
        ({"key": "data_ratio", "values": ["some"]}, "not in"),
        ({"key": "privacy", "values": [3]}, "privacy is a section"),
    ],
)
def test_what_makes_no_difference_in_a_sweep_is_told(sweep: Any, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        studies({"a": {}, "trees": {"kind": "haim"}}, sweeps={"s": {"arm": "a", **sweep}})


def test_an_arm_may_bring_a_source_of_its_own() -> None:
    extra = {"modality": "embedding", "encoder": "precomputed", "dim": 8}
    arm = {"study": {"sources": {"extra": extra}}}
    found = studies({"a": arm, "b": arm | {"sources": ["extra"]}}, single_sources=["a"])
    assert list(found["a, federated"].sources) == [*Study.load("demo").sources, "extra"]
    assert list(found["b, federated"].sources) == ["extra"]
    assert list(found["a, extra alone, federated"].sources) == ["extra"]


def test_options_that_name_sources_are_narrowed_with_the_arm() -> None:
    groups = {"pictures": ["xray"], "rest": ["lab", "note"]}
    arms: dict[str, Any] = {
        "a": {"model": {"system": "adacomed", "adacomed": {"modalities": groups}}},
        "l": {"model": {"system": "llama-fusion", "llama_fusion": {"vision": ["xray", "lab"]}}},
        "m": {"model": {"system": "m-llm", "m_llm": {"groups": {"xray": "text", "lab": "text"}}}},
    }
    found = studies(
        {
            name: {"study": study, "sources": ["xray", "lab", "note"]}
            for name, study in arms.items()
        },
        ablations=["a", "l", "m"],
    )
    for without, left in (("images", ("lab", "note")), ("notes", ("xray", "lab"))):
        models = {name: found[f"{name}, without {without}, federated"].model for name in "alm"}
        mine = {g: tuple(s for s in sources if s in left) for g, sources in groups.items()}
        assert models["a"].adacomed.modalities == {g: own for g, own in mine.items() if own}
        assert set(models["l"].llama_fusion.vision) == {"xray", "lab"} & set(left)
        assert set(models["m"].m_llm.groups) == {"xray", "lab"} & set(left)
    assert found["a, federated"].model.adacomed.modalities == {
        g: tuple(s) for g, s in groups.items()
    }
    only = {"model": {"system": "adacomed", "adacomed": {"small_modalities": {"x": ["lab"]}}}}
    with pytest.raises(StudyError, match=r"'a, without structured' leaves no source of .*small"):
        studies({"a": {"study": only, "sources": ["lab", "note"]}}, ablations=["a"])


def test_parts_of_an_arm_run_in_the_first_arrangement_of_the_suite() -> None:
    found = studies({"a": {}}, arrangements=["pooled", "local"], single_sources=["a"])
    assert {"a, local", "a, lab alone, pooled"} <= found.keys()
    assert "a, lab alone, local" not in found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": {"a": {"privacy": []}}}, "arms.a.privacy: must not be empty"),
        ({"arms": {"a": {"privacy": [-1.0]}}}, "arms.a.privacy: an epsilon is above 0"),
        ({"arms": {"a": {"seeds": [1, 1]}}}, "arms.a.seeds: names a value twice"),
        ({"arms": {"a": {"arrangements": []}}}, "arms.a.arrangements: must not be empty"),
        ({"sweeps": {"s": {"seeds": []}}}, "sweeps.s.seeds: must not be empty"),
        ({"sweeps": {"s": {"values": [0.5, 0.5]}}}, "sweeps.s.values: names a value twice"),
        ({"sweeps": {"single": {}}}, "cannot be named 'single'"),
        ({"sweeps": {"ablation": {}}}, "cannot be named 'ablation'"),
        ({"arms": {"a": {"kind": "haim", "privacy": [8.0]}}}, "runs without privacy only"),
        ({"arms": {"a": {"kind": "haim"}}, "privacy": [8.0]}, "runs without privacy only"),
    ],
)
def test_wrong_suites_are_told(tmp_path: Path, change: Any, told: str) -> None:
    raw = {"name": "x", "study": "demo", "arms": {"a": {}}, **change}
    sweep = {"arm": "a", "key": "data_ratio", "values": [0.5]}
    raw["sweeps"] = {name: sweep | own for name, own in raw.get("sweeps", {}).items()}
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps(raw))
    with pytest.raises(StudyError, match=told):
        Suite.load(path)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(StudyError, match="is not TOML"):
        Suite.load(tmp_path / "suite.toml")

"""A published adapter, read back and laid over another study's initial one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import StudyError
from common.privacy.pricing import epsilon
from common.study import Study, resolve
from server import publish, report
from server.app import Settings
from server.start import Start, started

LORA = {
    "slm.base_model.model.layers.0.q_proj.lora_A.default.weight": np.ones((2, 4), np.float32),
    "slm.base_model.model.layers.0.q_proj.lora_B.default.weight": np.zeros((4, 2), np.float32),
}


def run(world: Any, out: str, **more: Any) -> Any:
    """A whole run against fake sites, written as the coordinator writes it."""
    finished = world.federation(out, **more).run()
    described = report.build(finished)
    publish.write(world.folder / out, finished.study, finished.adapter, finished.spec, described)
    report.write(world.folder / out, described)
    return finished


@pytest.fixture
def private(world: Any) -> Any:
    """The world with a study under privacy."""
    raw = world.study.model_dump()
    raw["privacy"]["mode"] = "local"
    world.study = resolve(Study.model_validate(raw))
    return world


def test_it_reads_what_a_run_published(world: Any) -> None:
    finished = run(world, "first")
    for folder in (world.folder / "first", world.folder / "first" / "adapter"):
        start = Start.read(folder)
        assert start.study == world.study
        assert start.terms.study == world.study.hash
        content = (world.folder / "first/adapter/projectors.safetensors").read_bytes()
        assert start.terms.adapter == hashlib.sha256(content).hexdigest()
        assert start.arrays.keys() == finished.adapter.keys()
        for name, array in finished.adapter.items():
            np.testing.assert_array_equal(start.arrays[name], array)


def test_arrays_inside_the_language_model_count_and_keep_the_sites_names(world: Any) -> None:
    finished = run(world, "first")
    spec = {**finished.spec, "lora": {"r": 2}}
    described = report.build(finished)
    publish.write(world.folder / "lora", world.study, finished.adapter | LORA, spec, described)
    start = Start.read(world.folder / "lora")
    assert start.arrays.keys() == finished.adapter.keys() | LORA.keys()
    files = sorted((world.folder / "lora" / "adapter").glob("*.safetensors"))
    assert len(files) == 2
    together = b"".join(file.read_bytes() for file in files)  # as cat *.safetensors
    assert start.terms.adapter == hashlib.sha256(together).hexdigest()


def test_the_run_begins_with_it_and_says_so(world: Any) -> None:
    first = run(world, "first")
    study, start = started(world.study, world.folder / "first")
    assert study.hash != world.study.hash
    assert Study.from_toml(study.to_toml()).hash == study.hash
    federation = world.federation("second", run="r2", study=study, start=start)
    federation._start()
    begun = federation._initial()
    for name, array in first.adapter.items():
        np.testing.assert_array_equal(begun[name], array)
    finished = run(world, "third", run="r3", study=study, start=start)
    said = report.read(world.folder / "third").start
    assert said is not None
    assert (said.study, said.adapter) == (world.study.hash, start.terms.adapter)
    assert sorted(said.taken) == sorted(first.adapter) == sorted(finished.progress.taken)


def test_a_resumed_run_still_says_what_was_taken(world: Any) -> None:
    run(world, "first")
    study, start = started(world.study, world.folder / "first")
    run(world, "second", run="r2", study=study, start=start)
    again = world.federation("second", run="r2", study=study, start=start, resume=True).run()
    assert len(again.progress.taken) == 2


def test_without_a_start_nothing_changes(world: Any) -> None:
    finished = run(world, "first")
    assert (finished.start, finished.progress.taken) == (None, [])
    assert report.read(world.folder / "first").start is None
    assert "On top of its start" not in (world.folder / "first/adapter/README.md").read_text()
    assert started(world.study, None) == (world.study, None)


def test_what_does_not_fit_keeps_the_seeds_value(world: Any) -> None:
    run(world, "first")
    start = Start.read(world.folder / "first")
    initial = {
        "bias": np.full(2, 5, np.float32),
        "projectors.age.weight": np.full((4, 9), 5, np.float32),  # another width
        "more": np.full(3, 5, np.float32),
    }
    adapter, taken = start.over(initial)
    assert taken == ["bias"]
    np.testing.assert_array_equal(adapter["bias"], start.arrays["bias"])
    assert adapter["projectors.age.weight"] is initial["projectors.age.weight"]
    assert adapter["more"] is initial["more"]
    assert list(adapter) == list(initial)
    with pytest.raises(StudyError) as told:
        start.over({"head": np.zeros(7, np.float32)})
    assert "bias [2], projectors.age.weight [4, 3]; this study has head [7]" in str(told.value)
    for bad in (np.array([np.nan, 1], np.float32), np.array([1e300, 1])):  # the latter in float32
        start.arrays["bias"] = bad
        with pytest.raises(StudyError, match="'bias' of the start holds values that are not finit"):
            start.over(initial)


def test_another_adapter_than_the_named_one_is_refused(world: Any) -> None:
    run(world, "first")
    other = resolve(world.study, seed=1)
    run(world, "second", run="r2", study=other)
    study, _ = started(world.study, world.folder / "first")
    with pytest.raises(StudyError, match=r"starts from adapter [\s\S]* but .*second holds adapter"):
        started(study, world.folder / "second")
    with pytest.raises(StudyError, match=r"none was given[\s\S]*--start"):
        started(study, None)
    assert started(study, world.folder / "first")[0] == study
    # The arrays of one study beside the file of another.
    adapter = world.folder / "first" / "adapter"
    shutil.copy(world.folder / "second/adapter/study.toml", adapter / "study.toml")
    with pytest.raises(StudyError, match="the arrays beside it were made by study"):
        Start.read(adapter)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_arrays(world: Any, damage: str) -> None:
    run(world, "first")
    study, _ = started(world.study, world.folder / "first")
    path = world.folder / "first" / "adapter" / "projectors.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(StudyError, match=r"cannot be read|but .* holds adapter|holds no published"):
        started(study, world.folder / "first")


def test_what_no_run_wrote_is_named(world: Any) -> None:
    run(world, "first")
    adapter = world.folder / "first" / "adapter"
    (adapter / "study.toml").unlink()
    with pytest.raises(StudyError, match=r"lacks the study.toml[\s\S]*take the folder whole"):
        Start.read(adapter)
    header = b'{"bias":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (adapter / "projectors.safetensors").write_bytes(content)
    with pytest.raises(StudyError, match=r"arrays of type 'BF16'[\s\S]*as the run wrote it"):
        Start.read(adapter)


def test_epsilon_of_both_is_composed_by_population(private: Any) -> None:
    run(private, "first")
    study, start = started(private.study, private.folder / "first")
    assert start is not None
    site = next(iter(study.federation.sites))
    both = start.epsilon_with(study, site)
    delta = study.privacy.delta
    for population in ("train", "validation"):
        of_one = [e for e in study.reserved_events(site) if e.population == population]
        assert both[population] == pytest.approx(epsilon(2 * of_one, delta))
    # A site that the first study did not know has released nothing for it.
    raw = study.model_dump()
    raw["federation"]["sites"]["new"] = {"patients_declared": 100}
    alone = start.epsilon_with(Study.model_validate(raw), "new")
    assert alone["train"] == pytest.approx(epsilon([study.round_event(site)] * study.priced_rounds,
                                                   delta))  # fmt: skip
    # After a first study that itself started from a third, nobody here knows the sum.
    later = Start(start.terms, study, start.arrays)
    assert later.epsilon_with(study, site) is None


def test_the_card_of_a_study_in_a_chain_states_no_sum(private: Any) -> None:
    run(private, "first")
    second, start = started(private.study, private.folder / "first")
    run(private, "second", run="r2", study=second, start=start)
    third, start = started(private.study, private.folder / "second")
    run(private, "third", run="r3", study=third, start=start)
    assert report.read(private.folder / "third").start.epsilon_reserved is None
    text = (private.folder / "third" / "adapter" / "README.md").read_text()
    assert second.hash in text
    assert "no sum can be stated here" in text
    assert "no sum" not in (private.folder / "second" / "adapter" / "README.md").read_text()


def test_the_run_configuration_names_it(world: Any) -> None:
    run(world, "first")
    path = world.folder / "study.toml"
    path.write_text(world.study.to_toml())
    config = {"study": str(path), "out-dir": str(world.folder / "out")}
    assert Settings.read(config).start is None
    settings = Settings.read({**config, "start": str(world.folder / "first")})
    assert settings.start is not None
    assert settings.study.start == settings.start.terms


def test_sums_over_other_studies_enter_the_report_of_a_simulation_only(
    world: Any, tmp_path: Path
) -> None:
    run(world, "first")
    out = world.folder / "first"
    spent = {"train": 1.0004, "validation": float("inf")}
    said = report.attach_ledgers(out, {"alpha": spent})
    assert said.simulation_ledgers == {"alpha": {"train": 1.0004, "validation": None}}
    publish.add_ledgers(out, said)
    publish.add_ledgers(out, said)  # not twice
    text = (out / "adapter" / "README.md").read_text()
    assert text.count("| alpha | 1.001 | ∞ |") == 1
    raw = json.loads((out / "report.json").read_text())
    raw["privacy"]["simulated"] = False
    (out / "report.json").write_text(json.dumps(raw))
    with pytest.raises(report.FedwardError, match="sums over other studies never leave"):
        report.attach_ledgers(out, {"alpha": spent})

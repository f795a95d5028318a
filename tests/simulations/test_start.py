"""A study that starts from another one's adapter at the same hospitals: AdaCoMed's pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site.encoders.registry import dimensions
from client.site.model.system import adapter_state, build
from common.audit.card import read_card
from common.audit.reconcile import reconcile
from common.errors import FedwardError
from common.privacy.book import Book
from common.study import Study, resolve
from server import report
from server.start import Start
from simulations import synthetic_hospitals
from simulations.inline import run_inline
from simulations.run import share_state

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic_hospitals(tmp_path_factory.mktemp("cohort"), 2, patients=40)


def study(shards: dict[str, Path], *, private: bool = True, **options: Any) -> Study:
    """Two small rounds over two sources; `options` are AdaCoMed's."""
    raw = Study.load("demo").model_dump(mode="json")
    for name in set(raw["sources"]) - {"lab", "note"}:
        del raw["sources"][name]
    raw["model"] = {
        "system": "adacomed",
        "adacomed": {"width": 48, "shared_width": 8, "prototypes": 3, **options},
    }
    raw["training"] = {"optimizer": "adam", "learning_rate": 1e-3, "steps_per_round": 2}
    raw["training_without_privacy"] = None
    raw["federation"] |= {"rounds": 2, "quorum": 1.0, "sites": {}}
    sites = dict.fromkeys(shards, 20)
    return resolve(Study.model_validate(raw), sites=sites, private=private)


@pytest.fixture(scope="module")
def trained(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model alone, then the whole, at the same hospitals."""
    base = tmp_path_factory.mktemp("trained")
    run_inline(study(shards, form="small-only"), shards, base / "small", sites=base / "sites")
    run_inline(study(shards), shards, base / "whole", sites=base / "sites", start=base / "small")
    return base


class Stopped(Exception):
    """Before the first round."""


def test_round_0_is_the_small_model_beside_the_seeds_large_one(
    shards: dict[str, Path], trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = {}

    def stop(federation: Any) -> None:
        seen[federation.study.start is None] = dict(federation.adapter)
        raise Stopped

    monkeypatch.setattr("server.federation.Federation._train_round", stop)
    for name, start in (("seeded", None), ("started", trained / "small" / "adapter")):
        with pytest.raises(Stopped):
            run_inline(study(shards), shards, tmp_path / name, start=start)
    published, seeded, begun = Start.read(trained / "small").arrays, seen[True], seen[False]
    assert begun.keys() == seeded.keys()
    small = {n for n in begun if not n.startswith("pathways.large.")}
    assert published.keys() == small
    for name, array in begun.items():
        np.testing.assert_array_equal(array, published[name] if name in small else seeded[name])
    assert not np.array_equal(begun["head.weight"], seeded["head.weight"])


def test_both_studies_are_charged_in_one_ledger_and_compose(
    shards: dict[str, Path], trained: Path
) -> None:
    first, second = (Study.load(trained / out / "study.toml") for out in ("small", "whole"))
    said = report.read(trained / "whole")
    assert second.start == Start.read(trained / "small").terms
    assert second.start.study == first.hash
    assert said.start.study == first.hash
    assert len(said.start.taken) == len(Start.read(trained / "small").arrays)
    for site in said.sites:
        book = Book.read(trained / "sites" / site.name / "ledger.jsonl")
        assert {first.hash, second.hash} == book.studies.keys()
        delta = second.privacy.delta
        both, alone = book.epsilon(delta), book.epsilon(delta, second.hash)
        ledger = said.simulation_ledgers[site.name]
        bound = said.start.epsilon_reserved[site.name]
        for population in ("train", "validation"):
            assert site.epsilon_by_population[population] == pytest.approx(alone[population])
            assert ledger[population] == pytest.approx(both[population])
            assert alone[population] < both[population] < 2 * alone[population]  # not their sum
            assert both[population] <= bound[population]
    assert both["train"] < bound["train"]  # which has the spare rounds


def test_the_card_names_both_studies_and_is_reconciled_with_the_ledgers(trained: Path) -> None:
    first, second = (Study.load(trained / out / "study.toml") for out in ("small", "whole"))
    text = (trained / "whole" / "adapter" / "README.md").read_text()
    statement = text.partition("## Privacy statement")[2].partition("\n## ")[0]
    assert first.hash in statement
    assert second.start.adapter in statement
    assert "On top of its start" in statement
    assert "ε at most 1" in statement  # above the 8 of one study
    assert "## Ledgers of the virtual hospitals" in text
    assert read_card(trained / "whole").study_hash == second.hash
    ledgers = [trained / "sites" / name / "ledger.jsonl" for name in second.federation.sites]
    for out in ("small", "whole"):
        assert reconcile(trained / out, ledgers).valid


def test_a_start_without_privacy_is_never_taken_back(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    """At the same ledgers every figure says so; at others, at least the card does."""
    small = study(shards, form="small-only", private=False)
    run_inline(small, shards, tmp_path / "small", sites=tmp_path / "sites")
    same = run_inline(
        study(shards),
        shards,
        tmp_path / "same",
        sites=tmp_path / "sites",
        start=tmp_path / "small",
    )
    other = run_inline(study(shards), shards, tmp_path / "other", start=tmp_path / "small")
    nothing = {"train": None, "validation": None}
    for said in (same, other):
        assert said.start.mode == "none"
        assert said.start.epsilon_reserved == dict.fromkeys(shards, nothing)
    assert same.simulation_ledgers == dict.fromkeys(shards, nothing)
    assert {site.epsilon for site in same.sites} == {None}
    assert None not in {site.epsilon for site in other.sites}
    for out in ("same", "other"):
        text = (tmp_path / out / "adapter" / "README.md").read_text()
        assert "for its patients ε is infinite" in text


def test_another_shared_width_leaves_head_and_projection_to_the_seed(
    shards: dict[str, Path], trained: Path
) -> None:
    wide = study(shards, shared_width=16)
    seeded = adapter_state(build(wide, dimensions(wide)))
    adapter, taken = Start.read(trained / "small").over(seeded)
    assert {name.split(".")[0] for name in taken} == {"pathways", "head"}  # head: its bias alone
    assert [name for name in taken if name.startswith("head")] == ["head.bias"]
    assert all(adapter[n] is seeded[n] for n in seeded if n not in taken)


def test_state_that_lies_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    share_state(tmp_path / "out", tmp_path / "a")
    share_state(tmp_path / "out", tmp_path / "a")
    with pytest.raises(FedwardError, match=r"keep their state in .*/a"):
        share_state(tmp_path / "out", tmp_path / "b")
    (tmp_path / "own" / "sites").mkdir(parents=True)
    with pytest.raises(FedwardError, match="keep their state in"):
        share_state(tmp_path / "own", tmp_path / "a")


def test_state_is_not_kept_within_the_run_that_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for inside in ("out", "out/kept"):
        with pytest.raises(FedwardError, match=r"--overwrite would delete it[\s\S]*outside --out"):
            share_state(tmp_path / "out", tmp_path / inside)
    share_state(tmp_path / "out", tmp_path / "out" / "sites")  # where it is anyway

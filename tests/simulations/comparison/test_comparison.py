"""`fedward compare` on tiny hospitals: the matrix, the same patients everywhere, resume, tables."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tomli_w
import typer
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from typer.testing import CliRunner

from client.site.shard import Shard
from common.errors import EncoderError, FedwardError, StudyError
from common.study import Study
from common.systems.adacomed import PRESETS, AdaCoMed
from simulations.comparison import plots
from simulations.comparison import run as runner
from simulations.comparison.data import Cohort, alone, fingerprint
from simulations.comparison.execute import execute
from simulations.comparison.inside import check_maps
from simulations.comparison.measures import measure
from simulations.comparison.suite import SUITES, Arm, Suite, cells, rows, study_of
from simulations.comparison.tables import Table, spread, tables

pytestmark = pytest.mark.timeout(400)

SMALL = {"width": 48, "shared_width": 8, "prototypes": 3}


@pytest.fixture(scope="module")
def base(two_sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = two_sources
    raw["training"]["steps_per_round"] = 2
    raw["training_without_privacy"] = {"learning_rate": 1e-3, "steps_per_round": 2}
    raw["federation"] |= {"rounds": 2, "quorum": 1.0, "sites": {}}
    path = tmp_path_factory.mktemp("study") / "base.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def suite(base: Path, **changes: Any) -> Suite:
    model = {"system": "adacomed", "adacomed": SMALL}
    first = {"system": "adacomed", "adacomed": SMALL | {"form": "small-only"}}
    raw = {
        "name": "tiny",
        "study": str(base),
        "reference": "trees",
        "privacy": ["none", 8.0],
        "arrangements": ["federated", "pooled", "local"],
        "arms": {
            "trees": {"kind": "haim"},
            "whole": {"study": {"model": model}},
            "small": {"study": {"model": first}, "arrangements": ["federated"]},
            "after": {"study": {"model": model}, "arrangements": ["federated"], "after": "small"},
        },
    }
    return Suite.model_validate({**raw, **changes})


@pytest.fixture(scope="module")
def done(
    base: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Suite, Any, Any]:
    out = tmp_path_factory.mktemp("out")
    chosen = suite(base, maps=["whole"])
    jobs, cohort = runner.plan(chosen, Study.load(base), shards, out)
    runner.run(jobs, cohort, 1, Console(quiet=True))
    runner.report(chosen, jobs, cohort, out, "fedward compare tiny")
    return out, chosen, jobs, cohort


def test_every_cell_has_a_result_and_the_same_held_out_patients(done: Any) -> None:
    _, _, jobs, _ = done
    found = runner.results(jobs)
    assert len(found) == len(jobs) == 3 + 6 + 2 + 2
    assert not [r["error"] for r in found if "error" in r]
    assert len({(r["patients"], r["records"]) for r in found}) == 1
    labels = [np.load(j.folder / "scores.npz")["labels"] for j in jobs]
    positives = {tuple((one == 1).sum(axis=0)) for one in labels}
    assert len(positives) == 1, "pooled, local and federated hold out the same records"


@pytest.fixture(scope="module")
def single(
    base: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Suite, Any, Any]:
    """Trees alone, which are quick: all sources and each by itself; hospitals as on disk."""
    out = tmp_path_factory.mktemp("single")
    chosen = suite(
        base,
        privacy=["none"],
        arrangements=["federated"],
        arms={"trees": {"kind": "haim"}},
        single_sources=["trees"],
    )
    jobs, cohort = runner.plan(chosen, Study.load(base), dict(sorted(shards.items())), out)
    runner.run(jobs, cohort, 1, Console(quiet=True))
    runner.report(chosen, jobs, cohort, out, "fedward compare tiny")
    return out, chosen, jobs, cohort


def test_a_source_alone_is_scored_on_the_records_that_lack_it_too(single: Any) -> None:
    _, _, jobs, cohort = single
    records = pl.concat(
        Shard.open(path).records.filter(pl.col("population") == "validation")
        for path in cohort.hospitals("pooled", 0).shards.values()
    )
    measured = {
        r["row"]: r for r in runner._on_the_same_records(runner.results(jobs), jobs, cohort)
    }
    for job in jobs:
        result, stored = measured[job.cell.row.name], np.load(job.folder / "scores.npz")
        assert (result["patients"], result["records"]) == (
            records["patient_id"].n_unique(),
            records.height,
        )
        for column, (task, values) in enumerate(result["tasks"].items()):
            own, all_ = stored["labels"][:, column], records[f"y_{task}"].drop_nulls()
            here = {v: np.sum(own == v) for v in (0, 1)}
            unread = [v for v in (0, 1) for _ in range((all_ == bool(v)).sum() - here[v])]
            y = [*own[own >= 0], *unread]
            score = [*stored["logits"][own >= 0, column], *np.zeros(len(unread))]
            assert values["support"] == len(y)
            if len(set(y)) == 2:
                assert values["auroc"] == pytest.approx(roc_auc_score(y, score))
    note = next(j for j in jobs if j.cell.row.value == "note")
    assert len(np.load(note.folder / "scores.npz")["labels"]) < records.height, "some have no note"


def test_privacy_is_charged_and_pretraining_stands_in_the_same_ledgers(done: Any) -> None:
    _, _, jobs, _ = done
    spent = {
        (j.cell.row.name, j.cell.privacy): json.loads((j.folder / "cell.json").read_text())
        for j in jobs
        if j.cell.row.arm.kind == "system" and j.cell.arrangement == "federated"
    }
    assert all(0 < e <= 8 for e in spent["whole", 8.0]["epsilon"].values())
    assert set(spent["whole", "none"]["epsilon"].values()) == {None}
    after = next(j for j in jobs if j.cell.row.name == "after" and j.cell.privacy == 8.0)
    report = json.loads((after.folder / "run" / "report.json").read_text())
    both = [ledger["train"] for ledger in report["simulation_ledgers"].values()]
    own = [site["epsilon_by_population"]["train"] for site in report["sites"]]
    assert all(b > o for b, o in zip(both, own, strict=True)), "composed with the pre-training"


def test_tables_and_plots_are_written(done: Any) -> None:
    out, _, _, _ = done
    with (out / "tables" / "main.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(row["row"], row["patients"]) for row in lines][:3] == [
        ("trees", "federated"),
        ("trees", "pooled"),
        ("trees", "local"),
    ]
    assert lines[0]["ε = 8 mean"] == "", "trees have no privacy"
    assert 0 <= float(lines[0]["no privacy mean"]) <= 1
    assert lines[0]["no privacy n"] == "1"
    assert {p.name for p in (out / "plots").iterdir()} >= {"main.png", "weights.png"}
    assert any(p.name.startswith("map-whole") for p in (out / "plots").iterdir())
    text = (out / "summary.md").read_text()
    for title in ("Macro AUROC", "All measures", "Costs", "less that of trees"):
        assert title in text


def test_the_same_command_does_only_what_is_left(
    done: Any, base: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, chosen, jobs, _ = done
    again, cohort = runner.plan(chosen, Study.load(base), shards, out)
    assert [j.identity for j in again] == [j.identity for j in jobs]

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(runner.multiprocessing, "get_context", never)
    runner.run(again, cohort, 1, Console(quiet=True))
    other = chosen.model_copy(update={"seeds": (1,)})
    moved, _ = runner.plan(other, Study.load(base), shards, out)
    assert not {j.identity for j in moved} & {j.identity for j in jobs}
    whole = chosen.arms["whole"].model_copy(update={"arrangements": ("pooled",)})
    fewer = chosen.model_copy(update={"arms": {**chosen.arms, "whole": whole}})
    left, _ = runner.plan(fewer, Study.load(base), shards, out)
    kept = {j.identity for j in left}
    assert kept < {j.identity for j in jobs}, "a cell is the same in a suite that has fewer"


def test_a_smaller_share_keeps_whole_patients_and_all_who_validate(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    cohort = Cohort(shards, 0.25, tmp_path)
    kept: dict[float, set[str]] = {}
    held: dict[float, set[str]] = {}
    for ratio in (1.0, 0.5, 0.2):
        hospitals = cohort.hospitals("federated", 0, ratio)
        records = pl.concat(
            [
                Shard.open(path).records.select(
                    pl.format(f"{name}/{{}}", "patient_id").alias("patient_id"), "population"
                )
                for name, path in hospitals.shards.items()
            ]
        )
        groups = dict(records.group_by("population").agg(pl.col("patient_id").unique()).iter_rows())
        kept[ratio], held[ratio] = set(groups["train"]), set(groups["validation"])
        assert held[ratio] == held[1.0]
        assert all(0 < d <= 40 for d in hospitals.declared.values())
    assert kept[0.2] < kept[0.5] < kept[1.0]


def test_copies_that_were_cut_off_are_made_again(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off where images are linked; no half of a shard stands under its name."""
    link = Path.symlink_to

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for arrangement, ratio in (("pooled", 1.0), ("federated", 1.0), ("federated", 0.5)):
        monkeypatch.setattr(Path, "symlink_to", cut)
        cohort = Cohort(shards, 0.25, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            cohort.hospitals(arrangement, 0, ratio)  # type: ignore[arg-type]
        place = tmp_path / "seed-0" / ("pooled" if arrangement == "pooled" else "sites")
        assert not list((place / ("shards" if ratio == 1 else f"shards-{ratio}")).glob("[!.]*"))
        monkeypatch.setattr(Path, "symlink_to", link)
        made = cohort.hospitals(arrangement, 0, ratio)  # type: ignore[arg-type]
        for path in made.shards.values():
            assert not Shard.open(path).check_images()
    old = tmp_path / "seed-0" / "sites" / "shards-0.2" / next(iter(shards))
    (old / "images").mkdir(parents=True)
    assert (cohort.hospitals("federated", 0, 0.2).shards[old.name] / "shard.toml").exists()


def test_another_image_makes_other_cells(shards: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "hospital"
    shutil.copytree(next(iter(shards.values())), copy)
    before = fingerprint({"a": copy})
    assert fingerprint({"a": copy}) == before
    image = next((copy / "images").rglob("*.*"))
    image.write_bytes(image.read_bytes() + b" ")
    assert fingerprint({"a": copy}) != before


def test_measures_are_scikit_learns_and_none_where_undefined() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 2))
    labels = rng.integers(0, 2, size=(60, 2)).astype(np.int8)
    labels[:10, 0], labels[:, 1] = -1, 1
    found = measure(logits, labels, np.arange(60), ["a", "b"])
    known = labels[:, 0] >= 0
    y, score = labels[known, 0], logits[known, 0]
    assert found["tasks"]["a"]["auroc"] == pytest.approx(roc_auc_score(y, score))
    assert found["tasks"]["a"]["accuracy"] == pytest.approx(accuracy_score(y, score >= 0))
    assert found["tasks"]["a"]["f1"] == pytest.approx(f1_score(y, score >= 0))
    assert found["tasks"]["b"]["auroc"] is None
    assert found["macro"]["auroc"] == found["tasks"]["a"]["auroc"]


def test_rows_of_sweeps_single_sources_and_ablations(base: Path) -> None:
    chosen = suite(
        base,
        single_sources=["whole"],
        ablations=["whole"],
        sweeps={
            "contrast": {
                "arm": "whole",
                "key": "model.adacomed.contrast_weight",
                "values": [0.0, 0.5],
            },
            "share": {"arm": "whole", "key": "data_ratio", "values": [0.5, 1.0]},
        },
    )
    found = {row.name: row for row in rows(chosen, Study.load(base))}
    assert found["whole, lab alone"].arm.sources == ("lab",)
    assert found["whole, without notes"].arm.sources == ("lab",)
    swept = found["whole, contrast 0.5"].arm.study["model"]
    assert swept["adacomed"]["contrast_weight"] == 0.5
    assert swept["adacomed"]["width"] == 48
    assert found["whole, share 0.5"].ratio == 0.5
    assert not [c for c in cells(chosen, Study.load(base)) if c.row.base == "trees" and c.epsilon]
    twice = found["whole"].arm.model_copy(update={"arrangements": ("pooled", "federated")})
    both = chosen.model_copy(update={"arms": {**chosen.arms, "whole": twice}})
    placed = {(c.row.name, c.arrangement) for c in cells(both, Study.load(base))}
    assert {("whole", "federated"), ("whole, lab alone", "pooled")} <= placed
    assert ("whole, lab alone", "federated") not in placed


def test_a_failed_cell_is_told_and_the_others_stand() -> None:
    good = {"row": "a", "arm": "a", "group": "", "privacy": "none", "arrangement": "federated"}
    macro = dict.fromkeys(("accuracy", "auroc", "auprc", "precision", "recall", "f1"), 0.75)
    rest = {"macro": macro, "tasks": {}, "seconds": 1.0, "peak_memory_bytes": 1, "interval": None}
    results = [{**good, **rest, "seed": 0}, {**good, "seed": 1, "error": "no room"}]
    chosen = Suite(name="x", study="demo", arms={"a": {}})
    main = tables(chosen, results)[0]
    assert main.rows[0]["no privacy"] == ".750 (1 failed)"
    assert spread([results[0], {**results[0], "macro": {**macro, "auroc": 0.85}}], _auroc) == (
        ".800 ± .071"
    )


def _auroc(result: Any) -> float:
    return float(result["macro"]["auroc"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reference": "tres"}, "no arm 'tres'"),
        ({"arms": {"a": {"kind": "forest"}}, "reference": None}, "kind"),
        ({"arm": {}}, "arm"),
        ({"privacy": []}, "must not be empty"),
        ({"privacy": [-3.0]}, "above 0"),
        ({"seeds": [1, 1]}, "twice"),
        ({"arms": {"a/b": {}}, "reference": None}, "a/b"),
    ],
)
def test_wrong_suites_are_told(base: Path, tmp_path: Path, change: Any, told: str) -> None:
    raw = {"name": "x", "study": str(base), "reference": "a", "arms": {"a": {}}, **change}
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps({k: v for k, v in raw.items() if v is not None}))
    with pytest.raises(StudyError, match=told):
        Suite.load(path)


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"study": {"model": {"system": "adacomet"}}}, "arm 'a': .*unknown system 'adacomet'"),
        ({"study": {"model": {"sytem": "adacomed"}}}, "arm 'a': .*unknown key"),
        ({"sources": ["labs"]}, "labs"),
        (
            {"study": {"model": {"system": "m-llm", "m_llm": {"groups": {"labs": "text"}}}}},
            "arm 'a': unknown source 'labs'",
        ),
        ({"study": {"privacy": {"mode": "none"}}}, "its own privacy.mode"),
        ({"kind": "dp-logistic"}, "knows one task"),
    ],
)
def test_wrong_arms_are_told_before_anything_runs(
    base: Path, shards: dict[str, Path], tmp_path: Path, arm: Any, told: str
) -> None:
    chosen = Suite.model_validate({"name": "x", "study": str(base), "arms": {"a": arm}})
    with pytest.raises(FedwardError, match=told):
        runner.plan(chosen, Study.load(base), shards, tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_sweep_without_effect_is_told(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    sweep = {"arm": "whole", "key": "training.learning_rate", "values": [0.01, 60.0]}
    chosen = suite(base, sweeps={"rate": {**sweep, "privacy": ["none"]}})
    with pytest.raises(StudyError, match="the sweep's key has no effect"):
        runner.plan(chosen, Study.load(base), shards, tmp_path)


@pytest.mark.parametrize("arm", ["trees", "small"])
def test_maps_of_arms_without_two_pathways_are_refused(
    base: Path, shards: dict[str, Path], tmp_path: Path, arm: str
) -> None:
    chosen = suite(base, arrangements=["federated"], maps=["whole", arm])
    jobs, _ = runner.plan(chosen, Study.load(base), shards, tmp_path)
    check_maps(["whole"], jobs)
    with pytest.raises(StudyError, match=f"maps: arm '{arm}' has no large and small pathway"):
        check_maps(chosen.maps, jobs)


def test_a_picture_that_fails_costs_no_table(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, chosen, jobs, cohort = single

    def broken(*_: Any) -> None:
        raise ValueError("no colours left")

    with monkeypatch.context() as patched:
        patched.setattr(plots, "_bars", broken)
        runner.report(chosen, jobs, cohort, out, "fedward compare tiny")
    text = (out / "summary.md").read_text()
    assert "main: not drawn: no colours left" in text
    assert "Macro AUROC" in text
    runner.report(chosen, jobs, cohort, out, "fedward compare tiny")
    assert "not drawn" not in (out / "summary.md").read_text()
    with pytest.raises(FedwardError, match="1 held-out records"):
        plots.plot_map(np.ones((2, 1, 4)), np.ones(1), "death", out / "map.png")


@pytest.mark.parametrize("text", ["[]", "null", "{", "no macro", "no scores"])
def test_half_a_cell_is_done_again(single: Any, text: str) -> None:
    _, _, jobs, _ = single
    where = {"no scores": "scores.npz"}.get(text, "cell.json")
    assert runner.stored(jobs[0])
    path = jobs[0].folder / where
    before = path.read_bytes()
    try:
        if text == "no scores":
            path.unlink()
        elif text == "no macro":
            path.write_text(json.dumps({"identity": jobs[0].identity}))
        else:
            path.write_text(text)
        assert runner.stored(jobs[0]) is None
        assert len(runner.results(jobs)) == len(jobs) - 1
    finally:
        path.write_bytes(before)


def test_a_part_is_run_with_what_it_starts_from_and_all_is_reported(
    done: Any, base: Path, shards: dict[str, Path]
) -> None:
    _, _, jobs, _ = done
    part = {j.cell.row.name for j in runner.wanted(jobs, ["after"])}
    assert part == {"small", "after"}
    assert runner.wanted(jobs, ()) == jobs
    assert {j.cell.row.name for j in runner.wanted(jobs, ["trees"])} == {"trees"}


def test_only_keeps_the_other_arms_tables_and_old_ones_go(
    single: Any, base: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.comparison.cli import compare

    out, chosen, _, _ = single
    arms = {**chosen.arms, "more": chosen.arms["trees"]}
    more = chosen.model_copy(update={"arms": arms})
    path = out / "suite.toml"
    path.write_text(tomli_w.dumps(more.model_dump(mode="json", exclude_none=True)))
    (out / "tables" / "group-old.csv").write_text("x")
    (out / "plots" / "old.png").write_text("x")
    app = typer.Typer()
    app.command()(compare)
    folder = next(iter(shards.values())).parent
    arguments = [str(path), "--shards", str(folder), "--out", str(out)]
    monkeypatch.setattr(runner, "run", lambda *_: None)
    said = CliRunner().invoke(app, [*arguments, "--only", "more"])
    assert said.exit_code == 0, said.output
    with (out / "tables" / "group-single.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3, "of trees, which did not run"
    assert not (out / "tables" / "group-old.csv").exists()
    assert not (out / "plots" / "old.png").exists()


def test_another_study_has_a_folder_of_its_own(
    base: Path, shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.comparison.cli import compare

    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(compare)
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps({"name": "x", "study": "demo", "arms": {"a": {}}}))
    arguments = [str(path), "--shards", str(next(iter(shards.values())).parent), "--dry-run"]
    said = CliRunner().invoke(app, [*arguments, "--study", str(base)])
    assert said.exit_code == 0, said.output
    assert [p.name for p in (tmp_path / "runs" / "compare").iterdir()] == [f"x-{base.stem}"]


def result(row: str, seed: int, auroc: float | None = 0.75, **more: Any) -> dict[str, Any]:
    """Of a cell; without an AUROC it has failed."""
    found = {"row": row, "arm": row.partition(",")[0], "group": "", "privacy": "none", "seed": seed}
    found |= {"arrangement": "federated"}
    if auroc is None:
        return {**found, "error": "no room", **more}
    macro = dict.fromkeys(("accuracy", "auroc", "auprc", "precision", "recall", "f1"), auroc)
    found |= {"macro": macro, "tasks": {}, "seconds": 1.0, "peak_memory_bytes": 1, "interval": None}
    return {**found, **more}


def named(suite: Suite, results: Any) -> dict[str, Table]:
    return {table.name: table for table in tables(suite, results)}


def test_a_row_that_lacks_seeds_says_so_and_a_csv_holds_numbers() -> None:
    arms = {"a": Arm(), "b": Arm(seeds=(0,))}
    chosen = Suite(name="x", study="demo", seeds=(0, 1, 2), arms=arms)
    some = [result("a", 0, 0.7), result("a", 1, 0.8), result("b", 0, interval=[0.7, 0.8])]
    found = named(chosen, some)
    assert [r["no privacy"] for r in found["main"].rows] == [
        ".750 ± .071 (2 of 3)",
        ".750 (.700–.800)",
    ]
    assert found["measures"].rows[0]["accuracy"] == ".750 ± .071 (2 of 3)"
    failed = named(chosen, [*some, result("a", 2, None)])["main"]
    assert failed.rows[0]["no privacy"] == ".750 ± .071 (2 of 3, 1 failed)"
    first, second = csv.DictReader(failed.csv().splitlines())
    assert (first["row"], first["no privacy n"], first["no privacy failed"]) == ("a", "2", "1")
    assert float(first["no privacy mean"]) == pytest.approx(0.75)
    assert float(first["no privacy sd"]) == pytest.approx(0.0707, abs=1e-4)
    assert (second["no privacy sd"], second["no privacy low"]) == ("", "0.7")
    (cost, _) = csv.DictReader(found["costs"].csv().splitlines())
    assert cost["seconds in all"] == "1.0"


def test_a_failure_stands_in_the_groups_table_and_whole_values_are_whole() -> None:
    sweep = {"arm": "a", "key": "model.adacomed.width", "values": [64.0, 0.5]}
    chosen = Suite.model_validate(
        {"name": "x", "study": "demo", "arms": {"a": {}}, "sweeps": {"width": sweep}}
    )
    group: dict[str, Any] = {"group": "width", "arm": "a"}
    own = [result("a, width 64.0", 0, None, **group, value=64.0)]
    own += [result("a, width 0.5", 0, **group, value=0.5)]
    swept = named(chosen, own)["group-width"]
    assert [r["model.adacomed.width"] for r in swept.rows] == ["64", "0.5"]
    assert [r["macro AUROC"] for r in swept.rows] == ["failed", ".750"]


def test_a_reference_that_is_arranged_otherwise_is_still_compared() -> None:
    arms = {"a": Arm(), "trees": Arm()}
    chosen = Suite(name="x", study="demo", reference="trees", arms=arms)
    some = [result("a", 0, 0.7), result("trees", 0, 0.8, arrangement="pooled")]
    found = named(chosen, some)["differences"]
    assert [(r["row"], r["difference"]) for r in found.rows] == [("a", "-0.100")]
    assert "trees was not run federated, its pooled run stands for it" in found.note
    both = [*some, result("trees", 0, 0.6)]
    same = named(chosen, both)["differences"]
    assert same.rows[0]["difference"] == "+0.100"
    assert "stands for it" not in same.note


def test_bars_are_the_interval_of_one_seed_and_the_deviation_of_several() -> None:
    one = result("a", 0, 0.75, interval=[0.7, 0.85])
    assert plots._bar([one]) == pytest.approx((0.05, 0.1))
    assert plots._bar([one, result("a", 1, 0.85)]) == pytest.approx((0.0707, 0.0707), abs=1e-4)


def test_arms_may_have_other_tasks() -> None:
    macro = dict.fromkeys(("accuracy", "auroc", "auprc", "precision", "recall", "f1"), 0.75)
    rest = {"privacy": "none", "arrangement": "federated", "seed": 0, "group": "", "macro": macro}
    rest |= {"seconds": 1.0, "peak_memory_bytes": 1, "interval": None}
    task = {"auroc": 0.7, "precision": 0.7, "recall": 0.7}
    results = [
        {**rest, "row": "a", "arm": "a", "tasks": {"death": task, "stay": task}},
        {**rest, "row": "b", "arm": "b", "tasks": {"stay": task}},
    ]
    chosen = Suite(name="x", study="demo", arms={"a": Arm(), "b": Arm()})
    by_task = next(t for t in tables(chosen, results) if t.name == "tasks-auroc")
    assert [row["b"] for row in by_task.rows] == ["–", ".700"]


def test_one_command_at_a_time_writes_into_a_folder(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    code = "import sys; from pathlib import Path; from simulations.comparison.data import alone\n"
    code += "with alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with (
            pytest.raises(FedwardError, match=f"another command writes into {tmp_path}"),
            alone(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
    with alone(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_cell_does_not_outlive_its_parent() -> None:
    """A parent that is killed runs no handler."""
    code = "import multiprocessing, os, time\nfrom simulations.comparison import run\n"
    code += "def cell(): run._settle(); print(os.getpid(), flush=True); time.sleep(300)\n"
    code += "if __name__ == '__main__':\n"
    code += "    multiprocessing.get_context('forkserver').Process(target=cell).start()\n"
    code += "    time.sleep(300)\n"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "parent.py"
        script.write_text(code)
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            parent.kill()
            parent.wait()
        gone = Path(f"/proc/{child}")
        for _ in range(100):
            if not gone.exists() or ") Z " in (gone / "stat").read_text():
                return
            time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        pytest.fail("the cell goes on without its parent")


def test_the_command_lists_its_cells(base: Path, shards: dict[str, Path], tmp_path: Path) -> None:
    from simulations.comparison.cli import compare

    app = typer.Typer()
    app.command()(compare)
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps({"name": "x", "study": str(base), "arms": {"a": {}}}))
    folder = next(iter(shards.values())).parent
    said = CliRunner().invoke(
        app, [str(path), "--shards", str(folder), "--out", str(tmp_path / "o"), "--dry-run"]
    )
    assert said.exit_code == 0, said.output
    assert "a_eps2_federated_0" in said.output
    assert "3 cells" in said.output


def test_ready_suites_fit_their_studies() -> None:
    from importlib import resources

    names = [f.name for f in resources.files(SUITES).iterdir() if f.name.endswith(".toml")]
    assert names
    for name in names:
        chosen = Suite.load(name.removesuffix(".toml"))
        study = Study.load(chosen.study)
        for cell in cells(chosen, study):
            study_of(study, cell, {"somewhere": 100})


def test_a_preset_in_an_arm_is_laid_over_a_study_that_spells_everything_out() -> None:
    """Under what the arm itself writes, whatever the base has; also as a sweep."""
    raw = Study.load("demo").model_dump(mode="json")
    raw["model"] |= {"system": "adacomed", "adacomed": {"preset": "vital-12", "width": 96}}
    base = Study.model_validate(raw)
    own = {"preset": "mortality", "shared_width": 64}
    chosen = Suite.model_validate(
        {
            "name": "x",
            "study": "demo",
            "privacy": [8.0],
            "arms": {"a": {"study": {"model": {"adacomed": own}}}},
            "sweeps": {
                "s": {"arm": "a", "key": "model.adacomed.preset", "values": ["readmission"]}
            },
        }
    )
    made = [study_of(base, cell, {"somewhere": 100}) for cell in cells(chosen, base)]
    for study, preset in zip(made, ("mortality", "readmission"), strict=True):
        assert study.model.adacomed == AdaCoMed(
            **{**PRESETS[preset], "shared_width": 64, "width": 96}
        )


def test_contrast_within_the_batch_trains_in_the_column_without_privacy_alone() -> None:
    """Of a study under privacy too; no column, sweep or preset lets it in under ε."""
    model = {"system": "adacomed", "adacomed": {"negatives": "batch", "preset": "mortality"}}
    arms = {
        "batch": {"study": {"model": model}},
        "plain": {"study": {"model": {"system": "adacomed"}}},
    }
    sweep = {"arm": "plain", "key": "model.adacomed.negatives", "values": ["batch"]}
    chosen = Suite.model_validate(
        {
            "name": "x",
            "study": "demo",
            "privacy": ["none", 8.0],
            "arms": arms,
            "sweeps": {"n": sweep},
        }
    )
    study, seen = Study.load("demo"), 0
    assert study.privacy.mode == "local"
    for cell in cells(chosen, study):
        if cell.row.name == "plain":
            continue
        seen += 1
        if cell.privacy == "none":
            assert study_of(study, cell, {"somewhere": 100}).privacy.mode == "none"
        else:
            with pytest.raises(StudyError, match="negatives = 'batch' puts every patient into"):
                study_of(study, cell, {"somewhere": 100})
    assert seen == 4


@pytest.mark.parametrize(
    ("study", "told"),
    [
        ({"model": {"lora": {"rank": 2, "targets": ["qq_proj"]}}}, "no matrix 'qq_proj' for LoRA"),
        ({"model": {"slm": "/nowhere"}}, "/nowhere has no config.json"),
        ({"sources": {"lab": {"series": ["sodum"]}}}, "sodum"),
        ({"sources": {"note": {"encoder": "hashd"}}}, "hashd"),
        ({"tasks": {"gout": {}}}, "unknown task 'gout'"),
        (
            {"model": {"system": "adacomed", "adacomed": {"modalities": {"x": ["labs"]}}}},
            "unknown source 'labs'",
        ),
        (
            {"model": {"system": "llama-fusion", "llama_fusion": {"vision": ["mri"]}}},
            "no source 'mri'",
        ),
        ({"model": {"system": "m-llm", "m_llm": {"groups": {"ecg": "text"}}}}, "source 'ecg'"),
    ],
)
def test_what_an_arm_cannot_build_or_read_is_told_before_anything_runs(
    base: Path, shards: dict[str, Path], tmp_path: Path, study: Any, told: str
) -> None:
    arms = {"good": {}, "a": {"study": study}}
    chosen = Suite.model_validate({"name": "x", "study": str(base), "arms": arms})
    with pytest.raises(FedwardError, match=f"^arm 'a': .*{told}"):
        runner.plan(chosen, Study.load(base), shards, tmp_path)


def test_a_failed_cell_says_why_the_hospitals_declined(
    base: Path, shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Suite.model_validate({"name": "x", "study": str(base), "arms": {"a": {}}})
    (task, *_), cohort = runner.plan(chosen, Study.load(base), shards, tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        raise EncoderError("no such weights", cure="copy them")

    monkeypatch.setattr("client.site.daemon.hospital.encode_site", broken)
    error = execute(task, cohort)["error"]
    assert "riverside, northgate: no such weights\n    cure: copy them" in error, error


@pytest.fixture(scope="module")
def one_task(base: Path) -> Path:
    raw = Study.load(base).model_dump(mode="json", exclude_none=True)
    raw["tasks"] = dict([next(iter(raw["tasks"].items()))])
    path = base.parent / "one.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def test_logistic_regression_reads_the_arms_sources_and_scores_what_the_others_score(
    one_task: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    logistic = {"kind": "dp-logistic", "arrangements": ["federated", "local"]}
    arms = {
        "trees": {"kind": "haim", "privacy": ["none"]},
        "whole": logistic,
        "lab": logistic | {"sources": ["lab"]},
        "short": logistic | {"study": {"privacy": {"max_grad_norm": 1e-6}}},
    }
    chosen = Suite.model_validate(
        {"name": "x", "study": str(one_task), "privacy": ["none", 8.0], "arms": arms}
    )
    jobs, cohort = runner.plan(chosen, Study.load(one_task), shards, tmp_path)
    found = {job.cell.id: execute(job, cohort) for job in jobs}
    assert not [result["error"] for result in found.values() if "error" in result]
    every = {job.cell.id: np.load(job.folder / "scores.npz") for job in jobs}
    trees = every["trees_none_federated_0"]
    assert len(set(trees["patients"])) < len(trees["patients"]), "some have several records"
    for name, one in every.items():
        if not name.startswith("lab"):
            np.testing.assert_array_equal(one["labels"], trees["labels"])
            same = [np.unique(some["patients"], return_inverse=True)[1] for some in (one, trees)]
            np.testing.assert_array_equal(*same)
    widths = {name: found[f"{name}_none_federated_0"]["parameters"] for name in ("whole", "lab")}
    assert 0 < widths["lab"] < widths["whole"]
    short, whole = (
        np.abs(every[f"{name}_eps8_federated_0"]["logits"]).max() for name in ("short", "whole")
    )
    assert short < 1e-3 * whole, "the arm's own bound is the one that holds"

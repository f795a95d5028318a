"""Prevalences, the ceiling, and that no source is enough by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from simulations.cohort import latent
from simulations.cohort.calibrate import expected_auroc
from simulations.cohort.latent import FINDINGS, KNOWN, PREVALENCE, TASKS, Population
from simulations.cohort.plain import aurocs, load, records
from simulations.cohort.profiles import PROFILES
from simulations.cohort.truth import auroc


@pytest.fixture(scope="module")
def populations() -> list[Population]:
    """The first four hospitals with 2,500 patients each, without their tables and images."""
    return [
        latent.simulate(profile, 2_500, np.random.default_rng([11, index]))
        for index, profile in enumerate(list(PROFILES.values())[:4])
    ]


@pytest.mark.parametrize("task", TASKS)
def test_prevalence_is_that_of_table_1(task: str, populations: list[Population]) -> None:
    risk = np.concatenate([p.studies.risk[:, TASKS.index(task)] for p in populations])
    assert risk.mean() == pytest.approx(PREVALENCE[task], abs=0.01)
    assert 0.88 < expected_auroc(risk) < 0.93


def test_labels_are_drawn_from_the_risk(populations: list[Population]) -> None:
    risk = np.concatenate([p.studies.risk[:, : len(FINDINGS)] for p in populations])
    label = np.concatenate([p.studies.label for p in populations])
    known = label >= 0
    assert known.mean() == pytest.approx(KNOWN, abs=0.01)
    assert (label == -1).mean() == pytest.approx(0.6 * 0.15, abs=0.01)
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        here = known & (risk >= low) & (risk < high)
        assert label[here].mean() == pytest.approx(risk[here].mean(), abs=0.02)


def test_deaths_and_discharges_follow_the_risk(populations: list[Population]) -> None:
    """Of the 48 hours after each image: the stay's end, drawn beforehand, agrees with the risk."""
    for task, died in (("mortality_48h", True), ("length_of_stay", False)):
        risk, happened = [], []
        for p in populations:
            left = p.stays.hours[p.studies.stay] - p.studies.hours
            risk.append(p.studies.risk[:, TASKS.index(task)])
            happened.append((left <= 48) & (p.stays.died[p.studies.stay] == died))
        predicted, true = np.concatenate(risk), np.concatenate(happened)
        assert true.mean() == pytest.approx(predicted.mean(), abs=0.005)
        order = np.argsort(predicted)
        for fifth in np.array_split(order[len(order) // 2 :], 3):
            error = 4 * np.sqrt(predicted[fifth].mean() / len(fifth))
            assert true[fifth].mean() == pytest.approx(predicted[fifth].mean(), abs=error)


def test_patients_return(populations: list[Population]) -> None:
    for p in populations:
        assert len(p.stays.hours) / len(p.age) == pytest.approx(1.35, abs=0.15)
        soon = (p.stays.visit > 0) & (p.stays.gap_hours < 720)
        assert 0.05 < soon.mean() < 0.2
        images = np.bincount(p.studies.stay, minlength=len(p.stays.hours))
        assert set(images.tolist()) == {0, 1, 2, 3, 4}


def test_the_files_hold_the_prevalences_and_the_ceiling(trees: dict[str, Path]) -> None:
    """By the tasks' definitions, from admissions and CheXpert's file alone."""
    frames = {name: records(tree) for name, tree in trees.items()}
    everybody = pl.concat(frames.values())
    for task in TASKS:
        known = everybody[task].drop_nulls()
        spread = np.sqrt(PREVALENCE[task] * (1 - PREVALENCE[task]) / len(known))
        assert known.mean() == pytest.approx(PREVALENCE[task], abs=0.01 + 5 * spread)
    for name, tree in trees.items():
        ceiling = json.loads((tree / "ceiling.json").read_text())["tasks"]
        frame = frames[name].join(pl.read_parquet(tree / "truth.parquet"), on="study_id")
        for task in TASKS:
            known = frame.filter(pl.col(task).is_not_null())
            assert ceiling[task]["n"] == known.height
            assert ceiling[task]["true"] == known[task].sum()
            found = auroc(known[f"risk_{task}"].to_numpy(), known[task].to_numpy() == 1)
            assert found == ceiling[task]["auroc"]


def test_all_sources_beat_the_best_and_stay_below_the_ceiling(trees: dict[str, Path]) -> None:
    """Logistic regression on plain features, on the tasks with enough of both classes."""
    tasks = ("enlarged_cardiomediastinum", "pneumonia", "edema", "cardiomegaly", "length_of_stay")
    data = load(trees)
    single = {s: np.mean(list(aurocs(data, [s], tasks).values())) for s in data.sources}
    union = np.mean(list(aurocs(data, list(data.sources), tasks).values()))
    assert union > max(single.values()) + 0.02, (union, single)
    assert all(single[source] > 0.53 for source in ("lab", "chart", "image", "note")), single
    truth = pl.concat([pl.read_parquet(tree / "truth.parquet") for tree in trees.values()])
    frame = data.frame.join(truth, on="study_id", how="left", maintain_order="left")
    best = []
    for task in tasks:
        known = frame.filter(pl.col(task).is_not_null())
        best.append(auroc(known[f"risk_{task}"].to_numpy(), known[task].to_numpy() == 1))
    assert union < np.mean(best) - 0.03

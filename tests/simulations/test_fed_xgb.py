"""Flower's tree bagging: the trees it promises, chosen on training patients alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
from flwr.serverapp.strategy import fedxgb_bagging

from simulations.baselines import fed_xgb
from simulations.baselines.fed_xgb import Bagging, Hospital, choose, fit_and_score
from simulations.baselines.haim import Table

POINT = {"max_depth": (3,), "n_estimators": (30,), "learning_rate": (0.6,)}


def made(seed: int, patients: int = 150, seen: slice = slice(None)) -> Table:
    """Two records of each patient; task 0 is the exclusive or of two features, task 1 is noise.

    Args:
        seen: Which values the first feature takes here.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * patients, 3)).astype(np.float32)
    x[:, 0] = rng.choice(np.array([-2.0, -1.0, 1.0, 2.0])[seen], 2 * patients)
    first = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(np.int8)
    labels = np.stack([first, rng.integers(0, 2, len(x), dtype=np.int8)], axis=1)
    labels[::9] = -1
    return Table(x, labels, np.repeat(np.arange(patients) + 10_000 * seed, 2))


def correct(logits: np.ndarray, table: Table, task: int = 0) -> float:
    known = table.labels[:, task] >= 0
    return float(((logits[:, task] > 0) == (table.labels[:, task] == 1))[known].mean())


def test_it_is_bagging_tree_by_tree() -> None:
    """Against a transcription: each round every hospital answers the same margins, and all trees
    are added at a rate of 0.6 / 3."""
    tables, held = [made(1), made(2, patients=60), made(3)], made(4)
    logits = fit_and_score(tables, held, grid=POINT)
    for task in (0, 1):
        hospitals = [Hospital.of(table, task) for table in tables]
        margins = [np.zeros(len(h.y)) for h in hospitals]
        expected = np.zeros(len(held.x))
        for _ in range(10):
            grown = []
            for hospital, margin in zip(hospitals, margins, strict=True):
                records = xgboost.DMatrix(hospital.x, label=hospital.y, base_margin=margin)
                options = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.2}
                grown.append(xgboost.train(options, records, num_boost_round=1))

            def added(x: np.ndarray, trees: list[xgboost.Booster] = grown) -> np.ndarray:
                zero = xgboost.DMatrix(x, base_margin=np.zeros(len(x)))
                return sum(tree.predict(zero, output_margin=True) for tree in trees)

            margins = [m + added(h.x) for m, h in zip(margins, hospitals, strict=True)]
            expected += added(held.x)
        assert expected.std() > 0.1
        np.testing.assert_allclose(logits[:, task], expected, atol=1e-4)


@pytest.mark.parametrize(("hospitals", "rounds"), [(1, 7), (2, 4), (3, 3), (9, 1)])
def test_flower_adds_one_tree_of_each_hospital_per_round(
    monkeypatch: pytest.MonkeyPatch, hospitals: int, rounds: int
) -> None:
    added: list[tuple[int, int]] = []
    real = fedxgb_bagging.aggregate_bagging

    def trees(booster: bytes) -> int:
        return xgboost.Booster(model_file=bytearray(booster)).num_boosted_rounds() if booster else 0

    def aggregate(before: bytes, own: bytes) -> bytes:
        after = real(before, own)
        added.append((trees(own), trees(after)))
        return after

    monkeypatch.setattr(fedxgb_bagging, "aggregate_bagging", aggregate)
    parts = [Hospital.of(made(seed, patients=20), 0) for seed in range(hospitals)]
    point = {"max_depth": 2, "n_estimators": 7, "learning_rate": 0.1}
    booster = Bagging(parts, point, seed=0, threads=1).fit()
    assert added == [(1, number + 1) for number in range(hospitals * rounds)]
    learner = json.loads(booster)["learner"]["gradient_booster"]["model"]
    assert len(learner["trees"]) == hospitals * rounds


def test_a_tree_shows_values_of_patients() -> None:
    """Why epsilon is infinite: the one patient above 5 is in the threshold that leaves."""
    x = np.linspace(-1, 1, 80, dtype=np.float32)[:, None]
    x[-1] = 7.25
    one = Hospital(x, (x[:, 0] > 5).astype(np.int8), np.arange(80))
    point = {"max_depth": 1, "n_estimators": 1, "learning_rate": 1.0}
    # A leaf needs min_child_weight 1, and a record of probability 1/2 has 1/4.
    often = Hospital(*(np.repeat(values, 8, axis=0) for values in (one.x, one.y, one.patients)))
    booster = json.loads(Bagging([often], point, seed=0, threads=1).fit())
    (tree,) = booster["learner"]["gradient_booster"]["model"]["trees"]
    assert tree["split_conditions"][0] == pytest.approx(7.25)


def test_many_small_hospitals_know_more_together_than_each_alone() -> None:
    hospitals, held = [made(seed, patients=15) for seed in range(6)], made(99)
    grid = {"max_depth": (3,), "n_estimators": (90,), "learning_rate": (0.6,)}
    alone = [correct(fit_and_score([one], held, grid=grid), held) for one in hospitals]
    assert correct(fit_and_score(hospitals, held, grid=grid), held) > np.mean(alone) + 0.05


def test_what_varies_only_between_hospitals_is_lost() -> None:
    """One hospital sees negative values of the first feature only, the other positive ones: no
    tree can split between them, and each undoes what the other learns."""
    hospitals, held = [made(1, seen=slice(0, 2)), made(2, seen=slice(2, 4))], made(3)
    assert 0.4 < correct(fit_and_score(hospitals, held, grid=POINT), held) < 0.6


def test_the_grids_point_is_chosen_without_the_validation_patients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One level cannot tell an exclusive or; and no patient both trains and chooses."""
    trained: list[set[int]] = []
    chosen_on: list[set[int]] = []
    init, validate = Bagging.__init__, Bagging.validate

    def remembering(self: Bagging, hospitals: Any, point: Any, **rest: Any) -> None:
        trained.append({p for h in hospitals for p in h.patients.tolist()})
        init(self, hospitals, point, **rest)

    def validating(self: Bagging, booster: bytes, helds: Any) -> float:
        chosen_on.append({p for h in helds for p in h.patients.tolist()})
        return validate(self, booster, helds)

    monkeypatch.setattr(Bagging, "__init__", remembering)
    monkeypatch.setattr(Bagging, "validate", validating)
    tables, held = [made(1), made(2)], made(3)
    grid = {**POINT, "max_depth": (1, 3)}
    logits = fit_and_score(tables, held, grid=grid)
    assert correct(logits, held) > 0.9
    own = {int(p) for table in tables for p in table.patients}
    assert len(chosen_on) == 4
    for fitted, apart in zip(trained[:2], chosen_on[:2], strict=True):
        assert not fitted & apart
        assert fitted | apart == own
        assert 0.15 < len(apart) / len(own) < 0.25
    assert trained[2] == own


def test_validation_is_the_share_of_ordered_pairs() -> None:
    hospitals = [Hospital.of(made(seed, patients=40), 0) for seed in (1, 2)]
    point = {"max_depth": 2, "n_estimators": 6, "learning_rate": 0.5}
    boosting = Bagging(hospitals, point, seed=0, threads=1)
    booster = boosting.fit()
    rng = np.random.default_rng(5)
    held = [
        Hospital(rng.normal(size=(n, 3)).astype("f4"), y, np.arange(n))
        for n, y in ((12, rng.integers(0, 2, 12, dtype=np.int8)), (5, np.ones(5, dtype=np.int8)))
    ]
    margins = fed_xgb._margins(booster, held[0].x)
    differences = [a - b for a in margins[held[0].y == 1] for b in margins[held[0].y == 0]]
    share = np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences])
    assert boosting.validate(booster, held) == pytest.approx(share)


def test_without_both_classes_to_choose_on_the_first_point_is_taken() -> None:
    few = [
        Hospital(np.zeros((1, 2), "f4"), np.array([i], dtype=np.int8), np.array([i]))
        for i in (0, 1)
    ]
    point = choose(few, {"max_depth": (4, 5), "n_estimators": (3,), "learning_rate": (0.1,)})
    assert point["max_depth"] == 4


def test_who_knows_nothing_takes_no_part_and_one_class_is_left_at_zero() -> None:
    alone, silent, held = made(1), made(2), made(3)
    silent.labels[:, 0] = -1
    alone.labels[:, 1] = np.minimum(alone.labels[:, 1], 0)
    silent.labels[:, 1] = np.minimum(silent.labels[:, 1], 0)
    logits = fit_and_score([alone, silent], held, grid=POINT)
    np.testing.assert_array_equal(logits, fit_and_score([alone], held, grid=POINT))
    assert logits[:, 0].any()
    assert not logits[:, 1].any()

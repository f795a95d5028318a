"""Trees on concatenated embeddings: by patient, with what is absent absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from client.site.encoders.dataset import Dataset
from common.study import Study
from simulations.baselines import haim
from simulations.baselines.haim import (
    GRID,
    ONE,
    Arrangement,
    Table,
    fit_and_score,
    pooled,
    scores,
    table_of,
)


def made(seed: int, patients: int = 300) -> Table:
    """Three records of each patient; the second of four features decides."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * patients, 4)).astype(np.float32)
    first = (x[:, 1] + 0.3 * rng.normal(size=len(x)) > 0).astype(np.int8)
    labels = np.stack([first, rng.integers(0, 2, len(x), dtype=np.int8)], axis=1)
    labels[::7] = -1
    return Table(x, labels, np.repeat(np.arange(patients) + 10_000 * seed, 3))


def test_a_records_embeddings_stand_side_by_side_and_absent_ones_are_missing() -> None:
    data = Dataset(
        rows_of_patient=[np.array([0, 2]), np.array([1])],
        inputs={
            "note": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 3),
            "lab": torch.tensor([[[5.0]]] * 3),
        },
        present={
            "note": torch.tensor([[True, True], [True, False], [False, False]]),
            "lab": torch.tensor([[True], [False], [True]]),
        },
        labels=torch.zeros(3, 1, dtype=torch.int8),
        record_ids=["a", "b", "c"],
    )
    table = table_of(data, first_patient=5)
    nan = np.nan
    np.testing.assert_array_equal(table.x, [[2, 3, 5], [1, 2, nan], [nan, nan, 5]])
    assert table.patients.tolist() == [5, 6, 5]


def test_it_finds_what_there_is_and_nothing_else() -> None:
    train, held = pooled([made(1), made(2)]), made(3)
    logits = fit_and_score(train, held, grid={**ONE, "n_estimators": (30, 60)})
    right = [
        float(((logits[:, k] > 0) == (held.labels[:, k] == 1))[held.labels[:, k] >= 0].mean())
        for k in (0, 1)
    ]
    assert right[0] > 0.85
    assert 0.4 < right[1] < 0.6


def test_a_task_of_one_class_is_left_at_zero() -> None:
    train = made(1, patients=20)
    train.labels[:, 1] = 0
    assert not fit_and_score(train, made(2, patients=20), grid=ONE)[:, 1].any()


def test_no_patient_stands_on_both_sides_of_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose record a row is stands in its first feature: the groups are what is tested."""
    from sklearn import model_selection

    table, seen = made(1), []
    table.x[:, 0] = table.patients
    real = model_selection.StratifiedGroupKFold.split

    def split(self, x, y, groups=None):
        for train, test in real(self, x, y, groups):
            seen.append(set(x[train, 0]) & set(x[test, 0]))
            yield train, test

    monkeypatch.setattr(model_selection.StratifiedGroupKFold, "split", split)
    fit_and_score(table, made(2), grid={**ONE, "max_depth": (2, 3), "n_estimators": (5,)})
    assert len(seen) >= 5
    assert not any(seen)


def test_the_grid_is_haims() -> None:
    assert {k: tuple(v) for k, v in GRID.items()} == {
        "max_depth": (5, 6, 7, 8),
        "n_estimators": (200, 300),
        "learning_rate": (0.3, 0.1, 0.05),
    }


def test_arrangements_differ_in_who_trains_for_whom() -> None:
    """The second hospital's labels are turned round: alone it is right, together nobody is."""
    trains, held = [made(1), made(2)], [made(3, patients=80), made(4, patients=120)]
    for table in (trains[1], held[1]):
        known = table.labels >= 0
        table.labels[known] = 1 - table.labels[known]
    few = {"max_depth": (3,), "n_estimators": (40,), "learning_rate": (0.3,)}
    found = {kind: scores(trains, held, kind, grid=few) for kind in get_args(Arrangement)}
    labels = pooled(held).labels
    known = labels[:, 0] >= 0
    assert all(logits.shape == labels.shape for logits in found.values())
    right = {
        kind: float(((logits[:, 0] > 0) == (labels[:, 0] == 1))[known].mean())
        for kind, logits in found.items()
    }
    assert right["local"] > 0.85
    assert right["pooled"] < 0.65
    assert right["federated"] < 0.65
    np.testing.assert_array_equal(
        found["local"][: len(held[0].x)], fit_and_score(trains[0], held[0], grid=few)
    )


@pytest.mark.parametrize("arrangement", get_args(Arrangement))
def test_it_runs_on_shards(open_data: Path, tmp_path: Path, arrangement: Arrangement) -> None:
    study = Study.load("physionet2012")
    folders = dict(list(haim.find_shards(open_data / "physionet-2012").items())[:2])
    few = {"max_depth": (3,), "n_estimators": (20,), "learning_rate": (0.3,)}
    found = haim.evaluate(study, folders, tmp_path, arrangement=arrangement, grid=few)
    assert found["macro"]["auroc"] > 0.7


@pytest.mark.parametrize(
    ("flags", "arrangement"),
    [([], "pooled"), (["--local"], "local"), (["--federated"], "federated")],
)
def test_the_command_says_what_it_shows_of_patients(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: list[str],
    arrangement: Arrangement,
) -> None:
    asked = {}

    def evaluate(*_: object, **rest: object) -> dict[str, object]:
        asked.update(rest)
        return {"tasks": {}, "macro": {"auroc": 0.5, "auprc": None}}

    monkeypatch.setattr(haim, "evaluate", evaluate)
    monkeypatch.setattr(haim, "find_shards", lambda folder: {})
    haim.main(["physionet2012", str(tmp_path), "--one", *flags])
    assert asked == {"arrangement": arrangement, "grid": ONE}
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{arrangement}: {haim.PRIVACY[arrangement]}" in shown
    haim.main(["physionet2012", str(tmp_path), "--json", *flags])
    told = json.loads(capsys.readouterr().out)
    assert told["arrangement"] == arrangement
    assert told["privacy"] == haim.PRIVACY[arrangement]

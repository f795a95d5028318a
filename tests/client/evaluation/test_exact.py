"""Exact metrics: against scikit-learn, by patient, and kept private on disk."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from client.site.evaluation.exact import (
    METRICS,
    _bootstrap,
    exact_metrics,
    pooled_exact,
    write_exact,
)
from common.errors import FedwardError

TASKS = ["death", "sepsis"]


def cohort(seed: int, patients: int = 300, effect: float = 1.0):
    """Logits, labels and rows of patients who have 1 to 3 records each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, patients)
    ends = np.cumsum(sizes)
    rows = [np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)]
    labels = rng.choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=(int(ends[-1]), 2)).astype(np.int8)
    logits = rng.normal(effect * (labels == 1), 1.0).astype(np.float32)
    return np.round(logits, 1), labels, rows


def numbers(rows: list[np.ndarray]) -> np.ndarray:
    return np.repeat(np.arange(len(rows)), [len(r) for r in rows])


def test_values_are_those_of_scikit_learn() -> None:
    logits, labels, rows = cohort(0)
    found = exact_metrics(logits, labels, numbers(rows), TASKS)
    for index, task in enumerate(TASKS):
        known = labels[:, index] >= 0
        truth, score = labels[known, index], logits[known, index]
        values = found["tasks"][task]
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, score))
        assert values["auprc"] == pytest.approx(average_precision_score(truth, score))
        assert values["f1"] == pytest.approx(f1_score(truth, score >= 0))
        assert (values["support"], values["positives"]) == (known.sum(), truth.sum())
        for name in METRICS:
            low, high = values["interval"][name]
            assert low < values[name] < high
    aurocs = [found["tasks"][t]["auroc"] for t in TASKS]
    assert found["macro"]["auroc"] == pytest.approx(np.mean(aurocs))
    assert found["macro"]["interval"]["auroc"][0] < np.mean(aurocs)
    assert (found["patients"], found["records"]) == (300, len(logits))


def test_the_bootstrap_computes_what_scikit_learn_would_on_repeated_records() -> None:
    logits, labels, rows = cohort(1, patients=60)
    truth, score, patient = labels[:, 0] == 1, logits[:, 0].astype(float), numbers(rows)
    drawn = np.random.default_rng(2).multinomial(60, np.full(60, 1 / 60), size=5)
    copies = _bootstrap(score, truth, patient, drawn, 0.0)
    for replicate, times in enumerate(drawn):
        again = np.repeat(np.arange(len(score)), times[patient])
        assert copies["auroc"][replicate] == pytest.approx(
            roc_auc_score(truth[again], score[again])
        )
        assert copies["auprc"][replicate] == pytest.approx(
            average_precision_score(truth[again], score[again])
        )
        assert copies["f1"][replicate] == pytest.approx(f1_score(truth[again], score[again] >= 0))


def test_records_of_one_patient_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1], size=(100, 1)).astype(np.int8)
    logits = rng.normal(labels, 1.0)
    alone = exact_metrics(logits, labels, np.arange(100), ["death"])
    copied = np.repeat(np.arange(100), 10)
    repeated = exact_metrics(logits[copied], labels[copied], copied, ["death"])

    def width(metrics) -> float:
        low, high = metrics["tasks"]["death"]["interval"]["auroc"]
        return high - low

    assert width(repeated) == pytest.approx(width(alone), rel=0.15)


def test_intervals_cover_the_truth() -> None:
    truth = 0.7602  # of two unit normals one apart
    covered = 0
    for seed in range(60):
        logits, labels, rows = cohort(seed, patients=80)
        found = exact_metrics(
            logits[:, :1], labels[:, :1], numbers(rows), ["death"], replicates=200
        )
        low, high = found["tasks"]["death"]["interval"]["auroc"]
        covered += low <= truth <= high
    assert covered >= 51  # a true 95 % falls below once in 2000


def test_one_class_or_no_number_is_no_metric() -> None:
    logits = np.array([[0.5, np.nan], [1.0, 0.2], [-np.inf, 0.1]])
    labels = np.array([[1, 1], [1, 0], [1, 1]], dtype=np.int8)
    found = exact_metrics(logits, labels, np.arange(3), TASKS)
    assert found["tasks"]["death"]["auroc"] is None
    assert found["tasks"]["death"]["interval"]["auroc"] is None
    assert (found["tasks"]["sepsis"]["invalid"], found["tasks"]["sepsis"]["support"]) == (1, 2)
    assert found["macro"]["auroc"] == found["tasks"]["sepsis"]["auroc"] == 0.0
    nobody = exact_metrics(logits[:0], labels[:0], np.arange(0), TASKS)
    assert nobody["macro"]["auroc"] is None
    json.dumps([found, nobody], allow_nan=False)


def test_files_are_the_owners_alone_and_hold_no_names(tmp_path: Path) -> None:
    logits, labels, rows = cohort(4, patients=20)
    path = write_exact(tmp_path / "exact", 3, logits, labels, rows, TASKS)
    assert path == tmp_path / "exact" / "release-3.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["release-3.json", "release-3.npz"]
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
        assert sorted(stored.files) == ["labels", "logits", "patients", "tasks"]
        assert np.array_equal(stored["patients"], numbers(rows))
    assert json.loads(path.read_text())["patients"] == 20
    write_exact(tmp_path / "exact", 3, logits, labels, rows, TASKS)  # a repeated release


def test_pooling_scores_all_records_of_the_latest_releases_together(tmp_path: Path) -> None:
    parts = [cohort(seed, patients=80) for seed in (5, 6)]
    for name, (logits, labels, rows) in zip("ab", parts, strict=True):
        write_exact(tmp_path / name / "exact", 9, -logits, labels, rows, TASKS)
        write_exact(tmp_path / name / "exact", 10, logits, labels, rows, TASKS)
    (tmp_path / "c").mkdir()  # took no part
    pooled = pooled_exact([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    logits = np.concatenate([p[0] for p in parts])
    labels = np.concatenate([p[1] for p in parts])
    known = labels[:, 0] >= 0
    assert pooled["tasks"]["death"]["auroc"] == pytest.approx(
        roc_auc_score(labels[known, 0], logits[known, 0])
    )
    assert pooled["patients"] == 160
    assert pooled["records"] == sum(s["records"] for s in pooled["sites"].values())
    assert sorted(pooled["sites"]) == ["a", "b"]
    assert pooled == pooled_exact({"b": tmp_path / "b", "a": tmp_path / "a"})


def test_pooling_nothing_or_different_tasks_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedwardError, match="no site holds exact metrics"):
        pooled_exact([tmp_path])
    logits, labels, rows = cohort(7, patients=20)
    write_exact(tmp_path / "a" / "exact", 1, logits, labels, rows, TASKS)
    write_exact(tmp_path / "b" / "exact", 1, logits, labels, rows, TASKS[::-1])
    with pytest.raises(FedwardError, match="different tasks"):
        pooled_exact([tmp_path / "a", tmp_path / "b"])

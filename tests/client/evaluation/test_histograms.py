"""Score histograms: what is counted where."""

from __future__ import annotations

import numpy as np
import pytest

from client.site.evaluation.histograms import GRID, release, score_histograms
from client.site.training.entropy import Entropy
from common.errors import PrivacyError


def histograms(logits, labels, rows_of_patient, *, r=4, bins=4, logit_range=2.0, seed=0):
    return score_histograms(
        np.asarray(logits, dtype=np.float32),
        np.asarray(labels, dtype=np.int8),
        [np.asarray(rows) for rows in rows_of_patient],
        bins=bins,
        logit_range=logit_range,
        records_per_patient=r,
        rng=Entropy.seeded(seed).records,
    )


def test_scores_fall_into_equal_bins_and_those_beyond_into_the_edges() -> None:
    scores = [-9, -2, -1.01, -1, -1e-6, 0, 0.99, 1, 1.99, 2, 50, np.inf, -np.inf]
    counted = histograms([[s] for s in scores], [[1]] * len(scores), [[i] for i in range(13)])
    assert counted.shape == (1, 2, 4)
    assert counted[0, 0].tolist() == [0, 0, 0, 0]
    assert counted[0, 1].tolist() == [4, 2, 2, 5]


def test_classes_and_tasks_are_apart_and_unknown_labels_are_left_out() -> None:
    logits = [[-1.5, 1.5], [1.5, -1.5], [0.5, 0.5]]
    labels = [[0, 1], [1, -1], [-1, 0]]
    counted = histograms(logits, labels, [[0], [1], [2]])
    assert counted[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert counted[1].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_patients_weight_is_split_over_records_known_for_that_task() -> None:
    logits = [[-1.5, -1.5], [-0.5, -0.5], [0.5, 0.5], [1.5, 1.5]]
    labels = [[0, 1], [1, -1], [0, -1], [1, -1]]
    counted = histograms(logits, labels, [[0, 1, 2, 3]])
    assert counted[0].tolist() == [[0.25, 0, 0.25, 0], [0, 0.25, 0, 0.25]]
    assert counted[1].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_at_most_r_records_are_used_each_equally_often() -> None:
    logits = np.linspace(-1.9, 1.9, 8)[:, None]
    total = np.zeros(8)
    for seed in range(400):
        counted = histograms(logits, np.ones((8, 1)), [range(8)], r=2, bins=8, seed=seed)[0, 1]
        assert sorted(counted) == [0] * 6 + [0.5, 0.5]
        total += counted
    # 400 draws of 2 of 8: each bin holds 50 of 400 on average, standard deviation 4.3
    assert np.abs(total - 50).max() < 22


def test_a_score_that_is_no_number_takes_its_share_out() -> None:
    counted = histograms([[np.nan], [0.5], [np.nan]], [[1], [1], [0]], [[0, 1], [2]])
    assert counted[0].tolist() == [[0, 0, 0, 0], [0, 0, 0.5, 0]]


def test_nobody_gives_an_empty_histogram() -> None:
    assert not histograms(np.zeros((0, 2)), np.zeros((0, 2)), []).any()
    assert not histograms([[0.0]], [[-1]], [[0]]).any()


def test_a_record_of_two_patients_is_refused() -> None:
    with pytest.raises(PrivacyError, match="one record belongs to one patient"):
        histograms(np.zeros((2, 1)), np.ones((2, 1)), [[0, 1], [1]])
    with pytest.raises(PrivacyError, match="one shape"):
        histograms(np.zeros((2, 2)), np.ones((2, 1)), [[0], [1]])


def test_without_privacy_the_release_is_exact() -> None:
    counted = histograms([[0.1], [1.2]], [[1], [0]], [[0], [1]])
    assert np.array_equal(release(counted, None, Entropy.seeded(1)), counted)


def test_a_release_lies_on_the_grid_and_leaves_its_input_alone() -> None:
    counted = histograms([[0.1], [1.2]], [[1], [0]], [[0], [1]])
    before = counted.copy()
    released = release(counted, 1.5, Entropy.seeded(1))
    assert np.array_equal(counted, before)
    assert np.array_equal(released / GRID, np.round(released / GRID))
    assert not np.array_equal(released, counted)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, np.inf, np.nan])
def test_a_noise_multiplier_without_privacy_is_refused(multiplier: float) -> None:
    with pytest.raises(PrivacyError, match="gives no privacy"):
        release(np.zeros((1, 2, 4)), multiplier, Entropy.seeded(1))

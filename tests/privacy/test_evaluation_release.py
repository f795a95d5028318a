"""Rule 10: an evaluation is a release. One patient moves it by at most √K; the noise is σ√K."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from client.site.evaluation.histograms import release, score_histograms, sensitivity
from client.site.training.entropy import Entropy

TASKS, BINS, RANGE = 5, 6, 3.0
MOST = 20  # records of a patient


class Priorities:
    """Draws record priorities by patient, so that two data sets share the draws of those in both:
    removing a patient does not move the stream of the others."""

    def __init__(self, seeds: list[int], sizes: list[int]) -> None:
        self._drawn = np.concatenate(
            [
                np.zeros(0),
                *(np.random.default_rng(s).random(n) for s, n in zip(seeds, sizes, strict=True)),
            ]
        )

    def uniforms(self, count: int) -> np.ndarray:
        assert count == len(self._drawn)
        return self._drawn


def scores(kind: str, rng: np.random.Generator, records: int) -> np.ndarray:
    """What an adversarial adapter may make a patient's records score."""
    if kind == "one bin":
        return np.full((records, TASKS), 0.7)
    if kind == "one bin per task":
        return np.tile(rng.uniform(-5, 5, TASKS), (records, 1))
    if kind == "extreme":
        return rng.choice([-np.inf, -1e38, 0.0, 1e38, np.inf], size=(records, TASKS))
    if kind == "not numbers":
        return rng.choice([np.nan, 0.5, -0.5], size=(records, TASKS))
    return rng.normal(0, 3, (records, TASKS))


KINDS = ["one bin", "one bin per task", "extreme", "not numbers", "spread"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labelled", ["all true", "mixed", "partial", "none"])
@pytest.mark.parametrize("most", [1, 2, 4, MOST])
def test_a_patient_moves_the_histograms_by_at_most_the_square_root_of_the_tasks(
    kind: str, labelled: str, most: int
) -> None:
    rng = np.random.default_rng([KINDS.index(kind), most])
    sizes = [int(n) for n in rng.permutation(np.arange(1, MOST + 1))]
    logits = np.concatenate([scores(kind, rng, n) for n in sizes]).astype(np.float32)
    choices = {"all true": [1], "mixed": [0, 1], "partial": [-1, 0, 1], "none": [-1]}[labelled]
    labels = rng.choice(choices, size=logits.shape).astype(np.int8)
    ends = np.cumsum(sizes)
    patients = [np.arange(end - n, end) for end, n in zip(ends, sizes, strict=True)]

    def histograms(members: list[int]) -> np.ndarray:
        """Of these patients only, the shard rebuilt without the others."""
        rows = np.concatenate([patients[m] for m in members])
        lengths = [sizes[m] for m in members]
        last = np.cumsum(lengths)
        return score_histograms(
            logits[rows],
            labels[rows],
            [np.arange(e - n, e) for e, n in zip(last, lengths, strict=True)],
            bins=BINS,
            logit_range=RANGE,
            records_per_patient=most,
            rng=Priorities(members, lengths),  # type: ignore[arg-type]
        )

    everyone = list(range(len(sizes)))
    whole = histograms(everyone)
    moved = []
    for gone in everyone:
        difference = whole - histograms([p for p in everyone if p != gone])
        assert (difference >= 0).all()
        # Exact comparisons: weights are multiples of 2^-24, their sums exact in fp64.
        assert difference.sum(axis=(1, 2)).max() <= 1
        moved.append(float(np.sqrt((difference**2).sum())))
    assert max(moved) <= sensitivity(TASKS) == math.sqrt(TASKS)
    if labelled == "none":
        assert max(moved) == 0
    elif kind == "one bin" and labelled == "all true":
        assert max(moved) == pytest.approx(math.sqrt(TASKS), abs=1e-6)  # the bound is met


def test_weighing_records_instead_of_patients_would_break_the_bound() -> None:
    """What the split of the weight prevents: 20 records of weight 1 move the vector by 20 √K."""
    same = np.zeros((MOST, TASKS), dtype=np.float32)
    labels = np.ones((MOST, TASKS), dtype=np.int8)
    by_record = score_histograms(
        same,
        labels,
        [np.array([i]) for i in range(MOST)],
        bins=BINS,
        logit_range=RANGE,
        records_per_patient=1,
        rng=Entropy.seeded(0).records,
    )
    by_patient = score_histograms(
        same,
        labels,
        [np.arange(MOST)],
        bins=BINS,
        logit_range=RANGE,
        records_per_patient=MOST,
        rng=Entropy.seeded(0).records,
    )
    assert np.linalg.norm(by_record) == pytest.approx(MOST * math.sqrt(TASKS))
    assert np.linalg.norm(by_patient) <= math.sqrt(TASKS)


@pytest.mark.parametrize("tasks", [1, 12])
@pytest.mark.parametrize("multiplier", [0.6, 7.0])
def test_the_noise_has_the_deviation_that_is_priced(tasks: int, multiplier: float) -> None:
    """χ² of what was added against multiplier · √K; 2.4·10^5 cells see an error of 1 %."""
    counted = np.random.default_rng(0).integers(0, 50, (tasks, 2, 120_000 // tasks)).astype(float)
    noise = release(counted, multiplier, Entropy()) - counted
    deviation = multiplier * math.sqrt(tasks)
    chi2 = float((noise**2).sum()) / deviation**2
    assert 1e-6 < stats.chi2.cdf(chi2, noise.size) < 1 - 1e-6
    assert stats.kstest(noise.ravel() / deviation, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(noise.ravel()[1:], noise.ravel()[:-1])[0, 1]) < 0.02


def test_two_releases_of_the_same_counts_share_no_noise() -> None:
    counted = np.zeros((3, 2, 2000))
    first, second = (release(counted, 2.0, Entropy()).ravel() for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert np.mean(first == second) < 0.01

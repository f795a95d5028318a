"""Evaluation as a charged release: one noised vector of score histograms of validation patients.

From the histograms of all sites the coordinator computes AUROC and its kin (`server.metrics`);
scores themselves never leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from client.site.training.entropy import Entropy, Keystream
from common.errors import PrivacyError

GRID = 2.0**-10
"""Released values are multiples of this, in patients: far coarser than the spacing of fp64 noise,
so that the low bits of a sum say nothing (Mironov 2012), far finer than any noise."""

_UNITS = 2**24
"""Weights are whole multiples of 1/_UNITS: sums of them are exact in fp64, and the sensitivity
below holds for the computed numbers, not only on paper."""


def sensitivity(tasks: int) -> float:
    """L2 sensitivity of the vector of `score_histograms`: √K; see there."""
    return math.sqrt(tasks)


def score_histograms(
    logits: NDArray[np.floating],
    labels: NDArray[np.int8],
    rows_of_patient: Sequence[NDArray[np.integer]],
    *,
    bins: int,
    logit_range: float,
    records_per_patient: int,
    rng: Keystream,
) -> NDArray[np.float64]:
    """Counts of patients by task, true class and score; the input of `release`.

    For each task a patient has weight 1, split evenly over at most r of their records, drawn among
    those whose label is known for that task. `bins` equal bins cover [-logit_range, logit_range);
    scores beyond, infinite ones included, fall into the edge bins, and logit 0 opens a bin. A NaN
    score takes its share of the weight out of the histogram.

    L2 sensitivity (add/remove one patient) is at most √K. The histogram is a sum over patients,
    and which of their records a patient contributes depends on draws of their own, so removing a
    patient subtracts exactly their contribution x [K, 2, B]. Within a task all entries of x are
    >= 0 and sum to at most 1 (n records, each floor(2^24 / n) / 2^24), hence
    ‖x_k‖₂ <= ‖x_k‖₁ <= 1 and ‖x‖₂² = Σ_k ‖x_k‖₂² <= K, whatever the scores and labels. The bound
    is met by a patient whose records share one bin in every task.

    Args:
        logits: `[N, K]`; row i may depend on record i alone.
        labels: `[N, K]`; 1 true, 0 false, anything else unknown.
        rows_of_patient: For each patient the numbers of their records.
        records_per_patient: r.
        rng: Draws one priority per record: `Entropy.records`.

    Returns:
        `[K, 2, bins]`: task, true class (0 false, 1 true), score bin; in patients.

    Raises:
        PrivacyError: A record that belongs to two patients, or shapes that do not fit.
    """
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise PrivacyError(f"scores {logits.shape} and labels {labels.shape} are not of one shape")
    records, tasks = logits.shape
    sizes = [len(rows) for rows in rows_of_patient]
    nothing = np.zeros(0, dtype=np.int64)
    rows = np.concatenate([nothing, *rows_of_patient])
    if len(np.unique(rows)) != len(rows) or not np.isin(rows, np.arange(records)).all():
        raise PrivacyError(
            "the records of the validation patients overlap or do not exist",
            cure="one record belongs to one patient; encode the shard again",
        )
    patient = np.repeat(np.arange(len(sizes)), sizes)
    shuffled = np.lexsort((rng.uniforms(len(rows)), patient))
    rows = rows[shuffled]  # still grouped by patient, in random order within one
    first = np.searchsorted(patient, patient)

    scores_NK = logits[rows].astype(np.float64)
    seen_NK = ~np.isnan(scores_NK)
    # Clipped before anything is computed: no score and no range may overflow into an error, which
    # would tell of the patient who caused it.
    inside_NK = np.clip(np.where(seen_NK, scores_NK, 0.0), -logit_range, logit_range)
    position_NK = (inside_NK / logit_range + 1.0) * (bins / 2)
    bin_NK = np.clip(np.floor(position_NK), 0, bins - 1).astype(np.int64)
    class_NK = labels[rows].astype(np.int64)
    known_NK = (class_NK == 0) | (class_NK == 1)

    histograms = np.zeros((tasks, 2, bins))
    for task in range(tasks):
        known = known_NK[:, task]
        before = np.cumsum(known) - known
        rank = before - before[first]
        chosen = known & (rank < records_per_patient)
        share = _UNITS // np.maximum(np.bincount(patient[chosen], minlength=len(sizes)), 1)
        counted = chosen & seen_NK[:, task]
        cell = class_NK[counted, task] * bins + bin_NK[counted, task]
        weight = share[patient[counted]] / _UNITS
        histograms[task] = np.bincount(cell, weights=weight, minlength=2 * bins).reshape(2, bins)
    return histograms


def release(
    histograms: NDArray[np.float64], noise_multiplier: float | None, entropy: Entropy
) -> NDArray[np.float64]:
    """What may leave the site, once the ledger has charged it.

    Adds Gaussian noise of standard deviation noise_multiplier · √K to every cell and rounds to
    `GRID`. The price is that of one `GaussianHistogram(noise_multiplier)`.

    Args:
        histograms: `[K, 2, bins]` of `score_histograms`.
        noise_multiplier: Noise over sensitivity; None (mode `none`) returns the exact counts.
        entropy: `entropy.noise` gives the noise.

    Raises:
        PrivacyError: A noise multiplier that is not positive and finite.
    """
    if noise_multiplier is None:
        return histograms.copy()
    if not 0 < noise_multiplier < math.inf:
        raise PrivacyError(
            f"noise multiplier {noise_multiplier} gives no privacy",
            cure="resolve the study; mode 'none' releases exact counts and says so",
        )
    noised = torch.tensor(histograms, dtype=torch.float64)
    entropy.noise.add_gaussians_(noised, noise_multiplier * sensitivity(len(histograms)))
    return (torch.round(noised / GRID) * GRID).numpy()

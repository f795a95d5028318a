"""Metrics of a federation, from noised histograms of its validation patients' scores.

Sites release counts of patients by task, true class and score bin, each cell with Gaussian noise of
known deviation. Everything here is post-processing of their sum; nothing sees a score.

Estimators, with n_c the counts of class c by bin, and means over the noise:
    AUROC: P(a positive scores above a negative), ties one half, within a bin by the classes' local
        slopes. Numerator and denominator are unbiased; the binning costs < .002 at 16 bins where it
        would cost .005-.04 if every bin counted as a tie.
    precision, recall, F1 at logit 0: ratios of unbiased sums.
    AUPRC: unbiased gains of recall times the precision of projected counts (the nearest that are
        >= 0 with the same total: Norm-Sub of Wang et al., NDSS 2020), spread over each bin by the
        local slope; less the bias that the bootstrap finds.

Intervals come from a parametric bootstrap: new patients (Poisson counts around the projected
histogram), new noise, same estimator; the deviations are laid around the estimate (basic bootstrap,
Davison & Hinkley 1997, ch. 5; for a noised AUPRC their standard deviation, widened by a factor that
simulation asked for: tests/server/test_metrics.py measures the coverage). They cover the value for
the population that the patients were drawn from, not only the noise. A patient whose weight is
split over records varies less than Poisson counts say, so intervals are then too wide, not too
narrow. Randomness here is public and seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Metric = Literal["auroc", "auprc", "precision", "recall", "f1"]
Interval = tuple[float, float]
Counts = NDArray[np.float64]  # [..., 2, bins]: true class (0 false, 1 true), score bin

METRICS: tuple[Metric, ...] = ("auroc", "auprc", "precision", "recall", "f1")

WIDEST = 0.4
"""A metric whose interval is wider is withheld."""
CLEARLY = 3.0
"""A count in a denominator must exceed zero by so many standard deviations of its noise ..."""
FEWEST = 5.0
"""... and reach so many patients; else the metric is withheld."""

_AUPRC_WIDER = 1.3  # the bootstrap starts from projected counts, which hide part of the noise
_FINER = 8  # parts into which a bin is spread for AUPRC


class TaskMetrics(BaseModel):
    """One task. docs/report.md explains the fields; a metric is None where it says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Literal["measured", "insufficient"] = "measured"
    auroc: float | None
    auprc: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    support: float
    positives: float
    interval: dict[Metric, Interval | None]


class Macro(BaseModel):
    """Plain mean over the tasks in which the metric is known."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    auroc: float | None
    auprc: float | None
    tasks: int
    interval: dict[Metric, Interval | None]


class Measured(BaseModel):
    """What one evaluation of the federation says."""

    model_config = ConfigDict(frozen=True)

    tasks: dict[str, TaskMetrics]
    macro: Macro


def noise_deviation(noise_multiplier: float | None, tasks: int, sites: int) -> float:
    """Standard deviation of the noise in each cell of the histograms of `sites` together: each adds
    noise_multiplier · √tasks. 0 in mode `none` (multiplier None)."""
    return (noise_multiplier or 0.0) * math.sqrt(tasks * sites)


def measure(
    histograms: NDArray[np.float64],
    noise_std: float,
    tasks: Sequence[str],
    *,
    confidence: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Measured:
    """Metrics with intervals, each withheld where noise or too few patients leave nothing to say.

    A task is `insufficient` if one class is not clearly there (`CLEARLY`, `FEWEST`) or the AUROC's
    interval is wider than `WIDEST`; a single metric is None under the same rules for its own
    denominator and interval. The interval of a macro mean is the mean of the tasks' ends: exact if
    their errors went together, too wide otherwise.

    Args:
        histograms: `[K, 2, bins]`, the sum of the sites' releases; bins equal and symmetrical
            around logit 0, logit 0 opening a bin (or inside the middle one, then split in half).
        noise_std: Standard deviation of the noise in each cell; see `noise_deviation`.
        tasks: K names.

    Raises:
        ValueError: Shapes that do not fit, or a negative deviation.
    """
    if histograms.ndim != 3 or histograms.shape[:2] != (len(tasks), 2):
        raise ValueError(f"histograms {histograms.shape} are not [{len(tasks)} tasks, 2, bins]")
    if not (0 <= noise_std < math.inf):
        raise ValueError(f"noise deviation {noise_std} is not a number >= 0")
    by_task = {
        task: _measure_one(
            np.asarray(counts, dtype=np.float64),
            noise_std,
            confidence,
            replicates,
            np.random.default_rng([seed, index]),
        )
        for index, (task, counts) in enumerate(zip(tasks, histograms, strict=True))
    }
    return Measured(tasks=by_task, macro=macro(by_task))


def macro(tasks: Mapping[str, TaskMetrics]) -> Macro:
    """The mean over tasks; `tasks` counts those whose AUROC is known."""
    values: dict[str, float | None] = {}
    interval: dict[Metric, Interval | None] = {}
    for name in METRICS[:2]:
        known = [t for t in tasks.values() if getattr(t, name) is not None]
        ends = [t.interval[name] for t in known]
        values[name] = float(np.mean([getattr(t, name) for t in known])) if known else None
        found = [end for end in ends if end is not None]
        interval[name] = (
            (float(np.mean([e[0] for e in found])), float(np.mean([e[1] for e in found])))
            if found
            else None
        )
    measured = sum(t.auroc is not None for t in tasks.values())
    return Macro(auroc=values["auroc"], auprc=values["auprc"], tasks=measured, interval=interval)


def _measure_one(
    counts: Counts, noise_std: float, confidence: float, replicates: int, rng: np.random.Generator
) -> TaskMetrics:
    bins = counts.shape[-1]
    negatives, positives = counts.sum(axis=-1)
    enough = max(FEWEST, CLEARLY * noise_std * math.sqrt(bins))
    support = {
        "support": round(float(negatives + positives), 1),
        "positives": round(float(positives), 1),
    }
    nothing: dict[Metric, float | None] = dict.fromkeys(METRICS)
    if min(negatives, positives) < enough:
        return _task(nothing, dict.fromkeys(METRICS), **support)
    model = _project(counts)
    drawn = rng.poisson(model, size=(replicates, *model.shape)).astype(np.float64)
    drawn += rng.normal(0.0, noise_std, size=drawn.shape) if noise_std else 0.0
    tail = (1 - confidence) / 2
    values = dict(nothing)
    intervals: dict[Metric, Interval | None] = dict.fromkeys(METRICS)
    predicted = _above(counts).sum()
    for name, estimate in _ESTIMATORS.items():
        if name == "precision" and predicted < max(FEWEST, enough * math.sqrt(0.5)):
            continue
        value, truth = float(estimate(counts)), float(estimate(model))
        off = estimate(drawn) - truth
        off = off[np.isfinite(off)]
        if not math.isfinite(value) or len(off) < 0.9 * replicates:
            continue
        if name == "auprc" and noise_std:
            value -= float(np.median(off))
            half = _AUPRC_WIDER * NormalDist().inv_cdf(1 - tail) * float(off.std())
            low, high = value - half, value + half
        else:
            low, high = value - np.quantile(off, [1 - tail, tail])
        if high - low <= WIDEST:
            values[name] = min(max(value, 0.0), 1.0)
            intervals[name] = (max(float(low), 0.0), min(float(high), 1.0))
    return _task(values, intervals, **support)


def _task(
    values: Mapping[Metric, float | None],
    intervals: dict[Metric, Interval | None],
    *,
    support: float,
    positives: float,
) -> TaskMetrics:
    return TaskMetrics(
        status="insufficient" if values["auroc"] is None else "measured",
        auroc=values["auroc"],
        auprc=values["auprc"],
        precision=values["precision"],
        recall=values["recall"],
        f1=values["f1"],
        support=support,
        positives=positives,
        interval=intervals,
    )


def _auroc(counts: Counts) -> NDArray[np.float64]:
    """Within a bin the densities are taken as linear, n_c(b) (1 + a_c u), u in [-1/2, 1/2], which
    puts a positive above a negative with probability 1/2 + (a_1 - a_0)/12; with slopes from the
    neighbours, a_c = (n_c(b+1) - n_c(b-1)) / 2 n_c(b), the sum over bins is that of `tilt`: still a
    product of independent counts of each class, hence unbiased."""
    negative, positive = counts[..., 0, :], counts[..., 1, :]
    below = np.cumsum(negative, axis=-1) - negative / 2
    tilt = negative[..., :-1] * positive[..., 1:] - negative[..., 1:] * positive[..., :-1]
    wins = (positive * below).sum(axis=-1) + tilt.sum(axis=-1) / 12
    return _ratio(wins, negative.sum(axis=-1) * positive.sum(axis=-1))


def _auprc(counts: Counts) -> NDArray[np.float64]:
    """Sum over bins of the recall gained times the precision there. The gains are the counts as
    they are; the precision is that of the projected counts, spread over the bin (along a part of a
    bin true and false positives grow in proportion, Davis & Goadrich 2006), a mean over its
    positives."""
    fine = _spread(_project(counts))[..., ::-1]
    negative, positive = fine[..., 0, :], fine[..., 1, :]
    true = np.cumsum(positive, axis=-1) - positive / 2
    false = np.cumsum(negative, axis=-1) - negative / 2
    precise = np.where(true > 0, true / np.maximum(true + false, 1e-12), 0.0)
    shape = (*positive.shape[:-1], counts.shape[-1], _FINER)
    parts, precise = positive.reshape(shape), precise.reshape(shape)
    whole = parts.sum(axis=-1)
    flat = precise.mean(axis=-1)
    mean = np.divide((parts * precise).sum(axis=-1), whole, out=flat, where=whole > 0)
    gained = counts[..., 1, ::-1]
    return _ratio((gained * mean).sum(axis=-1), gained.sum(axis=-1))


def _precision(counts: Counts) -> NDArray[np.float64]:
    above = _above(counts)
    return _ratio(above[..., 1], above.sum(axis=-1))


def _recall(counts: Counts) -> NDArray[np.float64]:
    return _ratio(_above(counts)[..., 1], counts[..., 1, :].sum(axis=-1))


def _f1(counts: Counts) -> NDArray[np.float64]:
    above = _above(counts)
    return _ratio(2 * above[..., 1], above.sum(axis=-1) + counts[..., 1, :].sum(axis=-1))


_ESTIMATORS: Mapping[Metric, Callable[[Counts], NDArray[np.float64]]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
}


def _above(counts: Counts) -> NDArray[np.float64]:
    """Counts at logit >= 0, `[..., 2]`."""
    bins = counts.shape[-1]
    upper = counts[..., (bins + 1) // 2 :].sum(axis=-1)
    return upper + counts[..., bins // 2] / 2 if bins % 2 else upper


def _project(counts: Counts) -> Counts:
    """The nearest counts that are >= 0 with the same total per class (0 if that is negative)."""
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 0.0)
    ordered = -np.sort(-counts, axis=-1)
    excess = (np.cumsum(ordered, axis=-1) - total) / np.arange(1, counts.shape[-1] + 1)
    last = (ordered > excess).sum(axis=-1, keepdims=True) - 1
    return np.maximum(counts - np.take_along_axis(excess, np.maximum(last, 0), axis=-1), 0.0)


def _spread(counts: Counts) -> Counts:
    """Each bin in `_FINER` parts, linear with the slope of its neighbours, never below 0."""
    padded = np.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(1, 1)])
    slope = np.clip((padded[..., 2:] - padded[..., :-2]) / 2, -2 * counts, 2 * counts)
    middle = (np.arange(_FINER) + 0.5) / _FINER - 0.5
    parts = (counts[..., None] + slope[..., None] * middle) / _FINER
    return parts.reshape(*counts.shape[:-1], -1)


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole; NaN where the whole is not positive."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)

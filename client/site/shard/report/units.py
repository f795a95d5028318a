"""Values that look as if they stood in another unit than the canonical one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from client.site.shard.clinical import SeriesSpec
from client.site.shard.units import conversions

FEWEST = 20
"""Values below which nothing is suspected."""
_UNUSUAL, _USUAL = 1.75, 1.0
_MIXED_SHARE = 0.01


@dataclass(frozen=True)
class UnitHint:
    """A suspicion, not a finding.

    Attributes:
        unit: The unit that would explain the values.
        share: Share of the values that it would explain, in [0, 1]; 1 when it is the median.
        median: Median of the series as it stands.
        converted: That median, or that of the values concerned, in the canonical unit.
    """

    unit: str
    share: float
    median: float
    converted: float


def unit_hint(spec: SeriesSpec, values: pl.Series) -> UnitHint | None:
    """Whether a known conversion would explain the values better than the canonical unit.

    All values: the median is unusual (|z| >= 1.75 by the public constants) and usual when converted
    (|z| <= 1). Some values: at least 1 % lie outside the plausible limits, and most of them are
    usual when converted (|z| <= 3), as when two wards write two units into one series.

    Args:
        values: Finite values of the series.
    """
    options = [conversion for conversion in conversions(spec) if conversion.changes]
    if len(values) < FEWEST or not options:
        return None
    median = _median(values)
    if abs(_z(spec, median)) >= _UNUSUAL:
        best = min(options, key=lambda option: abs(_z(spec, option(median))))
        if abs(_z(spec, best(median))) <= _USUAL:
            return UnitHint(best.unit, 1.0, median, best(median))
    outside = values.filter((values < spec.low) | (values > spec.high))
    if len(outside) < max(5, _MIXED_SHARE * len(values)):
        return None
    for option in options:
        usual = [abs(_z(spec, option(value))) <= 3 for value in outside]
        if sum(usual) >= 0.8 * len(outside):
            share = sum(usual) / len(values)
            return UnitHint(option.unit, share, median, option(_median(outside)))
    return None


def _z(spec: SeriesSpec, value: float) -> float:
    """Distance from the typical value in typical distances, as the encoders standardise."""
    if not spec.log:
        return (value - spec.centre) / spec.scale
    return math.log(value / spec.centre) / spec.scale if value > 0 else -math.inf


def _median(values: pl.Series) -> float:
    return float(values.median())  # type: ignore[arg-type]

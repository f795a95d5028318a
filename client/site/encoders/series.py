"""Series and demographics as fixed-length vectors: eleven statistics per series, bounded.

UNI-MLM takes from HAIM (Soenksen et al. 2022) eleven numbers per series: mean, variance, minimum,
maximum, mean difference, mean absolute difference, maximum absolute difference, sum of absolute
differences, last minus first, number of peaks, trend. They are HAIM's (variance with n - 1, trend
over the measurement's number and not over time), with these differences, all on purpose:

* HAIM appends a **row of zeros** to every table first, so that a minimum is never above 0 and "last
  minus first" is the negated first value. There is no such row here: an absent series gives zeros
  and a presence of 0.
* HAIM does not sort. Here entries are taken in order of `hours` (entries of one hour by value), so
  the order of rows in a table means nothing.
* A peak is a local maximum not below the series' median (`scipy.signal.find_peaks`,
  ``height=median``; a plateau is one peak).
* Values are standardised by public clinical constants before; after, each statistic is squashed
  into a public range and the whole vector held to a public norm (`NORM`).
  Everything is a function of the one record: no mean or deviation over patients, which under
  differential privacy would be an unpaid release. Zero therefore means typical, for an absent
  series as well; the presence flag tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from client.site.shard.clinical import (
    AGE_CENTRE_YEARS,
    AGE_SCALE_YEARS,
    SeriesSpec,
    specs,
)

STATISTICS = (
    "mean",
    "variance",
    "minimum",
    "maximum",
    "mean_difference",
    "mean_absolute_difference",
    "maximum_absolute_difference",
    "sum_of_absolute_differences",
    "last_minus_first",
    "peaks",
    "trend",
)
"""The eleven statistics, in the order of the columns of each series."""

DEMOGRAPHICS = ("age", "age_missing", "male", "female", "sex_unknown")
"""Columns of `demographics`."""

# What each statistic of a standardised ICU series typically is and by how much it varies: from what
# such a series looks like (entries within about one scale of their mean, a few per day), not from
# data. Sums and counts grow with the number of entries, so their logarithm, ln(1 + s), is used.
_TYPICAL = np.array([0.0, 0.6, -0.7, 0.7, 0.0, 0.6, 1.0, 1.3, 0.0, 0.7, 0.0])
_SIZE = np.array([2.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 3.0, 2.0, 2.0, 1.0])
_LOGARITHMIC = np.array([name in ("sum_of_absolute_differences", "peaks") for name in STATISTICS])
# Under DP every coordinate receives the same noise, so its range says how much of the signal it is
# expected to carry: a patient's level before its variation, and that before what two noisy readings
# differ by. Presence is nearly constant for common series and would eat the clipping bound.
_RANGE = np.array([1.0, 0.5, 0.8, 0.8, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3])
PRESENCE = 0.2
"""Value of the presence flag of a series that has an entry."""
SEX = 0.2
"""Value of the column of a record's sex, which tells less of risk than age does."""
NORM = {"chart": 2.0, "lab": 1.5, "procedure": 0.5, "demographics": 0.8}
"""Longest vector per kind. The longest records are otherwise the ones that clipping shortens most,
and the norm of the other sources with them."""


def dimension(n_series: int) -> int:
    """Width of `statistics` for so many series: eleven statistics and one presence flag each."""
    return n_series * (len(STATISTICS) + 1)


def statistics(
    events: pl.DataFrame, records: pl.DataFrame, source: str, series: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Bounded statistics of each record's series, from entries up to the record's cutoff.

    Args:
        events: Columns stay_id, hours, source, series, value; others are ignored. Entries that are
            null or not finite are skipped.
        records: Columns record_id, stay_id, cutoff_hours; one row per record. Several records may
            share a stay.
        source: ``chart``, ``lab`` or ``procedure``.
        series: Canonical names; their order is the order of the columns.

    Returns:
        ``x`` float32 ``[N, 12 S]``, each row at most `NORM` long: the eleven statistics of the
        first series, of the second, ..., then the S presence flags (0, or `PRESENCE` times the
        series' weight). An absent series is all zeros.
        ``present`` bool ``[N]``: whether any of the series has an entry. Rows as in `records`.

    Raises:
        EncoderError: A name is not canonical for this source.
    """
    chosen = specs(source, list(series))
    n, s, k = records.height, len(chosen), len(STATISTICS)
    group, value = _entries(events, records, source, chosen)
    raw, groups = _raw_statistics(group, value)
    grown = np.where(_LOGARITHMIC, np.log1p(np.abs(raw)), raw)
    cells = np.zeros((n * s, k), dtype=np.float32)
    cells[groups] = _RANGE * np.tanh((grown - _TYPICAL) / _SIZE)
    seen = np.zeros(n * s, dtype=np.float32)
    seen[groups] = PRESENCE
    presence = seen.reshape(n, s)
    weight = np.array([spec.weight for spec in chosen], dtype=np.float32)
    x = np.concatenate([cells.reshape(n, s * k) * np.repeat(weight, k), presence * weight], axis=1)
    return _held(x, NORM[source]), presence.max(axis=1) > 0


def demographics(records: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Age and sex of each record.

    Args:
        records: Columns age (years, null if unknown) and sex (``M``, ``F``, anything else or null:
            unknown).

    Returns:
        ``x`` float32 ``[N, 5]``, each row at most `NORM` long: tanh of half the standardised age
        (0 if missing), a flag for a missing age, and sex as one of three (`SEX`); ``present`` bool
        ``[N]``: always true, since an unknown age or sex has its own column.
    """
    age = records["age"].cast(pl.Float64).to_numpy()
    missing = ~np.isfinite(age)
    z = (np.where(missing, AGE_CENTRE_YEARS, age) - AGE_CENTRE_YEARS) / AGE_SCALE_YEARS
    sex = records["sex"].cast(pl.String).fill_null("").to_numpy()
    male, female = sex == "M", sex == "F"
    columns = [np.tanh(z / 2.0), missing, SEX * male, SEX * female, SEX * ~(male | female)]
    x = np.stack(columns, axis=1).astype(np.float32)
    return _held(x, NORM["demographics"]), np.ones(records.height, dtype=bool)


def _held(x: np.ndarray, longest: float) -> np.ndarray:
    """Rows of x, those longer than `longest` shortened to it."""
    norm = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1, keepdims=True))
    return (x * np.minimum(1.0, longest / np.maximum(norm, longest))).astype(np.float32)


def _entries(
    events: pl.DataFrame, records: pl.DataFrame, source: str, chosen: list[SeriesSpec]
) -> tuple[np.ndarray, np.ndarray]:
    """Standardised values with their cell (record * S + series), sorted by cell, then by time."""
    constants = pl.DataFrame(
        {
            "series": [spec.name for spec in chosen],
            "column": np.arange(len(chosen), dtype=np.int64),
            "centre": [float(spec.centre) for spec in chosen],
            "scale": [float(spec.scale) for spec in chosen],
            "low": [float(spec.low) for spec in chosen],
            "high": [float(spec.high) for spec in chosen],
            "log": [spec.log for spec in chosen],
        }
    )
    rows = records.select(
        "stay_id",
        "cutoff_hours",
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    )
    value = pl.col("value").cast(pl.Float64)
    held = value.clip(pl.col("low"), pl.col("high"))
    z = (
        pl.when("log")
        .then((held / pl.col("centre")).log() / pl.col("scale"))
        .otherwise((held - pl.col("centre")) / pl.col("scale"))
    )
    sorted_entries = (
        events.lazy()
        .filter(
            pl.col("source") == chosen[0].source if chosen else pl.lit(False), value.is_finite()
        )
        .join(constants.lazy(), on="series")
        .join(rows.lazy(), on="stay_id")
        .filter(pl.col("hours") <= pl.col("cutoff_hours"))
        .select("hours", cell=pl.col("row") * len(chosen) + pl.col("column"), z=z)
        .sort("cell", "hours", "z")
        .collect()
    )
    return sorted_entries["cell"].to_numpy(), sorted_entries["z"].to_numpy()


def _raw_statistics(group: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unscaled statistics ``[G, 11]`` of each run of equal `group`, and the G groups."""
    if group.size == 0:
        return np.zeros((0, len(STATISTICS))), np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    count = np.diff(np.r_[first, group.size])
    last = first + count - 1
    which = np.repeat(np.arange(first.size), count)
    steps = np.maximum(count - 1, 1)

    mean = np.add.reduceat(value, first) / count
    centred = value - mean[which]
    # np.diff across a border between two groups is no difference: the group's first entry gets 0.
    difference = np.diff(value, prepend=value[0])
    difference[first] = 0.0
    size = np.abs(difference)
    total = np.add.reduceat(size, first)
    change = value[last] - value[first]

    place = np.arange(group.size) - first[which] - ((count - 1) / 2.0)[which]
    spread = np.where(count > 1, count * (count.astype(float) ** 2 - 1) / 12.0, 1.0)
    columns = [
        mean,
        np.add.reduceat(centred**2, first) / steps,
        np.minimum.reduceat(value, first),
        np.maximum.reduceat(value, first),
        change / steps,
        total / steps,
        np.maximum.reduceat(size, first),
        total,
        change,
        _peaks(value, which, first, count),
        np.add.reduceat(place * centred, first) / spread,
    ]
    return np.stack(columns, axis=1), group[first]


def _peaks(
    value: np.ndarray, which: np.ndarray, first: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """Local maxima per group that are not below the group's median; a plateau counts once."""
    by_size = value[np.lexsort((value, which))]
    median = (by_size[first + (count - 1) // 2] + by_size[first + count // 2]) / 2.0
    # Merge runs of equal values; a peak is then a run above both neighbours of its own group.
    new_run = np.r_[True, (value[1:] != value[:-1]) | (which[1:] != which[:-1])]
    level, owner = value[new_run], which[new_run]
    inner = np.zeros(level.size, dtype=bool)
    inner[1:-1] = (
        (owner[1:-1] == owner[:-2])
        & (owner[1:-1] == owner[2:])
        & (level[1:-1] > level[:-2])
        & (level[1:-1] > level[2:])
    )
    counted = inner & (level >= median[owner])
    return np.bincount(owner[counted], minlength=first.size).astype(float)

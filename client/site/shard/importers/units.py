"""Units: how sources spell them, and how one becomes another.

A value in a unit that is neither the series' own nor one that can be turned into it is left out and
counted: a glucose in mmol/L read as mg/dL is a patient who does not exist.
"""

from __future__ import annotations

import re

import polars as pl

from client.site.shard.clinical import SERIES
from client.site.shard.importers.tally import Tally
from client.site.shard.units import UNITS, conversions

_SPELLINGS = {
    "1/min": ("bpm", "/min", "insp/min", "breaths/min", "beats/min", "breath", "bpm."),
    "mmHg": ("mm hg",),
    "deg C": ("°c", "degc", "c", "celsius", "cel"),
    "deg F": ("°f", "degf", "f", "fahrenheit", "[degf]"),
    "cmH2O": ("cm h2o", "cm[h2o]"),
    "K/uL": ("k/mcl", "10*3/ul", "x10^9/l", "10^9/l", "thousand/ul"),
    "M/uL": ("m/mcl", "10*6/ul", "x10^12/l", "10^12/l", "mil/ul"),
    "U/L": ("iu/l", "[iu]/l"),
    "mEq/L": ("meq/l",),
    "ug/mL": ("mcg/ml",),
    "ug/L": ("mcg/l",),
    "lb": ("lbs", "lbs.", "pounds"),
    "kg": ("kgs",),
    "fraction": ("frac", "ratio"),
    "1": ("units", "unit", "ph", "ph units"),
    "L/min": ("lpm", "l/m"),
}
_UNIT_OF = {name.lower(): unit for unit, names in _SPELLINGS.items() for name in (unit, *names)}
_UNIT_OF |= {spec.unit.lower(): spec.unit for spec in SERIES.values()}
_UNIT_OF |= {unit.lower(): unit for unit in UNITS}
_NOT_GIVEN = ("", "unk", "none", "nan")
_MICRO = {0xB5: "u", 0x3BC: "u"}  # two signs that look alike
# A cell may hold anything, also a name or a number of a patient: what is shown looks like a unit.
_LIKE_A_UNIT = re.compile(r"(?!.*\d{4})(?!.* .* )[A-Za-z0-9%/\u00b5\u03bc°.^*\[\]() -]{1,15}")


def canonical_unit(text: str | None) -> str | None:
    """The one spelling of a unit; None where none is given; a unit unknown to us as it stands."""
    clean = (text or "").strip()
    if clean.lower() in _NOT_GIVEN:
        return None
    return _UNIT_OF.get(clean.lower().translate(_MICRO), clean)


def conversion(source: str, series: str, unit: str | None) -> tuple[float, float] | None:
    """Factor and offset from `unit` to the series' own; None where it cannot be done.

    A value without a unit is taken to be in the series' own.
    """
    own = SERIES[source, series].unit
    given = canonical_unit(unit)
    if given is None or given == own or source == "procedure":
        return 1.0, 0.0
    if own == "points" or (own == "1" and series == "ph"):
        return 1.0, 0.0
    found = (c for c in conversions(SERIES[source, series]) if c.unit == given)
    return next(((c.factor, c.offset) for c in found), None)


def to_canonical(frame: pl.DataFrame, table: str, tally: Tally) -> pl.DataFrame:
    """`value` in the canonical unit of its series; the column `unit` is gone.

    Args:
        frame: Columns source, series, value, unit (text or null), and others that are kept.
    """
    pairs = frame.select("source", "series", "unit").unique()
    known = [conversion(*row) for row in pairs.iter_rows()]
    pairs = pairs.with_columns(
        factor=pl.Series([k[0] if k else None for k in known], dtype=pl.Float64),
        offset=pl.Series([k[1] if k else None for k in known], dtype=pl.Float64),
    )
    joined = frame.join(
        pairs, on=["source", "series", "unit"], how="left", nulls_equal=True, maintain_order="left"
    )
    lost = joined.filter(pl.col("factor").is_null())
    for series, unit, rows in lost.group_by("series", "unit").len().sort("series").iter_rows():
        tally.skip(table, f"{series} in {_shown(unit)}: not a unit that is understood", rows)
    joined = joined.filter(pl.col("factor").is_not_null())
    changed = joined.filter((pl.col("factor") != 1) | (pl.col("offset") != 0))
    for series, unit, rows in changed.group_by("series", "unit").len().sort("series").iter_rows():
        tally.note(table, f"{series} converted from {unit}", rows)
    return joined.with_columns(value=pl.col("value") * pl.col("factor") + pl.col("offset")).drop(
        "unit", "factor", "offset"
    )


def _shown(unit: str) -> str:
    """A unit as it stands, unless it may be a name: two words without a sign of measure."""
    word = " " not in unit or any(sign in unit for sign in "/%°^*")
    return unit if word and _LIKE_A_UNIT.fullmatch(unit) else "another unit"

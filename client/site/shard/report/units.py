"""Values that look as if they stood in another unit than the canonical one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from client.site.shard.clinical import SeriesSpec


@dataclass(frozen=True)
class Conversion:
    """How a unit that hospitals also use becomes the canonical one: ``factor * v + offset``."""

    unit: str
    factor: float
    offset: float = 0.0

    def __call__(self, value: float) -> float:
        return self.factor * value + self.offset


_FRACTION = Conversion("fraction of 1", 100.0)
_KILOPASCAL = Conversion("kPa", 7.50062)
_PER_LITRE = Conversion("g/L", 0.1)
_MILLILITRES = Conversion("L", 1000.0)

# Molar masses: glucose 180.16, creatinine 113.12, urea nitrogen 28.01, calcium 40.08, magnesium
# 24.31, phosphorus 30.97, bilirubin 584.7, cholesterol 386.7, lactate 90.08, haemoglobin 16114 per
# haem, vancomycin 1449.
CONVERSIONS: dict[str, tuple[Conversion, ...]] = {
    "temperature": (Conversion("deg F", 1 / 1.8, -32 / 1.8), Conversion("K", 1.0, -273.15)),
    **dict.fromkeys(("fio2", "spo2", "sao2", "hematocrit", "neutrophils", "rdw"), (_FRACTION,)),
    **dict.fromkeys(("po2", "pco2", "mbp", "sbp_invasive", "dbp_invasive"), (_KILOPASCAL,)),
    **dict.fromkeys(("mbp_invasive", "mbp_noninvasive"), (_KILOPASCAL,)),
    **dict.fromkeys(("sbp_noninvasive", "dbp_noninvasive"), (_KILOPASCAL,)),
    **dict.fromkeys(("albumin", "mchc"), (_PER_LITRE,)),
    **dict.fromkeys(("tidal_volume_set", "urine_output_24h"), (_MILLILITRES,)),
    "weight": (Conversion("lb", 0.45359), Conversion("g", 0.001)),
    "hemoglobin": (_PER_LITRE, Conversion("mmol/L", 1.6114)),
    "glucose": (Conversion("mmol/L", 18.016),),
    "creatinine": (Conversion("µmol/L", 1 / 88.4),),
    "urea_nitrogen": (Conversion("mmol/L", 2.801), Conversion("mg/dL of urea", 0.467)),
    "calcium_total": (Conversion("mmol/L", 4.008),),
    "magnesium": (Conversion("mmol/L", 2.431),),
    "phosphate": (Conversion("mmol/L", 3.097),),
    "bilirubin_total": (Conversion("µmol/L", 1 / 17.1),),
    "cholesterol": (Conversion("mmol/L", 38.67),),
    "lactate": (Conversion("mg/dL", 0.111),),
    "vancomycin": (Conversion("µmol/L", 1.449),),
    "c_reactive_protein": (Conversion("mg/dL", 10.0),),
    "d_dimer": (Conversion("µg/L", 0.001),),
    "troponin_i": (Conversion("ng/L", 0.001),),
    "troponin_t": (Conversion("ng/L", 0.001),),
    **dict.fromkeys(("platelet_count", "white_blood_cells"), (Conversion("1/µL", 0.001),)),
    **dict.fromkeys(("neutrophils_abs", "lymphocytes_abs"), (Conversion("1/µL", 0.001),)),
}
"""Per canonical series the other units in common use."""

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
    options = CONVERSIONS.get(spec.name, ())
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

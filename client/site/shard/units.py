"""How units that hospitals also use become the canonical ones: one table for all who convert.

Units are spelt as in `clinical`. Amounts of substance follow from molar masses in g/mol.
"""

from __future__ import annotations

from dataclasses import dataclass

from client.site.shard.clinical import SeriesSpec


@dataclass(frozen=True)
class Conversion:
    """From `unit` to a series' own: ``factor * v + offset``."""

    unit: str
    factor: float
    offset: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether the number becomes another; mmol/L and mEq/L of sodium are one."""
        return (self.factor, self.offset) != (1.0, 0.0)

    def __call__(self, value: float) -> float:
        return self.factor * value + self.offset


_OF_UNIT: dict[str, tuple[Conversion, ...]] = {
    "deg C": (Conversion("deg F", 5 / 9, -160 / 9), Conversion("K", 1.0, -273.15)),
    "mmHg": (Conversion("kPa", 7.500617),),
    "%": (Conversion("fraction", 100.0),),
    "kg": (Conversion("lb", 0.45359237), Conversion("g", 1e-3)),
    "mL": (Conversion("L", 1000.0),),
    "L/min": (Conversion("mL/min", 1e-3),),
    "g/dL": (Conversion("g/L", 0.1),),
    "mg/L": (
        Conversion("mg/dL", 10.0),
        Conversion("ug/L", 1e-3),
        Conversion("ng/mL", 1e-3),
        Conversion("ug/mL", 1.0),
    ),
    "ug/mL": (Conversion("mg/L", 1.0), Conversion("ng/mL", 1e-3)),
    "ug/L": (Conversion("ng/L", 1e-3), Conversion("ng/mL", 1.0)),
    "K/uL": (Conversion("1/uL", 1e-3),),
}
_GLUCOSE, _CHOLESTEROL, _CREATININE, _BILIRUBIN = 180.16, 386.65, 113.12, 584.66
_UREA, _UREA_NITROGEN, _LACTATE, _VANCOMYCIN = 60.06, 28.01, 90.08, 1449.3
_CALCIUM, _MAGNESIUM, _PHOSPHORUS, _HAEM = 40.08, 24.31, 30.97, 16114.0
_OF_SERIES: dict[str, tuple[Conversion, ...]] = {
    "glucose": (Conversion("mmol/L", _GLUCOSE / 10),),
    "cholesterol": (Conversion("mmol/L", _CHOLESTEROL / 10),),
    "creatinine": (Conversion("umol/L", _CREATININE / 1e4),),
    "bilirubin_total": (Conversion("umol/L", _BILIRUBIN / 1e4),),
    "urea_nitrogen": (
        Conversion("mmol/L", _UREA_NITROGEN / 10),
        Conversion("mg/dL of urea", _UREA_NITROGEN / _UREA),
    ),
    "calcium_total": (Conversion("mmol/L", _CALCIUM / 10),),
    "magnesium": (Conversion("mmol/L", _MAGNESIUM / 10),),
    "phosphate": (Conversion("mmol/L", _PHOSPHORUS / 10),),
    "hemoglobin": (Conversion("mmol/L", _HAEM / 1e4),),
    "lactate": (Conversion("mg/dL", 10 / _LACTATE),),
    "vancomycin": (Conversion("umol/L", _VANCOMYCIN / 1e3),),
    "mchc": (Conversion("g/L", 0.1), Conversion("g/dL", 1.0)),
    **dict.fromkeys(
        ("sodium", "potassium", "chloride", "bicarbonate", "anion_gap"),
        (Conversion("mmol/L", 1.0),),
    ),
}
UNITS = frozenset(c.unit for of in (*_OF_UNIT.values(), *_OF_SERIES.values()) for c in of)
"""All units that can be converted in some series."""


def conversions(spec: SeriesSpec) -> tuple[Conversion, ...]:
    """The units in use beside a series' own, one conversion each."""
    return _OF_SERIES.get(spec.name, ()) + _OF_UNIT.get(spec.unit, ())

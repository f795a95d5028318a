"""Public clinical constants: what a typical value of every canonical series is.

Each series has a centre, a scale, plausible limits and a weight, written down from general
clinical knowledge (adult reference ranges and what is usual in intensive care), once, by hand.
**They were not fitted on any data set** (which of three weightings to take was tuned on one, see
`_WEIGHT`), and must never be fitted at a hospital: a mean or deviation taken from its patients
would be an unpaid release, for every step of every study (a patient would move it without being
sampled).

They need not be exact. A wrong scale costs a little accuracy; it cannot cost privacy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from common.errors import EncoderError

Source = Literal["chart", "lab", "procedure"]


@dataclass(frozen=True)
class SeriesSpec:
    """One canonical series and the public constants that standardise its values.

    A value ``v`` is first held to ``[low, high]``, then becomes ``z = (v - centre) / scale``; with
    ``log`` it becomes ``z = ln(v / centre) / scale`` (quantities that are skewed over patients and
    differ by factors: enzymes, creatinine, volumes), so there ``scale`` is in natural log units.

    Attributes:
        source: ``chart``, ``lab`` or ``procedure``.
        name: Canonical name, as in the shard contract.
        unit: Unit of `centre`, `low`, `high` and of the events' values.
        centre: Typical value of an adult in intensive care; ``z = 0``.
        scale: Typical distance between two such patients; ``z = 1``.
        low: Smallest value that is not plainly an artefact.
        high: Largest such value.
        log: Whether to standardise the logarithm.
        weight: Range of this series' statistics, by what it usually tells of a patient's risk.
    """

    source: Source
    name: str
    unit: str
    centre: float
    scale: float
    low: float
    high: float
    log: bool = False
    weight: float = 1.0


# name: (unit, centre, scale, low, high[, log])
_Row = tuple[str, float, float, float, float] | tuple[str, float, float, float, float, bool]

_CHART: dict[str, _Row] = {
    "heart_rate": ("1/min", 85, 18, 10, 300),
    "sbp_noninvasive": ("mmHg", 120, 22, 30, 300),
    "dbp_noninvasive": ("mmHg", 62, 14, 10, 200),
    "mbp_noninvasive": ("mmHg", 80, 15, 20, 250),
    "respiratory_rate": ("1/min", 19, 6, 2, 80),
    "spo2": ("%", 97, 3, 40, 100),
    "gcs_verbal": ("points", 4, 1.5, 1, 5),
    "gcs_eye": ("points", 3, 1, 1, 4),
    "gcs_motor": ("points", 5, 1.5, 1, 6),
    "gcs_total": ("points", 12, 4, 3, 15),
    "sbp_invasive": ("mmHg", 120, 22, 30, 300),
    "dbp_invasive": ("mmHg", 60, 12, 10, 200),
    "mbp_invasive": ("mmHg", 80, 15, 20, 250),
    "mbp": ("mmHg", 80, 18, 20, 250),
    "temperature": ("deg C", 37, 0.8, 26, 43),
    "fio2": ("%", 45, 18, 21, 100),
    "oxygen_flow": ("L/min", 4, 0.8, 0.5, 80, True),
    "sao2": ("%", 97, 3, 40, 100),
    "peep": ("cmH2O", 6, 3, 0, 35),
    "vent_rate_set": ("1/min", 16, 5, 2, 60),
    "tidal_volume_set": ("mL", 480, 90, 100, 1200),
    "mean_airway_pressure": ("cmH2O", 10, 4, 1, 50),
    "peak_inspiratory_pressure": ("cmH2O", 23, 7, 3, 80),
    "plateau_pressure": ("cmH2O", 20, 5, 3, 70),
    "pressure_support": ("cmH2O", 8, 4, 0, 40),
    "urine_output": ("mL", 90, 0.9, 5, 3000, True),
    "urine_output_24h": ("mL", 1700, 0.7, 50, 15000, True),
    "weight": ("kg", 80, 22, 25, 300),
}

_LAB: dict[str, _Row] = {
    "glucose": ("mg/dL", 135, 0.35, 20, 1500, True),
    "potassium": ("mEq/L", 4.1, 0.6, 1.5, 10),
    "sodium": ("mEq/L", 139, 5, 100, 180),
    "chloride": ("mEq/L", 104, 6, 70, 145),
    "creatinine": ("mg/dL", 1.1, 0.65, 0.2, 25, True),
    "urea_nitrogen": ("mg/dL", 22, 0.7, 2, 250, True),
    "bicarbonate": ("mEq/L", 24, 4.5, 3, 50),
    "anion_gap": ("mEq/L", 13, 4, 1, 45),
    "hemoglobin": ("g/dL", 10.5, 1.9, 2, 22),
    "hematocrit": ("%", 31, 5.5, 8, 65),
    "magnesium": ("mg/dL", 2, 0.35, 0.5, 8),
    "platelet_count": ("K/uL", 190, 0.6, 5, 1500, True),
    "phosphate": ("mg/dL", 3.5, 1.2, 0.5, 15),
    "white_blood_cells": ("K/uL", 11, 0.5, 0.1, 200, True),
    "calcium_total": ("mg/dL", 8.4, 0.8, 4, 16),
    "mch": ("pg", 30, 2.5, 15, 45),
    "red_blood_cells": ("M/uL", 3.5, 0.7, 1, 8),
    "mchc": ("%", 33, 1.5, 24, 40),
    "mcv": ("fL", 90, 7, 55, 130),
    "rdw": ("%", 15, 2.2, 10, 35),
    "neutrophils": ("%", 78, 14, 0, 100),
    "vancomycin": ("ug/mL", 16, 0.6, 1, 100, True),
    "neutrophils_abs": ("K/uL", 8, 0.6, 0.05, 100, True),
    "lymphocytes_abs": ("K/uL", 1.2, 0.7, 0.02, 100, True),
    "c_reactive_protein": ("mg/L", 60, 1.2, 0.3, 600, True),
    "ldh": ("U/L", 300, 0.6, 50, 20000, True),
    "d_dimer": ("mg/L", 2, 1.2, 0.1, 100, True),
    "factor_xiii": ("%", 80, 30, 1, 200),
    "po2": ("mmHg", 110, 0.5, 20, 600, True),
    "pco2": ("mmHg", 40, 9, 8, 150),
    "ph": ("1", 7.38, 0.08, 6.6, 7.9),
    "lactate": ("mmol/L", 1.8, 0.6, 0.2, 30, True),
    "albumin": ("g/dL", 3.1, 0.65, 0.8, 6),
    "bilirubin_total": ("mg/dL", 0.8, 0.9, 0.1, 60, True),
    "alkaline_phosphatase": ("U/L", 85, 0.6, 10, 3000, True),
    "alt": ("U/L", 40, 1.1, 3, 15000, True),
    "ast": ("U/L", 50, 1.1, 3, 20000, True),
    "cholesterol": ("mg/dL", 155, 45, 20, 500),
    "troponin_i": ("ug/L", 1, 1.8, 0.01, 100, True),
    "troponin_t": ("ug/L", 0.1, 1.6, 0.005, 30, True),
}

_PROCEDURE = [
    "foley_catheter",
    "picc_line",
    "intubation",
    "peritoneal_dialysis",
    "bronchoscopy",
    "eeg",
    "dialysis_crrt",
    "dialysis_catheter",
    "chest_tube_removed",
    "hemodialysis",
    "mechanical_ventilation",
    "noninvasive_ventilation",
    "extubation",
    "dialysis",
    "chest_tube",
    "central_venous_catheter",
    "chest_xray",
    "head_ct",
    "echocardiography",
    "oxygen_therapy",
    "vasopressors",
    "inotropes",
    "antibacterials",
    "blood_products",
    "insulin",
    "sedatives",
    "narcotic_analgesics",
    "bronchodilators",
    "glucocorticoids",
    "diuretics",
    "antiarrhythmics",
    "antiplatelets",
    "vte_prophylaxis",
    "stress_ulcer_prophylaxis",
    "enteral_feeding",
    "volume_resuscitation",
    "norepinephrine_infusion",
    "epinephrine_infusion",
    "phenylephrine_infusion",
    "vasopressin_infusion",
    "dopamine_infusion",
    "dobutamine_infusion",
    "propofol_infusion",
    "fentanyl_infusion",
    "midazolam_infusion",
    "dexmedetomidine_infusion",
    "insulin_infusion",
    "heparin_infusion",
    "amiodarone_infusion",
    "diltiazem_infusion",
    "nitroglycerin_infusion",
    "nicardipine_infusion",
    "pantoprazole_infusion",
    "furosemide_infusion",
]

# Under differential privacy each coordinate gets the same noise: a range is a prior on relevance.
# It is the common ground of the severity scores of intensive care (APACHE, SAPS, SOFA):
# consciousness first, then kidney and perfusion; what no score uses, or what repeats another series
# (six blood pressures, the red cell indices), less. It concerns risk in general. Of three such
# weightings this was the best on training patients of PhysioNet 2012: a tuned hyper-parameter of
# that benchmark, and a public constant everywhere else.
_WEIGHT: dict[str, float] = {
    "gcs_total": 1.5,
    **dict.fromkeys(("urea_nitrogen", "urine_output", "urine_output_24h", "lactate"), 1.25),
    **dict.fromkeys(("sbp_noninvasive", "dbp_noninvasive", "mbp_noninvasive"), 0.6),
    **dict.fromkeys(("sbp_invasive", "dbp_invasive", "mbp_invasive"), 0.6),
    **dict.fromkeys(("sao2", "weight", "hematocrit", "red_blood_cells", "mch", "mchc", "mcv"), 0.5),
    **dict.fromkeys(("magnesium", "phosphate", "chloride", "calcium_total", "cholesterol"), 0.5),
    **dict.fromkeys(("alkaline_phosphatase", "alt", "ast", "ldh", "factor_xiii", "d_dimer"), 0.5),
    **dict.fromkeys(("troponin_i", "troponin_t", "vancomycin", "neutrophils"), 0.5),
    **dict.fromkeys(("neutrophils_abs", "lymphocytes_abs", "c_reactive_protein"), 0.5),
}


def _spec(source: Source, name: str, row: _Row) -> SeriesSpec:
    return replace(SeriesSpec(source, name, *row), weight=_WEIGHT.get(name, 1.0))


_DONE: _Row = ("1 = done", 0, 1, 1, 1)

SERIES: dict[tuple[str, str], SeriesSpec] = {
    **{("chart", name): _spec("chart", name, row) for name, row in _CHART.items()},
    **{("lab", name): _spec("lab", name, row) for name, row in _LAB.items()},
    # Done or given: 1. Some sources write a duration, which is known only at the end and would
    # tell the future; both limits at 1 make every entry of a procedure read as 1.
    **{("procedure", name): _spec("procedure", name, _DONE) for name in _PROCEDURE},
}
"""Every canonical series, keyed by (source, name): 28 chart, 40 lab, 54 procedure."""

AGE_CENTRE_YEARS = 62.0
AGE_SCALE_YEARS = 17.0
"""Adults in intensive care; ages enter as (age - centre) / scale."""


def specs(source: str, names: list[str] | tuple[str, ...]) -> list[SeriesSpec]:
    """Constants of the named series of a source, in the order of `names`.

    Raises:
        EncoderError: A series is not canonical for this source, or is named twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EncoderError(
            f"series {', '.join(twice)} of source '{source}' named twice",
            cure="name each series once",
        )
    unknown = [name for name in names if (source, name) not in SERIES]
    if unknown:
        known = ", ".join(name for kind, name in SERIES if kind == source) or "none"
        raise EncoderError(
            f"source '{source}' has no canonical series {', '.join(repr(u) for u in unknown)}",
            cure=f"use its canonical names: {known}",
        )
    return [SERIES[source, name] for name in names]

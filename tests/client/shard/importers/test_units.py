"""Units: literature factors, spellings as sources write them, and what is not understood."""

from __future__ import annotations

import polars as pl
import pytest

from client.site.shard.clinical import SERIES
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.units import canonical_unit, conversion, to_canonical

# Each case: series, value, unit, the same in the canonical unit. Molar masses: glucose 180.16,
# cholesterol 386.65, creatinine 113.12, bilirubin 584.66, lactate 90.08 g/mol; urea nitrogen 28.01,
# Ca 40.08, Mg 24.31, P 30.97; haemoglobin 16,114 per monomer. 1 lb = 0.45359237 kg.
CONVERSIONS = [
    ("chart", "temperature", 98.6, "°F", 37.0),
    ("chart", "temperature", 32.0, "Deg. F", None),
    ("chart", "temperature", 212.0, "degF", 100.0),
    ("chart", "temperature", 37.5, "°C", 37.5),
    ("chart", "weight", 100.0, "lbs", 45.359237),
    ("chart", "weight", 3500.0, "g", 3.5),
    ("chart", "fio2", 0.4, "fraction", 40.0),
    ("chart", "heart_rate", 80.0, "bpm", 80.0),
    ("chart", "respiratory_rate", 16.0, "insp/min", 16.0),
    ("chart", "sbp_invasive", 16.0, "kPa", 120.01),
    ("chart", "oxygen_flow", 2000.0, "mL/min", 2.0),
    ("chart", "tidal_volume_set", 0.45, "L", 450.0),
    ("chart", "gcs_eye", 4.0, "anything", 4.0),
    ("lab", "glucose", 5.5, "mmol/L", 5.5 * 18.016),
    ("lab", "glucose", 100.0, "MG/DL", 100.0),
    ("lab", "cholesterol", 5.0, "mmol/L", 5 * 38.665),
    ("lab", "creatinine", 88.4, "umol/L", 1.0),
    ("lab", "urea_nitrogen", 10.0, "mmol/L", 28.01),
    ("lab", "bilirubin_total", 17.1, "umol/L", 1.0),
    ("lab", "calcium_total", 2.5, "mmol/L", 10.02),
    ("lab", "magnesium", 1.0, "mmol/L", 2.431),
    ("lab", "phosphate", 1.0, "mmol/L", 3.097),
    ("lab", "hemoglobin", 9.0, "mmol/L", 9 * 1.6114),
    ("lab", "hemoglobin", 140.0, "g/L", 14.0),
    ("lab", "lactate", 18.016, "mg/dL", 2.0),
    ("lab", "lactate", 2.0, "mmol/L", 2.0),
    ("lab", "sodium", 140.0, "mmol/L", 140.0),
    ("lab", "albumin", 40.0, "g/L", 4.0),
    ("lab", "c_reactive_protein", 1.2, "mg/dL", 12.0),
    ("lab", "d_dimer", 500.0, "ng/mL", 0.5),
    ("lab", "d_dimer", 500.0, "ng/mL FEU", None),
    ("lab", "troponin_t", 0.02, "ng/mL", 0.02),
    ("lab", "troponin_t", 20.0, "ng/L", 0.02),
    ("chart", "temperature", 310.15, "K", 37.0),
    ("lab", "platelet_count", 250.0, "10*3/uL", 250.0),
    ("lab", "white_blood_cells", 7.0, "x10^9/L", 7.0),
    ("lab", "red_blood_cells", 4.5, "m/mcL", 4.5),
    ("lab", "mchc", 33.0, "g/dL", 33.0),
    ("lab", "vancomycin", 15.0, "mcg/mL", 15.0),
    ("lab", "ldh", 200.0, "IU/L", 200.0),
    ("lab", "po2", 12.0, "kPa", 90.007),
    ("lab", "ph", 7.4, "units", 7.4),
    ("lab", "creatinine", 1.0, "mmol/L", None),
    ("lab", "glucose", 1.0, "furlong", None),
    ("lab", "sodium", 1.0, "mg/dL", None),
]


@pytest.mark.parametrize(
    ("source", "series", "value", "unit", "wanted"), CONVERSIONS, ids=lambda x: str(x)
)
def test_a_value_in_the_canonical_unit(source, series, value, unit, wanted):
    found = conversion(source, series, unit)
    if wanted is None:
        assert found is None
        return
    assert found is not None
    factor, offset = found
    assert value * factor + offset == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("unit", [None, "", "  ", "None", "UNK", "nan"])
@pytest.mark.parametrize(("source", "series"), [("lab", "glucose"), ("chart", "temperature")])
def test_no_unit_is_the_canonical_one(source, series, unit):
    assert conversion(source, series, unit) == (1.0, 0.0)


def test_every_series_understands_its_own_unit_in_any_case():
    for (source, series), spec in SERIES.items():
        for text in (spec.unit, spec.unit.upper(), f" {spec.unit.lower()} "):
            assert conversion(source, series, text) == (1.0, 0.0), (series, text)


def test_an_unknown_unit_stays_as_it_stands():
    assert canonical_unit(" furlong ") == "furlong"


def test_rows_are_kept_in_order_and_the_rest_is_counted():
    frame = pl.DataFrame(
        {
            "source": ["lab", "chart", "lab", "lab", "lab"],
            "series": ["glucose", "temperature", "glucose", "glucose", "glucose"],
            "value": [5.0, 98.6, 90.0, 1.0, 95.0],
            "unit": ["mmol/L", "°F", None, "stone", "mg/dL"],
            "row": [0, 1, 2, 3, 4],
        }
    )
    tally = Tally()
    got = to_canonical(frame, "labs", tally)
    assert got.columns == ["source", "series", "value", "row"]
    assert got["row"].to_list() == [0, 1, 2, 4]
    assert got["value"].to_list() == pytest.approx([90.08, 37.0, 90.0, 95.0], rel=1e-3)
    assert tally["labs"].skipped == {"glucose in stone: not a unit that is understood": 1}
    assert tally["labs"].noted == {
        "glucose converted from mmol/L": 1,
        "temperature converted from °F": 1,
    }


@pytest.mark.parametrize("unit", ["mg/dL", "10*3/uL", "ng/mL FEU", "stone", "\u00b5g/L", "(calc)"])
def test_a_unit_is_named_if_it_looks_like_one(unit):
    assert skipped_as(unit) == unit


@pytest.mark.parametrize(
    "text",
    [
        "see report of Dr Smith",
        "Smith, John",
        "John Smith",
        "a b c",
        "MRN 10000032",
        "x" * 16,
        "<b>",
    ],
)
def test_free_text_in_the_place_of_a_unit_is_not_repeated(text):
    assert skipped_as(text) == "another unit"


def skipped_as(unit: str) -> str:
    """What the reason calls the unit of a value that is left out for it."""
    row = {"source": ["lab"], "series": ["sodium"], "value": [1.0], "unit": [unit]}
    tally = Tally()
    assert to_canonical(pl.DataFrame(row), "labs", tally).is_empty()
    (reason,) = tally["labs"].skipped
    return reason.removeprefix("sodium in ").removesuffix(": not a unit that is understood")


@pytest.mark.parametrize("micro", ["u", "\u00b5", "\u03bc"])
def test_the_signs_for_micro_are_one(micro):
    assert canonical_unit(f"{micro}mol/L") == "umol/L"


def test_an_empty_table_stays_one():
    frame = pl.DataFrame(
        schema={"source": pl.String, "series": pl.String, "value": pl.Float64, "unit": pl.String}
    )
    assert to_canonical(frame, "labs", Tally()).columns == ["source", "series", "value"]

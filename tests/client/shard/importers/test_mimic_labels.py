"""Each label at its boundary, against the definitions written out as plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

SECOND = 1 / 3600
TASKS = ("length_of_stay", "mortality_48h", "hospital_mortality", "long_stay", "readmission")
PATHOLOGIES = {
    "fracture": "Fracture",
    "lung_lesion": "Lung Lesion",
    "enlarged_cardiomediastinum": "Enlarged Cardiomediastinum",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "lung_opacity": "Lung Opacity",
    "pneumothorax": "Pneumothorax",
    "edema": "Edema",
    "cardiomegaly": "Cardiomegaly",
    "no_finding": "No Finding",
    "pleural_effusion": "Pleural Effusion",
    "pleural_other": "Pleural Other",
    "support_devices": "Support Devices",
}


def expected(
    record: float,
    end: float,
    died: float | None,
    others: Sequence[tuple[float, str]] = (),
    *,
    exclude: bool = False,
) -> dict[str, bool | None]:
    """Labels of a record of a stay from hour 0 to `end`.

    Args:
        others: Begin and admission type of the patient's other stays.
        exclude: Mortality is unknown for those discharged alive within 48 h (HAIM).
    """
    planned = ("ELECTIVE", "SURGICAL SAME DAY ADMISSION", "AMBULATORY OBSERVATION")
    leaves_soon = died is None and end - record <= 48
    mortality: bool | None = died is not None and died - record <= 48
    if exclude and leaves_soon:
        mortality = None
    long_stay: bool | None = end > 7 * 24
    if end < 3 * 24 or record > 48:
        long_stay = None
    readmission: bool | None = any(
        end < begin <= end + 30 * 24 for begin, kind in others if kind not in planned
    )
    if died is not None:
        readmission = None
    return {
        "length_of_stay": leaves_soon,
        "mortality_48h": mortality,
        "hospital_mortality": died is not None,
        "long_stay": long_stay,
        "readmission": readmission,
    }


def labels(record: dict[str, Any]) -> dict[str, bool | None]:
    return {task: record[f"y_{task}"] for task in TASKS}


# Each case: hour of the X-ray, discharge, death.
MOMENTS = [
    *((20.0, end, None) for end in (68 - SECOND, 68.0, 68 + SECOND)),
    *((20.0, 400.0, died) for died in (68 - SECOND, 68.0, 68 + SECOND, 20.0)),
    (20.0, 68.0, 68.0),
    (20.0, 69.0, 68.0),
    *((record, 100.0, None) for record in (48.0, 48 + SECOND)),
    *((record, 200.0, None) for record in (48.0, 48 + SECOND, 190.0)),
    *((0.0, end, None) for end in (72 - SECOND, 72.0, 72 + SECOND)),
    *((0.0, end, None) for end in (168 - SECOND, 168.0, 168 + SECOND)),
    (0.0, 168 + SECOND, 168 + SECOND),
    (30.0, 30.0, None),
]


@pytest.mark.parametrize("exclude", [False, True])
def test_outcomes_at_their_boundaries(mimic, exclude):
    for number, (record, end, died) in enumerate(MOMENTS):
        mimic.patient(100 + number)
        mimic.stay(100 + number, 1000 + number, 0, end, died=died)
        mimic.xray(100 + number, 5000 + number, record)
    got = mimic.run(exclude_early_discharges=exclude)
    for number, (record, end, died) in enumerate(MOMENTS):
        row = got.record(1000 + number)
        assert row["cutoff_hours"] == pytest.approx(record)
        assert labels(row) == expected(record, end, died, exclude=exclude), MOMENTS[number]


# Each case: when the second admission begins (the first one ends at hour 100), and its type.
RETURNS = [
    (100.0, "URGENT"),  # moved on, not come back
    (100 + SECOND, "URGENT"),
    (820.0, "EW EMER."),
    (820 + SECOND, "EW EMER."),
    (300.0, "ELECTIVE"),
    (300.0, "SURGICAL SAME DAY ADMISSION"),
    (300.0, "AMBULATORY OBSERVATION"),
    (300.0, "EU OBSERVATION"),
    (300.0, "DIRECT OBSERVATION"),
    (300.0, "OBSERVATION ADMIT"),
    (300.0, "DIRECT EMER."),
    (300.0, ""),
]


@pytest.mark.parametrize("unit", [None, "Coronary Care Unit (CCU)"])
def test_readmission_counts_unplanned_stays_of_any_ward(mimic, unit):
    for number, (begin, kind) in enumerate(RETURNS):
        mimic.patient(100 + number)
        mimic.stay(100 + number, 1000 + number, 0, 100)
        mimic.stay(100 + number, 2000 + number, begin, begin + 10, kind=kind, unit=unit)
    got = mimic.run(hour=1)
    for number, case in enumerate(RETURNS):
        want = expected(1, 100, None, [case])
        assert labels(got.record(1000 + number)) == want, case


def test_a_planned_return_does_not_hide_an_unplanned_one_after_it(mimic):
    mimic.patient(10)
    mimic.stay(10, 100, 0, 100)
    mimic.stay(10, 101, 150, 160, kind="ELECTIVE", unit=None)
    mimic.stay(10, 102, 200, 210, unit=None)
    assert mimic.run().record()["y_readmission"] is True


def test_another_patient_does_not_come_back_for_them(mimic):
    for patient, begin in ((10, 0), (11, 150)):
        mimic.patient(patient)
        mimic.stay(patient, patient * 10, begin, begin + 100)
    assert mimic.run().record(100)["y_readmission"] is False


@pytest.mark.parametrize("flag", [0, 1])
def test_dead_if_flag_or_time_says_so_and_it_is_noted(mimic, flag):
    """Without a time of death the discharge stands for it."""
    mimic.patient(10)
    mimic.stay(10, 100, 0, 90, died=None if flag else 90, flag=flag)
    got = mimic.run()
    assert labels(got.record()) == expected(48, 90, 90)
    (noted,) = got.tally["admissions"].noted
    assert "disagree" in noted


@pytest.mark.parametrize(
    ("died", "record", "end", "hour"),
    [
        ("2150-01-04", 40, 200, 96 - SECOND),  # the end of that day
        ("2150-01-04", 42, 90, 90),  # at most the discharge
        ("2150-01-01", 42, 90, 90),  # before the admission, which is at 30: the discharge
        (29, 42, 90, 90),
        (30, 30, 90, 30),
    ],
)
def test_a_death_without_a_time_or_before_the_admission_is_a_death(mimic, died, record, end, hour):
    mimic.patient(10)
    mimic.stay(10, 100, 30, end, died=died)
    mimic.xray(10, 1, record, labels={})
    got = mimic.run()
    assert labels(got.record()) == expected(record - 30, end - 30, hour - 30)
    dated, early = isinstance(died, str), died in ("2150-01-01", 29)
    noted = "\n".join(got.tally["admissions"].noted)
    assert ("a date of death without a time" in noted) == dated
    assert ("died before admitted" in noted) == early


def test_a_study_number_of_two_patients_has_the_labels_of_each(mimic):
    for patient, edema in ((10, 1), (11, 0), (12, 1)):
        mimic.patient(patient)
        mimic.stay(patient, patient * 10)
        mimic.xray(patient, 5, 20, dicom=f"d{patient}", labels={"Edema": edema})
    got = mimic.run(objectors=(12,))
    assert got.record(100)["y_edema"] is True
    assert got.record(110)["y_edema"] is False
    assert got.skipped("chexpert") == {"the patient objects": 1}
    assert got.tally["chexpert"].kept == 2


def test_records_of_a_fixed_hour_need_a_stay_that_lasts_and_a_living_patient(mimic):
    for number, (end, died) in enumerate(
        [(48.0, None), (48 - SECOND, None), (60.0, 48.0), (60.0, 48 - SECOND)]
    ):
        mimic.patient(10 + number)
        mimic.stay(10 + number, 100 + number, 0, end, died=died)
    got = mimic.run()
    assert sorted(got.records["stay_id"]) == ["100", "102"]
    assert got.records["cutoff_hours"].to_list() == [48.0, 48.0]
    assert got.skipped("records") == {
        "the stay ended before hour 48": 1,
        "the patient had died before hour 48": 1,
    }
    assert got.record(102)["y_mortality_48h"] is True


def test_chexpert_one_is_true_zero_false_and_the_rest_unknown(ward_of_one):
    words = {"1.0": True, "0.0": False, "-1.0": None, "": None, "1": True, "0": False, "2": None}
    random.seed(0)
    drawn = []
    for study in range(30):
        row = {task: random.choice(list(words)) for task in PATHOLOGIES}
        ward_of_one.xray(
            10, study, 1 + study, labels={PATHOLOGIES[task]: text for task, text in row.items()}
        )
        drawn.append(row)
    ward_of_one.xray(10, 30, 40)  # not in the CheXpert table
    got = ward_of_one.run()
    rows = got.records.sort("cutoff_hours").rows(named=True)
    for row, texts in zip(rows, drawn, strict=False):
        assert {task: row[f"y_{task}"] for task in texts} == {
            task: words[text] for task, text in texts.items()
        }
    assert all(rows[30][f"y_{task}"] is None for task in PATHOLOGIES)
    odd = sum("2" in row.values() for row in drawn)
    assert got.tally["chexpert"].noted == {"a label other than 1, 0, -1: unknown": odd}


def test_the_fourteen_labels_of_chexpert_and_five_outcomes(ward_of_one):
    ward_of_one.xray(10, 1, 5, labels={})
    (shard,) = ward_of_one.run().shards.values()
    assert set(shard.tasks) == {*PATHOLOGIES, *TASKS}


def test_random_histories(mimic):
    """Stays and X-rays as they fall, every label and age by the definitions."""
    rng = random.Random(3)
    kinds = ["EW EMER.", "ELECTIVE", "URGENT", "SURGICAL SAME DAY ADMISSION"]
    want = {}
    for patient in range(10, 70):
        age = rng.randrange(18, 91)
        mimic.patient(patient, age=age, gender=rng.choice("FM"))
        begin, stays = float(rng.randrange(0, 24)), []
        for number in range(rng.randrange(1, 5)):
            end = begin + rng.choice([20, 48, 72, 100, 168, 169, 300])
            stays.append((patient * 10 + number, begin, end, rng.choice(kinds)))
            begin = end + rng.choice([1, 100, 700, 720, 721, 9000])
        died = stays[-1][2] - rng.choice([0, 1, 10]) if rng.random() < 0.3 else None
        for hadm, begin, end, kind in stays:
            dead = died if hadm == stays[-1][0] else None
            mimic.stay(patient, hadm, begin, end, kind=kind, died=dead)
            hour = rng.choice([0, 1, 47, 48, 49, 90, 120, 250])
            if begin + hour <= min(end, dead or end):
                mimic.xray(patient, hadm, begin + hour)
                others = [(b - begin, k) for h, b, _, k in stays if h != hadm]
                ended = None if dead is None else dead - begin
                want[str(hadm)] = expected(hour, end - begin, ended, others)
    got = mimic.run()
    assert {row["stay_id"]: labels(row) for row in got.records.rows(named=True)} == want

"""When an input becomes visible: what was not filed by then is not seen by then."""

from __future__ import annotations

import random

import polars as pl
import pytest

MINUTE, SECOND = 1 / 60, 1 / 3600
HEART_RATE, POTASSIUM, INTUBATION, CRRT = 220045, 50971, 224385, 225802


def seen(got, table: str, hour: float) -> pl.DataFrame:
    """What a record at this hour sees, by the shard's one rule."""
    frame = getattr(got, table)
    return frame if frame.is_empty() else frame.filter(pl.col("hours") <= hour + 1e-9)


@pytest.fixture
def ward(mimic):
    """X-rays at hours 10 and 30 of a stay of ten days."""
    mimic.patient(10)
    mimic.stay(10, 100)
    mimic.xray(10, 1, 10)
    mimic.xray(10, 2, 30)
    return mimic


def test_a_lab_value_counts_from_when_it_was_filed(ward):
    ward.value(10, 100, POTASSIUM, 4.0, measured=9, stored=10 + SECOND)
    ward.value(10, 100, POTASSIUM, 5.0, measured=9, stored=10)
    ward.value(10, 100, HEART_RATE, 80, measured=9, stored=31)
    ward.value(10, 100, HEART_RATE, 81, measured=9)
    got = ward.run()
    assert sorted(seen(got, "events", 10)["value"]) == [5.0, 81.0]
    assert sorted(seen(got, "events", 30)["value"]) == [4.0, 5.0, 81.0]
    assert got.skipped("chartevents")["available only after the stay's last record"] == 1


def test_stored_before_measured_takes_the_later_time_and_is_noted(ward):
    ward.value(10, 100, POTASSIUM, 4.0, measured=20, stored=5)
    got = ward.run()
    assert got.events["hours"].to_list() == [20.0]
    assert got.tally["labevents"].noted == {
        "stored before it was measured: the later time counts": 1
    }


def test_the_report_of_an_x_ray_is_not_seen_by_its_own_record(ward):
    ward.note(10, 100, "Findings: edema.", written=10, stored=10.5)
    ward.note(10, 100, "Findings: none.", written=30, stored=30.5)
    got = ward.run()
    assert seen(got, "notes", 10).is_empty()
    assert seen(got, "notes", 30)["text"].to_list() == ["Findings: edema."]
    assert got.skipped("radiology") == {"available only after the stay's last record": 1}


@pytest.mark.parametrize(
    ("written", "stored", "reason"),
    [
        (5, None, "no storetime: when it could be read is not known"),
        (5, 4.9, "filed before it was written"),
        (5, "soon", "a time is unreadable"),
        ("soon", 6, "a time is unreadable"),
    ],
)
def test_a_note_whose_time_of_filing_is_not_sure_is_left_out(ward, written, stored, reason):
    ward.note(10, 100, "Lungs are clear.", written, stored)
    got = ward.run()
    assert got.notes.is_empty()
    assert got.skipped("radiology") == {reason: 1}


def test_a_discharge_note_is_seen_only_by_what_comes_after_it_was_filed(ward):
    ward.note(10, 100, "Went home.", written=240, stored=250, category="discharge")
    ward.note(10, 100, "Transfer note.", written=11, stored=12, category="discharge")
    ward.note(10, None, "No admission given.", written=13, stored=14, category="discharge")
    ward.note(10, None, "Long before.", written=-90, stored=-80, category="discharge")
    got = ward.run()
    assert got.notes["text"].to_list() == ["Transfer note.", "No admission given."]
    assert set(got.notes["category"]) == {"discharge"}
    assert got.skipped("discharge") == {
        "available only after the stay's last record": 1,
        "in no hospital stay of the import": 1,
    }


def test_procedures_count_at_their_start_and_as_one_whatever_they_last(ward):
    ward.procedure(10, 100, INTUBATION, start=4, value=1, stored=6)
    ward.procedure(10, 100, CRRT, start=8, value=4321.0, stored=200)
    ward.procedure(10, 100, CRRT, start=8, value=99.0, stored=150)
    got = ward.run()
    assert got.events.select("hours", "source", "series", "value").rows() == [
        (4.0, "procedure", "intubation", 1.0),
        (8.0, "procedure", "dialysis_crrt", 1.0),
    ]
    assert got.skipped("procedureevents") == {"given twice": 1}


def test_views_of_a_study_are_one_record_at_the_first_of_them(mimic):
    """A report filed between two views stays unseen: it tells the study's labels. A view of over an
    hour later is another examination, which the record does not see."""
    mimic.patient(10)
    mimic.stay(10, 100)
    views = [("PA", 5), ("LATERAL", 6), (None, 5.0), ("LATE", 6 + SECOND)]
    for number, (view, hours) in enumerate(views):
        mimic.xray(10, 7, hours, dicom=f"v{number}", view=view)
    mimic.xray(10, 8, 20, view="NEXT")
    mimic.note(10, 100, "report of the first study", 5.5, 6)
    got = mimic.run()
    assert got.records["record_id"].to_list() == ["100-s7", "100-s8"]
    assert got.records["cutoff_hours"].to_list() == [5.0, 20.0]
    assert sorted(seen(got, "images", 5)["view"], key=str) == ["LATERAL", None, "PA"]
    assert sorted(got.images["hours"]) == pytest.approx([5.0] * 3 + [6 + SECOND, 20.0])
    assert seen(got, "notes", 5).is_empty()
    assert got.tally["records"].rows == 2
    assert got.tally["images"].noted == {"taken over an hour after its study's first view": 1}


DAY = "2150-01-02"  # hours 24 to 48
BY_EVENING = 48 - SECOND


def test_a_date_without_a_time_counts_from_the_end_of_its_day(mimic):
    """At midnight a record of that morning would see what was written in the evening."""
    mimic.patient(10)
    mimic.stay(10, 100)
    for study, hour in enumerate([30, 47, 60]):
        mimic.xray(10, study, hour)
    mimic.value(10, 100, POTASSIUM, 1.0, measured=DAY)
    mimic.value(10, 100, POTASSIUM, 2.0, measured=25, stored=DAY)
    mimic.value(10, 100, HEART_RATE, 80, measured=25)
    mimic.procedure(10, 100, INTUBATION, start=DAY)
    mimic.note(10, 100, "Stored on that day.", written=26, stored=DAY)
    mimic.note(10, 100, "Written on that day.", written=DAY, stored=26)
    got = mimic.run()
    assert seen(got, "events", 47)["series"].to_list() == ["heart_rate"]
    assert seen(got, "notes", 47)["text"].to_list() == ["Written on that day."]
    late = got.events.filter(pl.col("hours") > 47)
    assert late["hours"].to_list() == pytest.approx([BY_EVENING] * 3)
    assert got.notes["hours"].to_list() == pytest.approx([26, BY_EVENING])
    what = "a date without a time: the end of that day counts"
    for table, rows in (("labevents", 2), ("procedureevents", 1), ("radiology", 1)):
        assert got.tally[table].noted == {what: rows}
    assert not got.tally["chartevents"].noted


def test_an_image_is_seen_by_its_own_record_to_the_last_bit(mimic):
    """Hours of images and cutoffs are one number: no gap of rounding between them."""
    rng = random.Random(0)
    mimic.patient(10)
    mimic.stay(10, 100, begin=0.123, end=240.9)
    for study in range(1, 201):
        mimic.xray(10, study, 1 + rng.random() * 200)
    got = mimic.run()
    times = got.records.select(
        "cutoff_hours", study=pl.col("record_id").str.extract(r"-s(\d+)$")
    ).join(got.images.select("hours", study=pl.col("path").str.extract(r"/s(\d+)/")), on="study")
    assert times.height == 200
    assert (times["hours"] == times["cutoff_hours"]).all()


def test_x_rays_outside_of_stays_and_after_death_are_no_records(mimic):
    mimic.patient(10)
    mimic.stay(10, 100, begin=10, end=50, died=45)
    mimic.stay(10, 101, begin=500, end=600, unit=None)
    hours = [10 - SECOND, 10, 45, 45 + SECOND, 50 + SECOND, 550]
    for study, hour in enumerate(hours):
        mimic.xray(10, study, hour)
    mimic.xray(99, 99, 20)  # no such patient
    got = mimic.run()
    assert got.records["record_id"].to_list() == ["100-s1", "100-s2"]
    assert got.skipped("records") == {
        "X-ray outside of every stay with intensive care": 4,
        "X-ray after death": 1,
    }
    assert got.images.height == 2
    assert got.skipped("images") == {
        "in no hospital stay of the import": 4,
        "available only after the stay's last record": 1,
    }


def test_values_without_an_admission_are_found_by_time(mimic):
    mimic.patient(10)
    mimic.patient(11)
    mimic.stay(10, 100, begin=0, end=60)
    mimic.stay(10, 101, begin=100, end=160)
    mimic.stay(11, 110, begin=0, end=160)
    for value, measured, stored in (
        (1, 0, None),
        (2, 60, None),
        (3, 60 + SECOND, None),
        (4, 99, 101),
        (5, -1, 0),
        (6, -1, None),
        (7, 120, None),
    ):
        mimic.value(10, None, POTASSIUM, value, measured, stored)
    got = mimic.run(hour=60)
    assert got.events.select("stay_id", "hours", "value").rows() == [
        ("100", 0.0, 1.0),
        ("100", 0.0, 5.0),
        ("100", 60.0, 2.0),
        ("101", 1.0, 4.0),
        ("101", 20.0, 7.0),
    ]
    assert got.skipped("labevents") == {"in no hospital stay of the import": 2}


def test_values_of_the_emergency_room_stand_before_hour_zero(ward):
    ward.value(10, 100, POTASSIUM, 4.0, measured=-3)
    assert ward.run().events["hours"].to_list() == [-3.0]


@pytest.mark.parametrize(
    "stamp", ["2150-01-01 05:00:00", "2150-01-01 05:00:00.000", " 2150-01-01 05:00:00 "]
)
def test_forms_of_a_time(ward, stamp):
    ward.value(10, 100, POTASSIUM, 4.0, measured=stamp)
    assert ward.run().events["hours"].to_list() == [5.0]


@pytest.mark.parametrize(
    ("clock", "hours"),
    [("53000", 5.5), ("053000.0", 5.5), ("53000.250", 5.5 + 0.25 / 3600), ("30.5", 30.5 / 3600)],
)
def test_forms_of_the_time_of_a_study(ward_of_one, clock, hours):
    ward_of_one.xray(10, 1, 0)
    ward_of_one.tables["cxr/mimic-cxr-2.0.0-metadata"][0]["StudyTime"] = clock
    assert ward_of_one.run().record()["cutoff_hours"] == pytest.approx(hours, abs=1e-9)


def test_hour_instead_of_images_keeps_the_images_as_inputs(ward):
    got = ward.run(hour=24)
    assert got.record()["cutoff_hours"] == 24.0
    assert got.images["hours"].to_list() == [10.0]
    assert not [task for task in got.records.columns if task == "y_edema"]

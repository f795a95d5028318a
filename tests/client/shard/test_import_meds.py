"""MEDS data sets: the map, the messy cases, and the same patients as from MIMIC-IV's own layout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from client.site.shard import Shard, inspect
from client.site.shard.importers import staging
from client.site.shard.importers.cli import app
from client.site.shard.importers.meds import MedsSource, import_meds
from client.site.shard.importers.meds_map import MedsMap, matches
from client.site.shard.importers.mimic import PLANNED, MimicSource, import_mimic_iv
from client.site.shard.importers.mimic_items import ITEMS
from client.site.shard.importers.staging import Options
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import OUTCOME_TASKS
from common.errors import ShardError

Row = tuple[int | None, float | str | None, str | None, float | None, str | None]
NOON = datetime(2100, 1, 1, 12)
STAYS = """
[stays]
begin = "IN//*"
end = "OUT//*"
died = "OUT//DEAD"
unit = "ICU//{unit}"
planned = "IN//PLANNED"

[patient]
male = "SEX//M"
female = "SEX//F"

[records]
hour = 24
"""
INPUTS = """
[series.chart]
heart_rate = ["HR", "HR//{unit}"]
temperature = {code = "TEMP//{unit}", unit = "deg F"}

[series.lab]
glucose = [{code = "GLU//SI", unit = "mmol/L"}, "GLU//{unit}"]

[series.procedure]
intubation = "TUBE//START"

[notes]
Progress = "NOTE//*"
"""


def at(hour: float | str | None) -> datetime | None:
    """A time so many hours after noon of the first day; text is a date."""
    if hour is None or isinstance(hour, str):
        return None if hour is None else datetime.fromisoformat(hour)
    return NOON + timedelta(hours=hour)


def event(
    subject: int | None,
    hour: float | str | None,
    code: str | None,
    number: float | None = None,
    text: str | None = None,
) -> Row:
    return subject, hour, code, number, text


def stay(
    subject: int, begin: float, end: float, *, out: str = "HOME", unit: str = "A"
) -> list[Row]:
    return [
        event(subject, begin, "IN//URGENT"),
        event(subject, begin + 1, f"ICU//{unit}"),
        event(subject, end, f"OUT//{out}"),
    ]


def person(subject: int, sex: str = "F", born: str = "2040-06-30") -> list[Row]:
    return [event(subject, None, f"SEX//{sex}"), event(subject, born, "MEDS_BIRTH")]


def table(rows: list[Row]) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    return pa.table(
        {
            "subject_id": pa.array(columns[0], pa.int64()),
            "time": pa.array([at(hour) for hour in columns[1]], pa.timestamp("us")),
            "code": pa.array(columns[2], pa.string()),
            "numeric_value": pa.array(columns[3], pa.float32()),
            "text_value": pa.array(columns[4], pa.large_string()),
        }
    )


class Ward:
    """A small data set, its map, and imports of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.dest = folder, folder / "meds", folder / "out" / "ward"
        (self.root / "metadata").mkdir(parents=True)
        self.map = folder / "map.toml"
        self.map.write_text(STAYS + INPUTS)

    def write(self, *files: pa.Table | list[Row]) -> None:
        for number, rows in enumerate(files):
            file = self.root / "data" / "train" / f"{number}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table(rows) if isinstance(rows, list) else rows, file)

    def run(self, *, name: str = "ward", **options: Any) -> Tally:
        keys = {k: options.pop(k) for k in ("sites", "complete_only") if k in options}
        about = {k: options.pop(k) for k in ("hour",) if k in options}
        source = MedsSource(self.root, MedsMap.load(self.map), **about)
        _, tally = import_meds(source, self.dest, Options(name, **keys), **options)
        for counts in tally.tables.values():  # whatever the case: every row is accounted for
            assert counts.rows == counts.kept + counts.skipped.total(), tally.as_dict()
        return tally

    def shard(self, **options: Any) -> Shard:
        self.run(**options)
        shard, problems = inspect(self.dest)
        assert shard is not None
        assert not problems
        return shard


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


# -- the map ----------------------------------------------------------------------------------


def test_a_pattern_is_a_whole_code_with_gaps() -> None:
    codes = pl.Series(
        ["LAB//1//mg/dL", "LAB//11//mg/dL", "LAB//1//", "LAB//1//a[b]{c}", "xLAB//1//"]
    )
    assert matches("LAB//1//{unit}", codes).rows() == [
        ("LAB//1//mg/dL", "mg/dL"),
        ("LAB//1//", ""),
        ("LAB//1//a[b]{c}", "a[b]{c}"),
    ]
    assert matches("LAB//1*//mg/dL", codes).rows() == [
        ("LAB//1//mg/dL", None),
        ("LAB//11//mg/dL", None),
    ]
    assert matches("LAB//1//a[b]{c}", codes)["code"].to_list() == ["LAB//1//a[b]{c}"]
    assert matches("LAB//.", codes).is_empty()


def test_the_ready_map_means_what_the_mimic_importer_means() -> None:
    ready = MedsMap.load("mimic-iv-meds")
    read = {
        (source, series, pattern.code, pattern.unit)
        for source, names in ready.series.items()
        for series, patterns in names.items()
        for pattern in patterns
    }
    form = {"procedure": "PROCEDURE//START//{}"}
    assert read == {
        (i.source, i.series, form.get(i.source, "LAB//{}//{{unit}}").format(i.itemid), i.unit)
        for i in ITEMS
    }
    assert ready.stays.planned == tuple(f"HOSPITAL_ADMISSION//{kind}//*" for kind in PLANNED)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("begin =", "begins ="), "stays: unknown key 'begins'; did you mean 'begin'"),
        (("[patient]", "[patients]"), "unknown key 'patients'; did you mean 'patient'"),
        (("glucose", "glucos"), "unknown lab series 'glucos'; did you mean 'glucose'"),
        (("[series.lab]", "[series.labs]"), "unknown source 'labs'; did you mean 'lab'"),
        (("mmol/L", "furlong"), "'furlong' is no unit that can be turned into mg/dL"),
        (("TUBE//START", "TUBE//{unit}"), "procedure intubation: it is done or not"),
        (("TEMP//{unit}", "TEMP//{unit}{unit}"), "captures {unit} more than once"),
        (('"IN//*"', '"IN//{unit}"'), "stays.begin.0: 'IN//{unit}': {unit} means nothing here"),
        (('"IN//*"', '""'), "an empty pattern matches nothing"),
        (('"IN//*"', "3"), "stays.begin: "),
        (('begin = "IN//*"', ""), "stays.begin: Field required"),
        (("hour = 24", 'hour = 24\nat = "X"'), "give hour or at, not both"),
        (("hour = 24", "hour = -1"), "records.hour: "),
        (
            ("[notes]", "[tasks.long_stay]\ncodes = 'X'\nwithin_hours = 1\n[notes]"),
            "'long_stay' is",
        ),
        (
            ("[notes]", "[tasks.aki]\ncodes = 'X'\n[notes]"),
            "tasks.aki.within_hours: Field required",
        ),
        (("[notes]", "[notes"), "cannot be read as TOML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_map_is_told_by_its_keys(ward: Ward, change: tuple[str, str], told: str) -> None:
    text = (STAYS + INPUTS).replace(*change)
    assert text != STAYS + INPUTS
    ward.map.write_text(text)
    with pytest.raises(ShardError) as error:
        MedsMap.load(ward.map)
    assert told in str(error.value)
    assert str(ward.map) in str(error.value)


def test_a_map_that_is_not_there_names_the_ready_ones() -> None:
    with pytest.raises(ShardError, match=r"no map at mimic\.toml(?s:.)*mimic-iv-meds"):
        MedsMap.load("mimic.toml")


def test_a_pattern_without_codes_is_a_remark(ward: Ward) -> None:
    ward.write(person(1) + stay(1, 0, 72))
    remarks = ward.run().remarks
    assert "stays.planned: 'IN//PLANNED' matches no code" in remarks
    assert "series.lab.glucose: 'GLU//{unit}' matches no code" in remarks


def test_what_singles_out_admissions_matches_nothing_else(ward: Ward) -> None:
    """`planned = "*"` speaks of admissions, not of all codes."""
    text = STAYS.replace('"IN//PLANNED"', '"*"').replace("OUT//DEAD", "ICU//*")
    ward.map.write_text(text)
    ward.write(person(1) + stay(1, 0, 72) + stay(1, 100, 172))
    assert ward.run().remarks[0] == "stays.died: 'ICU//*' matches no code"
    assert not Shard.open(ward.dest).records["y_readmission"].any()


# -- stays and patients -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moves", "stays", "lost_begins", "lost_ends", "overlapping"),
    [
        ("b0 e30 b40 e80", [(0, 30), (40, 80)], 0, 0, 0),
        ("b0 e30 b30 e60", [(0, 30), (30, 60)], 0, 0, 0),  # a transfer
        ("b0 b40 e80", [(40, 80)], 1, 0, 0),
        ("b0 e30 e80", [(0, 30)], 0, 1, 0),
        ("e10 b40 e80", [(40, 80)], 0, 1, 0),
        ("b0 e30 b40", [(0, 30)], 1, 0, 0),
        ("b0 b10 e50 e80", [(0, 50), (10, 80)], 0, 0, 2),
        ("b0 b10 b20 e50 e80", [(20, 50)], 2, 1, 0),
        ("b0 b0 e50", [(0, 50)], 0, 0, 0),  # the same admission twice
    ],
)
def test_stays_are_pairs_of_begin_and_end(
    ward: Ward,
    moves: str,
    stays: list[tuple[int, int]],
    lost_begins: int,
    lost_ends: int,
    overlapping: int,
) -> None:
    codes = {"b": "IN//URGENT", "e": "OUT//HOME"}
    ward.map.write_text(STAYS.replace('unit = "ICU//{unit}"', "").replace("24", "1") + INPUTS)
    rows = [event(7, int(move[1:]), codes[move[0]]) for move in moves.split()]
    rows += [event(7, begin + 0.5, "HR", begin) for begin, _ in stays]
    rows += stay(8, 0, 72)  # somebody else's, at the same times
    ward.write(rows)
    tally = ward.run()
    shard = Shard.open(ward.dest)
    mine = shard.records.filter(pl.col("patient_id") == "7")
    assert mine["stay_id"].to_list() == [f"7-{n}" for n in range(1, len(stays) + 1)]
    # Each stay's own event tells where it began.
    events = shard.events
    assert events is not None
    assert dict(events.select("stay_id", "value").iter_rows()) == {
        f"7-{n}": begin for n, (begin, _) in enumerate(stays, 1)
    }
    soon = mine.sort("stay_id")["y_length_of_stay"].to_list()
    assert soon == [end - begin - 1 <= 48 for begin, end in stays]
    assert tally["stays.begin"].skipped["no end of its own"] == lost_begins
    assert tally["stays.end"].skipped["no begin of its own"] == lost_ends
    assert tally["stays.begin"].noted["overlap: first begin to first end"] == overlapping


def test_only_stays_with_a_unit_are_imported_and_others_still_readmit(ward: Ward) -> None:
    ward.write(
        [
            *stay(1, 0, 72),
            event(1, 100, "IN//URGENT"),
            event(1, 172, "OUT//HOME"),
            event(2, -20, "ICU//EARLY"),  # in the bed before the admission is on paper
            event(2, 0, "IN//URGENT"),
            event(2, 5, "ICU//LATE"),
            event(2, 72, "OUT//HOME"),
            event(3, -30, "ICU//A"),
            event(3, 0, "IN//URGENT"),
            event(3, 72, "OUT//HOME"),
        ]
    )
    tally = ward.run(sites="care-unit")
    assert {path.name for path in ward.dest.iterdir()} == {"a", "early"}
    records = Shard.open(ward.dest / "a").records
    assert records.select("stay_id", "y_readmission").rows() == [("1-1", True)]
    assert tally["stays.begin"].skipped["no entry to a unit"] == 2
    assert tally["stays.unit"].skipped["in no stay"] == 1
    assert tally["stays.unit"].noted["up to a day before the stay"] == 1


def test_ages_and_sexes_that_are_not_known_are_unknown(ward: Ward) -> None:
    ward.write(
        [
            *person(1, "M", "2040-12-31"),
            *person(2, "F", "1900-01-01"),  # 200 years
            event(3, None, "SEX//M"),
            event(3, None, "SEX//F"),
            event(4, "2050-01-01", "SEX//F"),  # a sex may have a time
            event(4, None, "MEDS_BIRTH"),  # a birth without one is none
            *(row for subject in (1, 2, 3, 4) for row in stay(subject, 0, 72)),
        ]
    )
    tally = ward.run()
    rows = Shard.open(ward.dest).records.sort("patient_id").select("age", "sex").rows()
    assert rows == [(60.0, "M"), (None, "F"), (None, None), (None, "F")]
    assert tally["stays.begin"].noted["age unknown"] == 3
    assert tally["patient.birth"].skipped["no time"] == 1


@pytest.mark.parametrize("codes", [True, False], ids=["by discharge", "by time"])
def test_who_died_in_a_stay(ward: Ward, codes: bool) -> None:
    if not codes:
        ward.map.write_text(STAYS.replace('died = "OUT//DEAD"', ""))
    ward.write(
        [
            *stay(1, 0, 72, out="DEAD"),  # no time of death
            *stay(2, 0, 72, out="DEAD"),
            event(2, 80, "MEDS_DEATH"),  # after the discharge on paper
            *stay(3, 0, 72),
            event(3, 60, "MEDS_DEATH"),  # a date alone, say: the discharge was alive
            *stay(4, 0, 72),
            event(4, 900, "MEDS_DEATH"),
        ]
    )
    records = ward.shard().records.sort("patient_id")
    died = [True, True, False, False] if codes else [False, False, True, False]
    assert records["y_hospital_mortality"].to_list() == died
    soon = [True, False, False, False] if codes else [False, False, True, False]
    assert records["y_mortality_48h"].to_list() == soon


# -- records and tasks ------------------------------------------------------------------------


def test_records_at_events(ward: Ward) -> None:
    ward.map.write_text(STAYS.replace("hour = 24", 'at = "SCAN//*"') + INPUTS)
    rows = [
        *stay(1, 0, 72, out="DEAD"),
        event(1, 50, "MEDS_DEATH"),
        *(event(1, hour, "SCAN//CT") for hour in (30, 10, 10, 60, 90)),
        event(1, 10, "SCAN//MR"),  # the same moment
        event(1, 20, "HR", 80),
        event(1, 10, "HR", 70),
        event(1, 40, "HR", 90),
    ]
    ward.write(rows)
    shard = ward.shard()
    assert shard.records.select("record_id", "cutoff_hours").rows() == [
        ("1-1-r1", 10.0),
        ("1-1-r2", 30.0),
    ]
    assert shard.events is not None
    assert shard.events["hours"].to_list() == [10.0, 20.0]
    tally = ward.run(overwrite=True)
    assert tally["records"].skipped == {"after death": 1, "in no stay of the import": 1}
    assert ward.run(overwrite=True, hour=5.0)["records"].kept == 1  # the command line decides


def test_a_task_of_ones_own(ward: Ward) -> None:
    ward.map.write_text(STAYS + '[tasks.aki]\ncodes = "DX//N17*"\nwithin_hours = 48\n')
    rows: list[Row] = []
    hours = {1: 24, 2: 24.5, 3: 72, 4: 72.5, 5: None}  # the record is at 24
    for subject, hour in hours.items():
        rows += stay(subject, 0, 30)
        rows += [event(subject, hour, "DX//N17.9"), event(subject, 40, "DX//I10")]
    ward.write(rows)
    shard = ward.shard()
    assert shard.tasks == (*OUTCOME_TASKS, "aki")
    assert shard.records.sort("patient_id")["y_aki"].to_list() == [False, True, True, False, False]


# -- inputs -----------------------------------------------------------------------------------


def test_units_are_captured_or_given_and_converted(ward: Ward) -> None:
    ward.write(
        [
            *stay(1, 0, 72),
            event(1, 1, "TEMP//°F", 98.6),
            event(1, 2, "TEMP//°C", 37.5),
            event(1, 2.5, "TEMP//UNK", 97.7),
            event(1, 3, "TEMP//furlong", 3),
            event(1, 4, "GLU//SI", 5),
            event(1, 5, "GLU//mg/dL", 90),
            event(1, 6, "HR//bpm", 70),
            event(1, 7, "TUBE//START", 480),  # a length, which is known only at the end
        ]
    )
    tally = ward.run()
    events = Shard.open(ward.dest).events
    assert events is not None
    assert dict(events.select("hours", "value").iter_rows()) == {
        1.0: pytest.approx(37, rel=1e-6),
        2.0: 37.5,
        2.5: pytest.approx(36.5, rel=1e-6),
        4.0: pytest.approx(90.08, rel=1e-6),
        5.0: 90.0,
        6.0: 70.0,
        7.0: 1.0,
    }
    assert tally["chart"].skipped == {"temperature in furlong: not a unit that is understood": 1}
    assert tally["chart"].noted == {
        "temperature converted from °F": 1,
        "temperature converted from deg F": 1,
    }
    assert tally["lab"].noted == {"glucose converted from mmol/L": 1}


def test_rows_that_cannot_be_used_are_counted(ward: Ward) -> None:
    good = event(1, 2, "HR", 80)
    ward.write(
        [
            *stay(1, 0, 72),
            *stay(2, 0, 10),
            event(None, 2, "HR", 1),
            event(1, 2, None, 1),
            event(1, 2, "ELSE", 1),
            event(1, None, "HR", 1),
            event(1, 3, "HR", None),
            event(1, 4, "HR", float("nan")),
            event(1, 5, "HR", float("inf")),
            event(1, 80, "HR", 1),
            event(1, 30, "HR", 1),
            event(2, 3, "HR", 1),
            event(9, 3, "HR", 1),
            event(1, 6, "TUBE//START"),
            event(1, None, "TUBE//START"),
            event(1, None, "IN//URGENT"),
            good,
            good,
        ]
    )
    tally = ward.run()
    events = Shard.open(ward.dest).events
    assert events is not None
    assert events.select("hours", "series", "value").rows() == [
        (2.0, "heart_rate", 80.0),
        (6.0, "intubation", 1.0),
    ]
    assert tally["data"].skipped == {"no subject_id": 1, "no code": 1, "not named in the map": 1}
    assert tally["chart"].skipped == {
        "patient not among the import's": 1,
        "no time": 1,
        "no number": 1,
        "not a finite number": 2,
        "in no hospital stay of the import": 1,
        "the stay has no record": 1,
        "available only after the stay's last record": 1,
        "given twice": 1,
    }
    assert tally["procedure"].skipped == {"no time": 1}
    assert tally["stays.begin"].skipped == {"no time": 1}


def test_texts_are_notes(ward: Ward) -> None:
    ward.write(
        [
            *stay(1, 0, 72),
            event(1, 2, "NOTE//day", text="  Better today. "),
            event(1, 3, "NOTE//day", text=" "),
            event(1, 3, "NOTE//night"),
            event(1, 48, "NOTE//discharge", text="It was sepsis."),
        ]
    )
    tally = ward.run()
    notes = Shard.open(ward.dest).notes
    assert notes is not None
    assert notes.rows() == [("1-1", 2.0, "Progress", "Better today.")]
    assert tally["notes"].skipped == {
        "no text": 2,
        "available only after the stay's last record": 1,
    }


def test_complete_means_what_the_map_names(ward: Ward) -> None:
    rows = stay(1, 0, 72) + stay(2, 0, 72)
    for subject in (1, 2):
        rows += [event(subject, 2, "HR", 80), event(subject, 2, "TUBE//START")]
        rows += [event(subject, 30 * subject - 10, "GLU//", 90)]  # the second one's too late
        rows += [event(subject, 2, "NOTE//x", text="Fine.")]
    ward.write(rows)
    assert ward.shard(complete_only=True).records["patient_id"].to_list() == ["1"]


# -- the data ---------------------------------------------------------------------------------


def rows_of_two() -> list[Row]:
    rows = person(1) + person(2, "M")
    for subject in (1, 2):
        rows += [*stay(subject, 0, 72), *stay(subject, 100, 172, out="DEAD")]
        rows += [event(subject, hour + subject, "HR", hour) for hour in (1, 5, 101)]
    return rows


def test_order_and_division_of_files_do_not_matter(ward: Ward) -> None:
    rows = rows_of_two()
    ward.write(rows)
    plain = ward.shard()
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    ward.write(mixed[::2], mixed[1::2])
    again = ward.shard(overwrite=True)
    assert again.records.equals(plain.records)
    assert plain.events is not None
    assert again.events is not None
    assert again.events.equals(plain.events)


def test_other_widths_and_encodings_are_read(ward: Ward) -> None:
    rows = table(rows_of_two())
    ward.write(rows)
    plain = ward.shard()
    wide = {
        "subject_id": pa.int32(),
        "time": pa.timestamp("ns"),
        "code": pa.dictionary(pa.int32(), pa.large_string()),
        "numeric_value": pa.float64(),
    }
    other = pa.table({name: rows[name].cast(kind) for name, kind in wide.items()})
    other = other.append_column("text_value", pa.nulls(len(rows)))
    ward.write(other.append_column("unit", pa.nulls(len(rows), pa.string())))
    again = ward.shard(overwrite=True)
    assert again.records.equals(plain.records)
    assert plain.events is not None
    assert again.events is not None
    assert again.events.equals(plain.events)


def _spoil_type(ward: Ward) -> None:
    rows = table(rows_of_two())
    ward.write(rows.set_column(0, "subject_id", rows["subject_id"].cast(pa.string())))


def _spoil_clock(ward: Ward) -> None:
    rows = table(rows_of_two())
    ward.write(rows.set_column(1, "time", rows["time"].cast(pa.timestamp("us", "UTC"))))


def _spoil_columns(ward: Ward) -> None:
    ward.write(table(rows_of_two()).drop_columns(["code"]))


def _cut_off(ward: Ward) -> None:
    ward.write(rows_of_two())
    file = ward.root / "data" / "train" / "0.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def _damage(ward: Ward) -> None:
    ward.write(rows_of_two())
    file = ward.root / "data" / "train" / "0.parquet"
    whole = bytearray(file.read_bytes())
    whole[4:200] = b"\xff" * 196
    file.write_bytes(whole)


def _without_metadata(ward: Ward) -> None:
    ward.write(rows_of_two())
    (ward.root / "metadata").rmdir()


def _wrong_metadata(ward: Ward) -> None:
    ward.write(rows_of_two())
    (ward.root / "metadata" / "dataset.json").write_text('{"dataset_name": 3}')


def _broken_metadata(ward: Ward) -> None:
    ward.write(rows_of_two())
    (ward.root / "metadata" / "dataset.json").write_text("{")


def _no_file(ward: Ward) -> None:
    (ward.root / "data").mkdir()


def _no_row(ward: Ward) -> None:
    ward.write(table(rows_of_two()).slice(0, 0))


def _other_codes(ward: Ward) -> None:
    ward.write([event(1, 0, "ADMIT//x"), event(1, 9, "ADMIT//y"), event(1, 8, "VITAL")])


def _two_series(ward: Ward) -> None:
    ward.map.write_text((STAYS + INPUTS).replace('"GLU//{unit}"', '"*//{unit}"'))
    ward.write([*rows_of_two(), event(1, 2, "TEMP//C", 37)])


def _no_unit(ward: Ward) -> None:
    ward.map.write_text(STAYS.replace("24", "240") + INPUTS)
    ward.write(rows_of_two())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda ward: None, "it has no folder data"),
        (_no_file, "holds no parquet file"),
        (_no_row, "the data files hold no events"),
        (_without_metadata, "it has no folder metadata"),
        (_wrong_metadata, "dataset.json: 3 is not of type 'string'"),
        (_broken_metadata, "dataset.json: "),
        (
            _spoil_type,
            "0.parquet: Columns with incorrect types: subject_id (want int64, got string)",
        ),
        (_spoil_clock, "0.parquet: Columns with incorrect types: time (want timestamp[us]"),
        (_spoil_columns, "0.parquet: Missing required columns: code"),
        (_cut_off, "0.parquet cannot be read"),
        (_damage, "0.parquet cannot be read"),
        (_other_codes, "the commonest of each kind: ADMIT//x (2), VITAL (1)"),
        (_two_series, "code 'TEMP//C' is chart temperature and lab glucose in the map"),
        (_no_unit, "no record is left: "),
    ],
)
def test_data_that_cannot_be_imported_say_why(
    ward: Ward, spoil: Callable[[Ward], None], told: str
) -> None:
    spoil(ward)
    with pytest.raises(ShardError) as error:
        ward.run()
    assert told in str(error.value)
    assert not ward.dest.exists()
    assert not ward.dest.parent.exists() or not list(ward.dest.parent.iterdir())


def test_sites_by_care_unit_need_units(ward: Ward) -> None:
    ward.map.write_text(STAYS.replace('unit = "ICU//{unit}"', ""))
    ward.write(rows_of_two())
    with pytest.raises(ShardError, match="the map names no care units"):
        ward.run(sites="care-unit")


def test_who_objects_is_nowhere(ward: Ward) -> None:
    rows = rows_of_two() + person(987654) + stay(987654, 0, 72, unit="HIS OWN")
    rows += [event(987654, 2, "HR", 80), event(987654, 3, "NOTE//x", text="Mr Secret")]
    ward.write(rows)
    assert "987654" in ward.shard().records["patient_id"]
    tally = ward.run(objectors=[987654], overwrite=True)
    assert tally["data"].skipped["the patient objects"] == 7
    # Not even what only this patient had: the note's code counts as one that there is not.
    assert "notes.Progress: 'NOTE//*' matches no code" in tally.remarks
    assert sorted(set(Shard.open(ward.dest).records["patient_id"])) == ["1", "2"]
    for file in ward.dest.rglob("*"):
        if file.suffix == ".parquet":
            content = str(pl.read_parquet(file).to_dicts())
        else:
            content = file.read_text()
        assert "987654" not in content
        assert "Secret" not in content
        assert "HIS OWN" not in content


def test_ids_below_zero_are_ids_like_others(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_BYTES_PER_BUCKET", 64)
    ids = (-7, -8, -(2**63))
    ward.write([row for number in ids for row in person(number) + stay(number, 0, 72)])
    assert sorted(ward.shard().records["patient_id"]) == sorted(map(str, ids))
    ward.run(objectors=[-7], overwrite=True, sites=2)
    kept = pl.concat([Shard.open(site).records for site in sorted(ward.dest.iterdir())])
    assert sorted(kept["patient_id"]) == sorted(map(str, ids[1:]))


def test_a_killed_import_leaves_nothing_that_could_be_taken_for_a_shard(ward: Ward) -> None:
    ward.write(rows_of_two())
    program = f"""
import os, signal
from pathlib import Path
from client.site.shard.importers.meds import MedsSource, import_meds
from client.site.shard.importers.meds_map import MedsMap
from client.site.shard.importers.staging import Options
def die(what, done, total):
    if what == "writing shards":
        os.kill(os.getpid(), signal.SIGKILL)
import_meds(MedsSource(Path({str(ward.root)!r}), MedsMap.load({str(ward.map)!r})),
            Path({str(ward.dest)!r}), Options("ward"), progress=die)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert ended.returncode == -signal.SIGKILL
    assert not ward.dest.exists()
    assert all(path.name.startswith(".") for path in ward.dest.parent.iterdir())
    ward.shard()
    assert [path.name for path in ward.dest.parent.iterdir()] == ["ward"]


def test_what_was_done_is_written_beside_it(ward: Ward) -> None:
    (ward.root / "metadata" / "dataset.json").write_text(
        json.dumps({"dataset_name": "Ward 7", "license": "CC0"})
    )
    ward.map.write_text(STAYS + INPUTS + '[dataset]\ndataset = "Ward"\nattribution = "Us"\n')
    ward.write(rows_of_two())
    meta = ward.shard().meta
    said = {key: meta[key] for key in ("hospital", "dataset", "licence", "attribution")}
    assert said == {"hospital": "ward", "dataset": "Ward", "licence": "CC0", "attribution": "Us"}
    story = json.loads((ward.dest / "import.json").read_text())
    assert story["source"] == "MEDS"
    assert MedsMap.model_validate(story["map"]) == MedsMap.load(ward.map)


def test_the_command(ward: Ward) -> None:
    ward.write(rows_of_two())
    objectors = ward.folder / "objectors.txt"
    objectors.write_text("2  # by letter\n")
    words = ["meds", ward.root, ward.dest, "--map", ward.map, "--opt-out", objectors]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "stays.begin" in result.output
    assert Shard.open(ward.dest).records["patient_id"].unique().to_list() == ["1"]


# -- the same patients both ways --------------------------------------------------------------


@pytest.fixture(scope="module")
def both(
    open_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Shard, Tally]]:
    """MIMIC-IV's demo from MEDS and from its own layout."""
    place = tmp_path_factory.mktemp("both")
    source = MedsSource(open_data / "mimic-iv-demo-meds", MedsMap.load("mimic-iv-meds"), hour=48)
    for folder in (source.root, open_data / "mimic-iv-demo"):
        if not folder.is_dir():
            pytest.skip(f"no open data at {folder}; set FEDWARD_DATA to the folder that holds it")
    meds = import_meds(source, place / "meds", Options("demo"))[1]
    own = import_mimic_iv(
        MimicSource(open_data / "mimic-iv-demo", hour=48), place / "own", Options("demo")
    )[1]
    assert not inspect(place / "meds")[1]
    return {"meds": (Shard.open(place / "meds"), meds), "own": (Shard.open(place / "own"), own)}


@pytest.fixture(scope="module")
def names(open_data: Path) -> pl.DataFrame:
    """hadm_id beside the id that MEDS' stays get: patient and number in time."""
    file = open_data / "mimic-iv-demo" / "hosp" / "admissions.csv.gz"
    admissions = pl.read_csv(file, try_parse_dates=True).sort("subject_id", "admittime")
    number = pl.int_range(1, pl.len() + 1).over("subject_id")
    return admissions.select(
        hadm_id=pl.col("hadm_id").cast(pl.String), name=pl.format("{}-{}", "subject_id", number)
    )


def renamed(frame: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    return (
        frame.join(names, left_on="stay_id", right_on="hadm_id", how="left")
        .with_columns(stay_id="name")
        .drop("name")
    )


def test_records_agree(both: dict[str, tuple[Shard, Tally]], names: pl.DataFrame) -> None:
    """Same patients, stays, cutoffs, ages, sexes, and all five outcomes."""
    (meds, _), (own, _) = both["meds"], both["own"]
    assert meds.tasks == own.tasks == OUTCOME_TASKS
    assert meds.records.height == 123
    assert meds.n_patients == own.n_patients == 97
    theirs = renamed(own.records, names).drop("record_id").sort("stay_id")
    assert meds.records.drop("record_id").sort("stay_id").equals(theirs)


def test_events_agree(both: dict[str, tuple[Shard, Tally]], names: pl.DataFrame) -> None:
    """All of them, in place and to the last bit that MEDS keeps."""
    key = ["stay_id", "hours", "source", "series"]
    meds, own = both["meds"][0].events, both["own"][0].events
    assert meds is not None
    assert own is not None
    mine = meds.select(*key, "value").sort(*key, "value")
    theirs = renamed(own, names).select(*key, "value").sort(*key, "value")
    assert mine.height == 44_337
    assert mine.select(key).equals(theirs.select(key))
    value, other = mine["value"].to_numpy(), theirs["value"].to_numpy()
    moved = value.astype(np.float32) != other.astype(np.float32)
    assert moved.sum() == 294
    assert mine.filter(moved)["series"].unique().to_list() == ["temperature"]
    # MEDS keeps 98.7 °F in 32 bits. That and nothing else moves the last bit of what is 37.06 °C.
    stored = (other[moved] * 9 / 5 + 32).astype(np.float32).astype(np.float64)
    assert value[moved].tolist() == pytest.approx((stored - 32) * 5 / 9, rel=1e-14)


def test_what_was_left_out_agrees(both: dict[str, tuple[Shard, Tally]]) -> None:
    (_, meds), (_, own) = both["meds"], both["own"]
    for mine, theirs in (("lab", "labevents"), ("chart", "chartevents")):
        elsewhere = own[theirs].skipped["not a canonical series"]
        skipped = own[theirs].skipped - Counter({"not a canonical series": elsewhere})
        assert meds[mine].skipped == skipped
        assert meds[mine].rows == own[theirs].rows - elsewhere
        assert meds[mine].noted == own[theirs].noted
    assert meds["lab"].skipped["d_dimer in ng/mL FEU: not a unit that is understood"] == 3
    assert meds["stays.begin"].rows == own["admissions"].rows == 275
    assert meds["stays.unit"].kept == own["icustays"].kept == 140
    # Both of these patients were in the unit half an hour before they were admitted on paper.
    assert meds["stays.unit"].noted == {"up to a day before the stay": 2}


def test_procedures_differ_only_by_the_stay_that_they_name(
    both: dict[str, tuple[Shard, Tally]],
) -> None:
    """procedureevents names the stay; MEDS has the time alone, and the ETL removed a copy."""
    mine, theirs = both["meds"][1]["procedure"], both["own"][1]["procedureevents"]
    assert mine.kept == theirs.kept == 179
    late, outside = (
        "available only after the stay's last record",
        "in no hospital stay of the import",
    )
    assert (theirs.skipped[late], theirs.skipped[outside]) == (257, 0)
    assert (mine.skipped[late], mine.skipped[outside]) == (254, 3)
    assert theirs.rows - theirs.skipped["not a canonical series"] == mine.rows + 1
    assert (mine.skipped["given twice"], theirs.skipped["given twice"]) == (0, 1)


def test_care_units_agree(open_data: Path, tmp_path: Path) -> None:
    options = Options("demo", sites="care-unit")
    source = MedsSource(open_data / "mimic-iv-demo-meds", MedsMap.load("mimic-iv-meds"))
    meds, _ = import_meds(source, tmp_path / "meds", options)
    own, _ = import_mimic_iv(MimicSource(open_data / "mimic-iv-demo"), tmp_path / "own", options)
    assert len(meds) == 8
    assert {path.name: set(Shard.open(path).records["patient_id"]) for path in meds} == {
        path.name: set(Shard.open(path).records["patient_id"]) for path in own
    }

"""Broken sources: one clear error that names file and cure, or rows that are counted by reason."""

from __future__ import annotations

import csv as csv_format
import gzip
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.site.shard.importers import mimic_cxr, staging, tables
from client.site.shard.importers.cli import app
from client.site.shard.importers.tables import read_whole, scan
from client.site.shard.importers.tally import Tally
from common import cli
from common.errors import ShardError

HEART_RATE, POTASSIUM, INTUBATION = 220045, 50971, 224385
CELSIUS, FAHRENHEIT, D_DIMER = 223762, 223761, 50915
COLUMNS = ("a", "b", "c")


def whole(file: Path, columns: tuple[str, ...] = COLUMNS) -> tuple[list[tuple[Any, ...]], Tally]:
    tally = Tally()
    rows = read_whole(file, "table", columns, tally).rows()
    counts = tally["table"]
    assert counts.rows == len(rows) + sum(counts.skipped.values())
    return rows, tally


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "table.csv") -> Path:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# -- one table ----------------------------------------------------------------------------------

READABLE = {
    "plain": ("a,b,c\n1,2,3\n4,5,6\n", [("1", "2", "3"), ("4", "5", "6")]),
    "byte order mark": ("\ufeffa,b,c\n1,2,3\n", [("1", "2", "3")]),
    "CRLF": ("a,b,c\r\n1,2,3\r\n4,5,\r\n", [("1", "2", "3"), ("4", "5", None)]),
    "CRLF in quotes": ('a,b,c\r\n1,"x\r\ny",3\r\n', [("1", "x\r\ny", "3")]),
    "commas and breaks in quotes": (
        'a,b,c\n1,"x, y\nz\n\nw",3\n4,"say ""no"", twice",6\n',
        [("1", "x, y\nz\n\nw", "3"), ("4", 'say "no", twice', "6")],
    ),
    "every cell quoted": ('"a","b","c"\n"1","","3"\n', [("1", None, "3")]),
    "blank lines": ("a,b,c\n\n1,2,3\n\n\n4,5,6\n\n", [("1", "2", "3"), ("4", "5", "6")]),
    "other order, other columns": ("x,c,a,y,b\n0,3,1,0,2\n", [("1", "2", "3")]),
    "no last line break": ("a,b,c\n1,2,3\n4,5,6", [("1", "2", "3"), ("4", "5", "6")]),
    "a quote inside a cell": ('a,b,c\n1,2" tube,3\n4,5" tube,6\n',
                              [("1", '2" tube', "3"), ("4", '5" tube', "6")]),
    "header only": ("a,b,c\n", []),
    "header without a break": ("a,b,c", []),
    "all cells empty": ("a,b,c\n,,\n", [(None, None, None)]),
    "not only ASCII": ("a,b,c\n1,µg – Größe,3\n", [("1", "µg – Größe", "3")]),
}  # fmt: skip


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
@pytest.mark.parametrize("case", READABLE)
def test_forms_that_are_read(csv, case, name):
    text, rows = READABLE[case]
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text
    got, tally = whole(csv(data, name))
    assert got == rows
    assert not tally["table"].skipped


@pytest.mark.parametrize("block", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("case", READABLE)
def test_blocks_of_any_size_give_the_same_rows(csv, monkeypatch, case, block):
    text, rows = READABLE[case]
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    assert whole(csv(text))[0] == rows


def test_random_tables_in_blocks_of_random_size(csv, monkeypatch):
    rng = random.Random(1)
    cells = ["", "1", "a b", "x,y", 'q"q', "l\nl", "\n\n", '""', "µ", "r\r\nr", ","]
    for _ in range(60):
        rows = [tuple(rng.choice(cells) for _ in COLUMNS) for _ in range(rng.randrange(0, 12))]
        frame = pl.DataFrame(rows, schema=COLUMNS, orient="row")
        file = csv(frame.write_csv())
        monkeypatch.setattr(tables, "_BLOCK_BYTES", rng.randrange(1, 60))
        assert whole(file)[0] == [tuple(cell or None for cell in row) for row in rows]


RAGGED = "a,b,c\n1,2,3\n1,2\n4,5,6\n1,2,3,4\n7,8,9\n1"


@pytest.mark.parametrize("columns", [("a", "b", "c"), ("a",), ("c",), ("c", "a")])
@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_ragged_rows_are_left_out_and_counted_never_shifted(
    csv, monkeypatch, columns, block, quote, mark
):
    """One cell too many and one too few may not make up for each other."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    text = mark + RAGGED.replace("5", f"{quote}5{quote}")
    rows, tally = whole(csv(text), columns)
    good = [dict(zip("abc", row, strict=True)) for row in ("123", "456", "789")]
    assert rows == [tuple(row[name] for name in columns) for row in good]
    assert tally["table"].skipped == {"another number of cells than the header": 3}


def test_unwanted_rows_and_ragged_rows_are_told_apart(csv):
    tally = Tally()
    only = ("not wanted", pl.col("a") == "1")
    file = csv("a,b,c\n1,2,3\n4,5,6\n1,2\n4,5,6,7\n1,8,9\n")
    frames = list(scan(file, "t", ("b", "a"), tally, only=only))
    assert pl.concat(frames).rows() == [("2", "1"), ("8", "1")]
    assert tally["t"].rows == 5
    assert tally["t"].skipped == {
        "another number of cells than the header": 2,
        "not wanted": 1,
    }


PACKED = gzip.compress(b"a,b,c\n" + b"".join(b"%d,2,3\n" % i for i in range(20_000)))
UNREADABLE: dict[str, tuple[str, bytes, str, str]] = {
    "cut gz": ("table.csv.gz", PACKED[: len(PACKED) // 2], "cut off or damaged", "checksum"),
    "gz without its last bytes": ("table.csv.gz", PACKED[:-4], "cut off or damaged", "checksum"),
    "gz of a few bytes": ("table.csv.gz", PACKED[:5], "cut off or damaged", "checksum"),
    "gz with a wrong sum": (
        "table.csv.gz", PACKED[:-8] + bytes(4) + PACKED[-4:], "cut off or damaged", "checksum"),
    "gz with a flipped byte": (
        "table.csv.gz", PACKED[:900] + bytes([PACKED[900] ^ 255]) + PACKED[901:],
        "cut off or damaged", "checksum"),
    "no gz": ("table.csv.gz", b"a,b,c\n1,2,3\n", "cut off or damaged", "checksum"),
    "empty": ("table.csv", b"", "is empty", "export it again"),
    "empty gz": ("table.csv.gz", gzip.compress(b""), "is empty", "export it again"),
    "gz of no bytes": ("table.csv.gz", b"", "is empty", "export it again"),
    "semicolons": ("table.csv", b"a;b;c\n1;2;3\n", "separated by ';'", "with commas"),
    "tabs": ("table.csv", b"a\tb\tc\n1\t2\t3\n", "separated by '\\t'", "with commas"),
    "bars": ("table.csv", b"a|b|c\n1|2|3\n", "separated by '|'", "with commas"),
    "a column is missing": ("table.csv", b"a,b\n1,2\n", "no column 'c'", "as it is published"),
    "no header": ("table.csv", b"1,2,3\n4,5,6\n", "no column 'a', 'b', 'c'", "with its header"),
    "latin-1": ("table.csv", "a,b,c\n1,Größe,3\n".encode("latin-1"), "not UTF-8", "iconv"),
    "latin-1, ragged": ("table.csv", "a,b,c\n1\n1,ö,3\n".encode("latin-1"), "not UTF-8", "iconv"),
    "UTF-16": ("table.csv", "a,b,c\n1,2,3\n".encode("utf-16"), "not readable", "with its header"),
    "open quote": ("table.csv", b'a,b,c\n1,"2,3\n4,5,6\n', "inside a quoted cell", "again"),
    "old Mac line ends": ("table.csv", b"a,b,c\r1,2,3\r", "not readable", "with its header"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_one_error_with_file_and_cure(csv, case):
    name, data, says, cure = UNREADABLE[case]
    file = csv(data, name)
    with pytest.raises(ShardError) as caught:
        whole(file)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)
    assert cure in caught.value.cure


def test_a_quote_that_stays_open_does_not_fill_the_memory(csv, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(tables, "_LONGEST_ROW_BYTES", 1 << 14)
    with pytest.raises(ShardError, match="a quote is opened and not closed within"):
        whole(csv('a,b,c\n1,"2,3\n' + "4,5,6\n" * 10_000))


def test_a_row_longer_than_many_blocks_is_read_whole(csv, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 64)
    text = "line, with comma\n" * 10_000
    assert whole(csv(f'a,b,c\n1,"{text}",3\n4,5,6\n'))[0] == [("1", text, "3"), ("4", "5", "6")]


def test_a_file_of_two_gzip_members_is_read_to_its_end(csv):
    data = gzip.compress(b"a,b,c\n1,2,3\n") + gzip.compress(b"4,5,6\n")
    assert len(whole(csv(data, "table.csv.gz"))[0]) == 2


def test_the_reader_stops_when_nobody_reads_on(csv):
    """A block that is not fetched may not hold the program."""
    blocks = scan(csv("a,b,c\n" + "1,2,3\n" * 10), "t", COLUMNS, Tally())
    next(blocks)
    blocks.close()


# -- whole trees --------------------------------------------------------------------------------


def test_the_same_shard_whatever_the_form_of_the_tables(make_mimic):
    """Plain CSV, CRLF, quotes everywhere, a byte order mark, other columns in another order."""

    def tree(name: str):
        mimic = make_mimic(name)
        for patient in (10, 11):
            mimic.patient(patient)
            mimic.stay(patient, patient * 10)
            mimic.value(patient, patient * 10, HEART_RATE, 80, 1)
            mimic.value(patient, None, POTASSIUM, 4.5, 2, 3, "mEq/L")
            mimic.procedure(patient, patient * 10, INTUBATION, 5)
            mimic.note(patient, patient * 10, 'Lungs, "clear".\n\nNo, none.', 1, 2)
        return mimic

    usual = tree("usual").run()
    odd = tree("odd")
    for name, rows in odd.tables.items():
        columns = ["extra", *reversed(odd.headers[name])]
        text = odd.text(columns, rows, quoting=csv_format.QUOTE_ALL, lineterminator="\r\n")
        odd.put(f"{name}.csv", "\ufeff" + text)
    got = odd.run(write=False)
    for table in ("records", "events", "notes"):
        assert getattr(got, table).equals(getattr(usual, table)), table
    assert got.records.height == 2


def counted(mimic, table: str, reasons: dict[str, int], **options: Any) -> Any:
    got = mimic.run(**options)
    assert got.skipped(table) == reasons
    return got


def test_duplicates_count_once(ward_of_one):
    for rows in ward_of_one.tables.values():
        rows += rows[:1]
    got = ward_of_one.run()
    assert got.records.height == got.events.height == 1
    for table in ("patients", "admissions", "icustays", "chartevents"):
        assert got.skipped(table) == {"given twice": 1}


def test_an_admission_given_twice_with_different_contents_is_an_error(ward_of_one):
    ward_of_one.stay(10, 100, end=300)
    with pytest.raises(ShardError, match=r"hadm_id 100 is given twice with different contents"):
        ward_of_one.run()


def test_a_stay_with_several_units_belongs_to_the_first(ward_of_one):
    ward_of_one.add(
        "icu/icustays", subject_id=10, hadm_id=100, first_careunit="Early (EU)", intime=-1
    )
    ward_of_one.add(
        "icu/icustays", subject_id=10, hadm_id=100, first_careunit="Late (LU)", intime=9
    )
    got = ward_of_one.run(sites="care-unit")
    assert list(got.shards) == ["eu"]
    assert got.records.height == 1


STAYS: dict[str, tuple[dict[str, Any], str]] = {
    "discharged first": ({"begin": 50, "end": 40}, "discharged before admitted"),
    "no admission time": ({"begin": None}, "no admission or discharge time"),
    "no discharge time": ({"end": None}, "no admission or discharge time"),
    "unreadable admission": ({"begin": "yesterday"}, "a time is unreadable"),
    "unreadable discharge": ({"end": "2150-13-45 00:00:00"}, "a time is unreadable"),
    "unreadable death": ({"died": "at noon"}, "a time is unreadable"),
    "no hadm_id": ({"hadm": ""}, "no readable hadm_id"),
    "odd hadm_id": ({"hadm": "x1"}, "no readable hadm_id"),
    "half a hadm_id": ({"hadm": "12.5"}, "no readable hadm_id"),
    "no subject_id": ({"subject": ""}, "no readable subject_id"),
    "odd subject_id": ({"subject": "p7"}, "no readable subject_id"),
    "nobody's": ({"subject": 77}, "the patient is not in table patients"),
}


@pytest.mark.parametrize("case", STAYS)
def test_admissions_that_cannot_be_used_are_counted(ward_of_one, case):
    cells, reason = STAYS[case]
    for number in range(2):  # two that look alike are no duplicates
        row = {"subject": 10, "hadm": 200 + number, "begin": 500, "end": 600, **cells}
        ward_of_one.stay(**row)
    got = counted(ward_of_one, "admissions", {reason: 2})
    assert got.records["stay_id"].to_list() == ["100"]
    assert sum(got.skipped("icustays").values()) == 2


def test_ids_as_floats_or_with_spaces_are_understood(mimic):
    mimic.patient("10.0")
    mimic.stay(" 10", "100.0")
    mimic.value("10 ", " 100", "220045.0", "80.0 ", 1)
    mimic.value("10.0", "100.0", HEART_RATE, " 81", 1)
    mimic.note("10.0", "100.0", "Clear.", 1, 2)
    got = mimic.run()
    assert got.record()["patient_id"] == "10"
    assert sorted(got.events["value"]) == [80.0, 81.0]
    assert got.notes.height == 1


def test_a_patient_without_admission_and_one_without_age(ward_of_one):
    ward_of_one.patient(11)
    ward_of_one.patient(12, age="unknown", gender="")
    ward_of_one.stay(12, 120)
    ward_of_one.patient(13, age=900)
    ward_of_one.stay(13, 130)
    got = counted(ward_of_one, "patients", {"no admission": 1})
    assert got.record(120)["age"] is None
    assert got.record(130)["age"] is None
    assert got.record(120)["sex"] is None
    assert got.tally["admissions"].noted == {"age missing, or not between 0 and 130: unknown": 2}


def test_an_admission_of_another_patient_is_nobodys(ward_of_one):
    ward_of_one.patient(11)
    ward_of_one.stay(11, 110)
    ward_of_one.value(10, 110, HEART_RATE, 99, 1)
    ward_of_one.note(10, 110, "Whose?", 1, 2)
    ward_of_one.add("icu/icustays", subject_id=10, hadm_id=110, first_careunit="X", intime=-9)
    got = ward_of_one.run(sites="care-unit")
    reason = {"the stay belongs to another patient": 1}
    assert got.skipped("chartevents") == got.skipped("radiology") == reason
    assert got.skipped("icustays") == {"the admission belongs to another patient": 1}
    assert list(got.shards) == ["micu"]


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"value": ""}, "no number"),
    "a word": ({"value": "high"}, "no number"),
    "a comma": ({"value": "1,5"}, "no number"),
    "infinite": ({"value": "inf"}, "no number"),
    "not a number": ({"value": "NaN"}, "no number"),
    "beyond numbers": ({"value": "1e999"}, "no number"),
    "no time": ({"measured": None}, "no time"),
    "unreadable time": ({"measured": "noon"}, "a time is unreadable"),
    "unreadable storetime": ({"stored": "later"}, "a time is unreadable"),
    "nobody": ({"subject": ""}, "no readable subject_id"),
    "an odd subject": ({"subject": "p1"}, "no readable subject_id"),
    "a stranger": ({"subject": 99}, "patient not among the import's"),
    "an unknown admission": ({"hadm": 999}, "in no hospital stay of the import"),
    "another series": ({"itemid": 226730}, "not a canonical series"),
    "no item": ({"itemid": "226x"}, "not a canonical series"),
    "a strange unit": ({"unit": "stone"}, "heart_rate in stone: not a unit that is understood"),
    "after the last record": ({"measured": 48.01}, "available only after the stay's last record"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_used_are_counted(ward_of_one, case):
    cells, reason = VALUES[case]
    row = {"subject": 10, "hadm": 100, "itemid": HEART_RATE, "value": 90, "measured": 2} | cells
    itemid = row.pop("itemid")
    ward_of_one.value(itemid=HEART_RATE, **row)
    ward_of_one.tables["icu/chartevents"][-1]["itemid"] = itemid
    got = counted(ward_of_one, "chartevents", {reason: 1})
    assert got.events["value"].to_list() == [80.0]


def test_an_admission_that_cannot_be_read_is_found_by_time_and_noted(ward_of_one):
    for hadm in ("A-100", "", " ", None):
        ward_of_one.value(10, hadm, POTASSIUM, 4, 1)
        ward_of_one.procedure(10, hadm, INTUBATION, 1)
        ward_of_one.note(10, hadm, f"Note {hadm}.", 1, 2)
    got = ward_of_one.run()
    assert set(got.events["stay_id"]) == {"100"}
    for table in ("labevents", "procedureevents", "radiology"):
        assert got.tally[table].noted == {"hadm_id unreadable: found by time": 1}


PROCEDURES: dict[str, tuple[dict[str, Any], str]] = {
    "no time": ({"start": None}, "no time"),
    "unreadable time": ({"start": "noon"}, "a time is unreadable"),
    "nobody": ({"subject": ""}, "no readable subject_id"),
}


@pytest.mark.parametrize("case", PROCEDURES)
def test_procedures_that_cannot_be_used_are_counted(ward_of_one, case):
    cells, reason = PROCEDURES[case]
    ward_of_one.procedure(**{"subject": 10, "hadm": 100, "itemid": INTUBATION, "start": 1} | cells)
    counted(ward_of_one, "procedureevents", {reason: 1})


NOTES: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"text": None}, "no text"),
    "blank text": ({"text": " \n "}, "no text"),
    "nobody": ({"subject": None}, "no readable subject_id"),
    "a stranger": ({"subject": 99}, "patient not among the import's"),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes_that_cannot_be_used_are_counted(ward_of_one, case):
    cells, reason = NOTES[case]
    row = {"subject": 10, "hadm": 100, "text": "Clear.", "written": 1, "stored": 2} | cells
    ward_of_one.note(**row)
    assert counted(ward_of_one, "radiology", {reason: 1}).notes.is_empty()


@pytest.mark.parametrize("table", ["patients", "admissions", "icustays"])
def test_an_empty_table_of_stays_leaves_no_record_and_says_so(ward_of_one, table):
    folder = "icu" if table == "icustays" else "hosp"
    ward_of_one.tables[f"{folder}/{table}"].clear()
    with pytest.raises(ShardError, match=r"no record is left: "):
        ward_of_one.run(sites="care-unit")


def test_empty_tables_of_inputs_leave_the_records(ward_of_one):
    ward_of_one.tables["icu/chartevents"].clear()
    ward_of_one.note(10, 100, "", 1, 2)
    ward_of_one.xray(10, 1, 5, on_disk=False, labels={"Edema": 0})
    got = ward_of_one.run()
    assert got.record()["y_edema"] is False
    assert got.events.is_empty()
    assert got.images.is_empty()


def test_degrees_by_their_unit_and_without_one_by_their_item(ward_of_one):
    for minute, (item, value, unit) in enumerate(
        [
            (CELSIUS, 37.0, "°C"),
            (CELSIUS, 98.6, "°F"),
            (CELSIUS, 37.0, None),
            (FAHRENHEIT, 98.6, "°F"),
            (FAHRENHEIT, 37.0, "°C"),
            (FAHRENHEIT, 98.6, None),
            (FAHRENHEIT, 98.6, " "),
        ]
    ):
        ward_of_one.value(10, 100, item, value, minute / 60, unit=unit)
    events = ward_of_one.run().events.filter(pl.col("series") == "temperature")
    assert events["value"].to_list() == pytest.approx([37.0] * 7)


def test_d_dimer_without_unit_is_in_that_of_mimic(ward_of_one):
    ward_of_one.value(10, 100, D_DIMER, 500, 1)
    ward_of_one.value(10, 100, D_DIMER, 600, 2, unit="ng/mL")
    events = ward_of_one.run().events.filter(pl.col("series") == "d_dimer")
    assert events["value"].to_list() == [0.5, 0.6]


def test_a_note_of_ten_thousand_lines_stays_whole(ward_of_one):
    text = "\n".join(f'Line {i}, "quoted", with µ' for i in range(10_000))
    ward_of_one.note(10, 100, text, 1, 2)
    assert ward_of_one.run().notes["text"].to_list() == [text]


def picture(mode: str, form: str, value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (20, 20), value).save(stream, form)
    return stream.getvalue()


GOOD = picture("L", "JPEG", 200)
IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "not on disk": ({"on_disk": False}, "the file is not on disk"),
    "empty": ({"image": b""}, "the file is no JPEG"),
    "a 16-bit PNG": ({"image": picture("I;16", "PNG", 40_000)}, "the file is no JPEG"),
    "text": ({"image": b"404 not found"}, "the file is no JPEG"),
    "cut off": ({"image": GOOD[: len(GOOD) // 2]}, "the JPEG is cut off"),
    "without its last byte": ({"image": GOOD[:-1]}, "the JPEG is cut off"),
    "twice": ({"dicom": "good"}, "given twice"),
    "nobody's": ({"subject": ""}, "no readable subject_id"),
    "no study": ({"study": ""}, "no readable dicom_id or study_id"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_cannot_be_used_are_counted(ward_of_one, case):
    cells, reason = IMAGES[case]
    ward_of_one.xray(10, 1, 5, dicom="good")
    ward_of_one.xray(**{"subject": 10, "study": 1, "hours": 6, "dicom": "bad"} | cells)
    got = counted(ward_of_one, "images", {reason: 1})
    assert got.images["path"].to_list() == ["images/p10/p10/s1/good.jpg"]
    assert got.record()["cutoff_hours"] == 5.0


NAMES = ["../../x", "a/b", "./a", "..", ".a", "a\\b", "a\0b", "a\nb", "-a", "", "a" * 300]


@pytest.mark.parametrize("copy_images", [False, True])
def test_an_image_whose_name_leads_elsewhere_is_counted(ward_of_one, copy_images):
    ward_of_one.xray(10, 1, 5, dicom="a")
    for name in NAMES:
        ward_of_one.xray(10, 1, 5, dicom="other", on_disk=False)
        ward_of_one.tables["cxr/mimic-cxr-2.0.0-metadata"][-1]["dicom_id"] = name
    reachable = ward_of_one.root / "cxr/files/p10/p10/s1/../../x.jpg"
    reachable.write_bytes(GOOD)
    got = ward_of_one.run(copy_images=copy_images)
    assert got.skipped("images") == {"no readable dicom_id or study_id": len(NAMES)}
    assert got.images["path"].to_list() == ["images/p10/p10/s1/a.jpg"]
    assert [p.name for p in ward_of_one.out.rglob("*.jpg")] == ["a.jpg"]


def test_no_image_is_placed_before_its_path_is_checked(ward_of_one, monkeypatch):
    """Should a source let such a path through, the contract stops it in time."""
    placed: list[Any] = []
    monkeypatch.setattr(mimic_cxr, "_NAMES_A_FILE", "")
    monkeypatch.setattr(staging._SiteWriter, "_place_images", lambda _, frame: placed.append(frame))
    ward_of_one.xray(10, 1, 5, dicom="../../stranger")
    with pytest.raises(ShardError, match="leads out of the shard"):
        ward_of_one.run()
    assert not placed


@pytest.mark.parametrize(("date", "time"), [("", "101010"), ("21500132", "1"), ("21500101", "x"),
                                            ("21500101", "250000"), ("21500101", "")])  # fmt: skip
def test_a_study_without_readable_time_is_counted(ward_of_one, date, time):
    ward_of_one.xray(10, 1, 5)
    ward_of_one.xray(10, 2, 6)
    ward_of_one.tables["cxr/mimic-cxr-2.0.0-metadata"][1] |= {"StudyDate": date, "StudyTime": time}
    got = counted(ward_of_one, "images", {"no readable StudyDate and StudyTime": 1})
    assert got.records.height == 1


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_grey_coloured_and_inverted_images_are_taken_as_they_are(ward_of_one, mode):
    ward_of_one.xray(10, 1, 5, image=picture(mode, "JPEG"))
    assert ward_of_one.run().images.height == 1


def test_missing_modules_are_remarked(ward_of_one):
    ward_of_one.write()
    for name in ("hosp/labevents", "icu/procedureevents", "hosp/d_labitems"):
        (ward_of_one.root / f"{name}.csv.gz").unlink()
    got = ward_of_one.run(write=False)
    assert got.events["source"].to_list() == ["chart"]
    remarks = "\n".join(got.tally.remarks)
    assert "no table for lab" in remarks
    assert "no table for procedure" in remarks
    assert "no dictionary d_labitems" in remarks


def test_items_that_the_dictionary_lacks_or_calls_otherwise_are_remarked(ward_of_one):
    items = ward_of_one.tables["icu/d_items"]
    items.remove(next(row for row in items if row["itemid"] == INTUBATION))
    next(row for row in items if row["itemid"] == HEART_RATE)["label"] = "Shoe size"
    got = ward_of_one.run()
    remarks = "\n".join(got.tally.remarks)
    assert f"in no dictionary: {INTUBATION} (intubation)\n" in remarks
    assert f"item {HEART_RATE} is called 'Shoe size' here" in remarks
    assert str(POTASSIUM) not in remarks


# -- the command line ---------------------------------------------------------------------------


def command(mimic, *options: object, dest: Path | None = None) -> tuple[int, str]:
    """Exit code and everything shown by `fedward import mimic-iv`, errors as a person sees them."""
    arguments = ["mimic-iv", str(mimic.root), str(dest or mimic.out), *map(str, options)]
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, ShardError | OSError):
        assert result.exception.args
        return 1, f"{result.output}{result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_what_is_shown_of_an_import(ward_of_one):
    ward_of_one.value(10, 100, HEART_RATE, 70, 3, unit="[/b]")
    ward_of_one.write()
    code, shown = command(ward_of_one)
    assert code == 0
    assert "heart_rate in [/b]" in " ".join(shown.split())
    assert str(ward_of_one.out) in shown.replace("\n", "")


WRONG: dict[str, tuple[Callable[[Any], Any], list[str], str]] = {
    "no such folder": (lambda m: m.root.rename(m.root.parent / "x"), [], "has no folder hosp"),
    "one level too deep": (lambda m: (m.root / "hosp").rename(m.root / "h"), [], "no folder hosp"),
    "no admissions": (
        lambda m: (m.root / "hosp/admissions.csv.gz").unlink(), [], "admissions.csv.gz is missing"),
    "no notes there": (lambda m: None, ["--notes", "{root}/hosp"], "neither radiology"),
    "no images there": (lambda m: None, ["--cxr", "{root}/hosp"], "metadata.csv.gz is missing"),
    "no labels of images": (
        lambda m: (m.root / "cxr/mimic-cxr-2.0.0-chexpert.csv.gz").unlink(),
        ["--cxr", "{root}/cxr"], "chexpert.csv.gz is missing"),
    "sites": (lambda m: None, ["--sites", "ward"], "write care-unit, or hash:N"),
    "no sites": (lambda m: None, ["--sites", "hash:0"], "write care-unit, or hash:N"),
    "a strange digit": (lambda m: None, ["--sites", "hash:²"], "write care-unit, or hash:N"),
    "the hour": (lambda m: None, ["--hour", "nan"], "a record at hour nan"),
    "an hour without end": (lambda m: None, ["--hour", "inf"], "a record at hour inf"),
    "the name": (lambda m: None, ["--name", "../up"], "'../up' cannot name a hospital"),
    "nothing is left": (lambda m: None, ["--hour", "5000"], "no record is left"),
    "no opt-out list": (lambda m: None, ["--opt-out", "{root}/none"], "cannot be read"),
    "cut table": (
        lambda m: m.put("icu/chartevents.csv.gz", b"").write_bytes(PACKED[:99]), [], "cut off"),
    "another table": (lambda m: m.put("icu/chartevents.csv.gz", b"a,b\n1,2\n"), [], "no column"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_error_with_a_cure_and_leave_nothing(ward_of_one, case):
    spoil, options, says = WRONG[case]
    ward_of_one.xray(10, 1, 5, labels={})
    ward_of_one.write()
    spoil(ward_of_one)
    code, shown = command(ward_of_one, *(o.format(root=ward_of_one.root) for o in options))
    assert code == 1
    assert says in shown
    assert "cure: " in shown
    assert "Traceback" not in shown
    assert not ward_of_one.out.exists()
    assert not list(ward_of_one.out.parent.glob(".*"))


def test_the_whole_command_shows_an_error_and_no_traceback(ward_of_one, monkeypatch, capsys):
    arguments = ["fedward", "import", "mimic-iv", str(ward_of_one.root), str(ward_of_one.out)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr()
    assert caught.value.code == 1
    assert "error (shard-invalid)" in shown.err
    assert "Traceback" not in shown.err


def test_dest_is_not_written_over_unless_told_and_only_if_it_is_a_shard(ward_of_one):
    ward_of_one.write()
    assert command(ward_of_one)[0] == 0
    code, shown = command(ward_of_one)
    assert (code, "exists already" in shown) == (1, True)
    assert command(ward_of_one, "--overwrite")[0] == 0
    ward_of_one.out.joinpath("shard.toml").unlink()
    code, shown = command(ward_of_one, "--overwrite")
    assert (code, "holds something that is no shard" in shown) == (1, True)
    assert ward_of_one.out.joinpath("records.parquet").exists()


ADDED: dict[str, Callable[[Path], Any]] = {
    "embeddings.parquet": lambda out: (out / "embeddings.parquet").write_text("precious"),
    "notes.txt": lambda out: (out / "notes.txt").write_text("precious"),
    "models": lambda out: (out / "models").mkdir(),
}


@pytest.mark.parametrize("sites", ["", "hash:1"])
@pytest.mark.parametrize("name", ADDED)
def test_what_no_import_made_is_never_replaced(ward_of_one, name, sites):
    ward_of_one.write()
    options = ["--sites", sites] if sites else []
    assert command(ward_of_one, *options)[0] == 0
    shard = ward_of_one.out / ("site-1" if sites else "")
    (shard / "report.html").write_text("a report is made again")
    ADDED[name](shard)
    code, shown = command(ward_of_one, *options, "--overwrite")
    assert code == 1
    assert f"{shard / name} was not made by an import" in shown
    assert "move it elsewhere" in shown
    (shard / name).rename(ward_of_one.root / name)
    assert command(ward_of_one, *options, "--overwrite")[0] == 0


def test_a_shard_that_was_not_imported_is_never_replaced(ward_of_one):
    ward_of_one.run()
    (ward_of_one.out / "import.json").unlink()
    code, shown = command(ward_of_one, "--overwrite")
    assert (code, "it has no import.json" in shown) == (1, True)
    assert (ward_of_one.out / "records.parquet").exists()


def test_a_link_as_dest_is_followed(ward_of_one):
    ward_of_one.run()
    link = ward_of_one.root / "link"
    link.symlink_to(ward_of_one.out)
    ward_of_one.value(10, 100, HEART_RATE, 99, 2)
    ward_of_one.write()
    assert command(ward_of_one, "--overwrite", dest=link)[0] == 0
    assert link.is_symlink()
    assert pl.read_parquet(ward_of_one.out / "events.parquet")["value"].to_list() == [80.0, 99.0]


def test_a_file_in_the_way_of_the_work_is_told_and_one_within_it_goes(ward_of_one):
    ward_of_one.write()
    place = ward_of_one.out.parent / f".{ward_of_one.out.name}.importing"
    place.write_text("stray")
    code, shown = command(ward_of_one)
    assert (code, f"{place} is a file" in shown, "remove the file" in shown) == (1, True, True)
    place.unlink()
    place.mkdir()
    (place / "stray").write_text("stray")
    assert command(ward_of_one)[0] == 0
    assert not place.exists()


def test_progress_reaches_the_end_also_of_tables_of_which_nothing_is_kept(csv):
    told: dict[str, tuple[int, ...]] = {}
    for name, text in (("header", "a,b,c\n"), ("unwanted", "a,b,c\n1,2,3\n" * 9)):
        file = csv(gzip.compress(text.encode()), f"{name}.csv.gz")
        only = ("never", pl.col("a") == "x")
        tell = lambda table, *at: told.update({table: at})  # noqa: E731
        assert not list(scan(file, name, COLUMNS, Tally(), only=only, progress=tell))
    assert set(told) == {"header", "unwanted"}
    assert all(done == total > 0 for done, total in told.values())


def test_dest_may_not_be_a_file(ward_of_one):
    ward_of_one.write()
    ward_of_one.out.write_text("precious")
    for options in ([], ["--overwrite"]):
        assert command(ward_of_one, *options)[0] == 1
    assert ward_of_one.out.read_text() == "precious"

"""Shards are whole or absent, whatever happens; patients lie where they belong, or nowhere."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from client.site.shard import Shard, inspect
from client.site.shard.importers import staging, timeline
from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options
from client.site.shard.importers.timeline import parse_sites, read_opt_out
from common.errors import ShardError

HEART_RATE, POTASSIUM, INTUBATION = 220045, 50971, 224385
MICU, CCU = "Medical Intensive Care Unit (MICU)", "Coronary Care Unit (CCU)"


def populate(mimic, patients: int, *, seed: int = 0, images: bool = True):
    """Patients from 10,000 on, one to three stays each, with something of every kind."""
    rng = random.Random(seed)
    for patient in range(10_000, 10_000 + patients):
        mimic.patient(patient)
        begin = 0.0
        for number in range(rng.randrange(1, 4)):
            hadm, begin = patient * 10 + number, begin + rng.randrange(1, 2000)
            mimic.stay(patient, hadm, begin, begin + 200, unit=rng.choice([MICU, CCU]))
            for _ in range(rng.randrange(6)):
                hour = begin + rng.randrange(100)
                mimic.value(patient, hadm, HEART_RATE, rng.randrange(60, 120), hour)
                mimic.value(patient, None, POTASSIUM, rng.random(), hour, hour + 2, "mEq/L")
                mimic.procedure(patient, hadm, INTUBATION, hour)
                mimic.note(patient, hadm, f"Note of hour {hour}.", hour, hour + 1)
            for study in range(rng.randrange(1, 3) if images else 0):
                mimic.xray(patient, hadm * 10 + study, begin + 30 * (study + 1), labels={})
            begin += 200
    return mimic


def content(folder: Path) -> dict[str, object]:
    """Every file: tables as sorted rows, others as bytes; import.json without its date."""
    found: dict[str, object] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".parquet":
            frame = pl.read_parquet(file)
            found[name] = (frame.schema, frame.sort(frame.columns).rows())
        elif file.name == "import.json":
            found[name] = {k: v for k, v in json.loads(file.read_text()).items() if k != "created"}
        else:
            found[name] = file.read_bytes()
    return found


# -- buckets and sites --------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [None, "care-unit", 3])
def test_many_buckets_and_small_writes_make_the_same_shard(mimic, monkeypatch, tmp_path, sites):
    populate(mimic, 12)
    mimic.run(sites=sites)
    once = content(mimic.out)
    monkeypatch.setattr(staging, "_BYTES_PER_BUCKET", 64)
    monkeypatch.setattr(staging, "_BYTES_AHEAD", 200)
    assert staging.Staging(tmp_path / "staging", 1_000).buckets > 10
    mimic.run(sites=sites, overwrite=True)
    assert content(mimic.out) == once


def test_the_same_source_gives_the_same_shard(mimic):
    populate(mimic, 6)
    mimic.run()
    once = content(mimic.out)
    random.Random(5).shuffle(mimic.tables["icu/chartevents"])
    random.Random(6).shuffle(mimic.tables["hosp/admissions"])
    mimic.run(overwrite=True)
    assert content(mimic.out) == once


def test_a_patient_with_stays_in_two_units_lies_in_the_first_ones_site(mimic):
    mimic.patient(10)
    mimic.stay(10, 102, 900, 1000, unit=MICU)
    mimic.stay(10, 101, 300, 400, unit=CCU)
    mimic.stay(10, 100, 0, 100, unit=None)
    mimic.patient(11)
    mimic.stay(11, 110, unit=MICU)
    got = mimic.run(sites="care-unit")
    where = dict(got.records.select("stay_id", "site").iter_rows())
    assert where == {"101": "ccu", "102": "ccu", "110": "micu"}
    assert got.shards["ccu"].meta["hospital"] == "ccu"


def test_units_become_names_that_can_name_a_site(mimic):
    units = {
        "Medical/Surgical Intensive Care Unit (MICU/SICU)": "micu-sicu",
        "Neuro Surgical Intensive Care Unit (Neuro SICU)": "neuro-sicu",
        "Neuro Stepdown": "neuro-stepdown",
        "../../etc": "etc",
        "": "unknown",
        "重症": "unknown",
        "x" * 90: "x" * 64,
    }
    for number, unit in enumerate(units):
        mimic.patient(10 + number)
        mimic.stay(10 + number, 100 + number, unit=unit)
    got = mimic.run(sites="care-unit")
    where = dict(got.records.select("stay_id", "site").iter_rows())
    assert where == {str(100 + n): name for n, name in enumerate(units.values())}


def test_sites_by_hash_are_disjoint_and_stay_when_patients_are_added(make_mimic):
    few = populate(make_mimic("few"), 40, images=False).run(sites=4)
    many = populate(make_mimic("many"), 60, images=False).run(sites=4)
    where, later = (
        dict(got.records.select("patient_id", "site").unique().iter_rows()) for got in (few, many)
    )
    assert len(where) == few.records["patient_id"].n_unique()
    assert where == {patient: later[patient] for patient in where}
    assert set(later.values()) == {f"site-{number}" for number in range(1, 5)}


def test_hash_sites_up_to_the_most(mimic):
    for patient in range(300):
        mimic.patient(patient + 10)
        mimic.stay(patient + 10, patient + 1000)
    sites = parse_sites("hash:200")
    assert len(mimic.run(sites=sites).shards) > 120
    with pytest.raises(ShardError, match="hash:201"):
        parse_sites("hash:201")


def test_too_many_care_units_are_told_before_tables_are_read(mimic, monkeypatch):
    monkeypatch.setattr(timeline, "_MOST_SITES", 2)
    for number in range(3):
        mimic.patient(10 + number)
        mimic.stay(10 + number, 100 + number, unit=f"Ward {min(number, 1)}")
    assert sorted(mimic.run(sites="care-unit").shards) == ["ward-0", "ward-1"]
    mimic.patient(20)
    mimic.stay(20, 200, unit="Ward 3")
    mimic.write()
    mimic.put("icu/chartevents.csv.gz", b"").write_bytes(b"cut off")
    with pytest.raises(ShardError, match="3 care units, which are more than 2 sites") as caught:
        mimic.run(write=False, sites="care-unit", overwrite=True)
    assert "hash:N" in caught.value.cure


def test_complete_only_keeps_records_that_see_something_of_every_kind(mimic):
    """A record late enough sees all; each stay but the first lacks one kind, or has it late."""
    for number, lacking in enumerate(["", "chart", "lab", "procedure", "note", "late lab", "late"]):
        patient, hadm = 10 + number, 100 + number
        mimic.patient(patient)
        mimic.stay(patient, hadm)
        mimic.xray(patient, hadm, 20)
        if lacking == "":
            mimic.xray(patient, 999, 3)  # too early to see the rest
        late = 19.5 if lacking == "late" else 5
        if lacking != "chart":
            mimic.value(patient, hadm, HEART_RATE, 80, late)
        if lacking != "lab":
            mimic.value(patient, hadm, POTASSIUM, 4, 5, 20.1 if lacking == "late lab" else None)
        if lacking != "procedure":
            mimic.procedure(patient, hadm, INTUBATION, 5)
        if lacking != "note":
            mimic.note(patient, hadm, "Clear.", 5, 6)
    every = mimic.run()
    assert every.records.height == 8
    got = mimic.run(complete_only=True, overwrite=True)
    assert got.records["record_id"].to_list() == ["100-s100", "106-s106"]
    assert got.skipped("records") == {"not complete": 6}
    assert set(got.events["stay_id"]) == {"100", "106"}
    assert got.skipped("labevents")["no complete record sees it"] == 3


# -- patients who object ------------------------------------------------------------------------


@pytest.fixture
def objecting(mimic):
    """Patient 7654321, whose admission is 8765432 and whose study is 5432109, and four others."""
    populate(mimic, 4)
    mimic.patient(7654321)
    mimic.stay(7654321, 8765432)
    for hadm in (8765432, None):
        mimic.value(7654321, hadm, HEART_RATE, 77, 1)
        mimic.value(7654321, hadm, POTASSIUM, 4, 1)
        mimic.procedure(7654321, hadm, INTUBATION, 2)
        mimic.note(7654321, hadm, "Mr Objector.", 1, 2)
        mimic.note(7654321, hadm, "Mr Objector.", 1, 2, "discharge")
    mimic.xray(7654321, 5432109, 20, dicom="objector-image", labels={"Edema": 1})
    return mimic


TRACES = ("7654321", "8765432", "5432109", "objector-image", "Mr Objector")


def traces(folder: Path) -> set[str]:
    """What of the patient stands in file names, link targets, tables or other files."""
    text = ""
    for file in folder.rglob("*"):
        text += str(file.relative_to(folder))
        if file.is_symlink():
            text += os.readlink(file)
        if file.suffix == ".parquet":
            text += pl.read_parquet(file).write_csv() + str(file.read_bytes())
        elif file.is_file() and file.suffix != ".jpg":
            text += file.read_text()
    return {trace for trace in TRACES if trace in text}


@pytest.mark.parametrize("copy_images", [False, True])
@pytest.mark.parametrize("sites", [None, "care-unit"])
def test_a_patient_who_objects_is_nowhere_and_their_rows_are_counted(objecting, sites, copy_images):
    options = {"sites": sites, "copy_images": copy_images}
    objecting.run(**options)
    assert traces(objecting.out) == set(TRACES), "the search finds them while they do not object"
    got = objecting.run(objectors=(7654321,), overwrite=True, **options)
    assert traces(objecting.out) == set()
    assert got.records["patient_id"].n_unique() == 4
    for table in ("patients", "admissions", "icustays", "images", "chexpert"):
        assert got.tally[table].skipped["the patient objects"] == 1
    for table in ("chartevents", "labevents", "procedureevents", "radiology", "discharge"):
        assert got.tally[table].skipped["patient not among the import's"] == 2


def test_ids_of_the_opt_out_list_that_are_nobodys_are_remarked_but_not_named(objecting):
    got = objecting.run(objectors=(7654321, 555555555))
    (remark,) = (text for text in got.tally.remarks if "opt-out" in text)
    assert remark.startswith("1 of 2 ids")
    assert "555555555" not in (objecting.out / "import.json").read_text()


@pytest.mark.parametrize("sites", [None, "care-unit", 3])
def test_nobody_left_is_an_error_that_says_why(objecting, sites):
    everyone = (*range(10_000, 10_004), 7654321)
    with pytest.raises(ShardError, match=r"no record is left: .*5 of patients the patient objects"):
        objecting.run(objectors=everyone, sites=sites)
    assert not objecting.out.exists()


def test_the_opt_out_list_is_read_with_blank_lines_and_remarks(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf10000032\r\n\r\n# letter of May\r\n 10001217  # by phone\r\n")
    assert read_opt_out(file) == {10000032, 10001217}
    ids = {-5, 0, 2**63 - 1, -(2**63)}  # MEDS allows all whole numbers of 64 bits
    file.write_text("\n".join(map(str, ids)))
    assert read_opt_out(file) == ids
    assert read_opt_out(None) == frozenset()


@pytest.mark.parametrize(
    "line",
    ["12a", "12.0", "10,11", "10 11", "²", "--5", "-", "+5", "subject_id", str(2**63), "9" * 40],
)
def test_what_is_no_id_in_the_opt_out_list_is_an_error(tmp_path, line):
    file = tmp_path / "list.txt"
    file.write_text(f"7654321\n\n{line}\n")
    with pytest.raises(ShardError) as caught:
        read_opt_out(file)
    assert f"{file}, line 3: '{line}' is no patient id" in str(caught.value)
    assert "nothing was imported" in caught.value.cure


def test_a_bad_line_of_the_opt_out_list_stops_before_anything_is_written(objecting):
    objecting.write()
    file = objecting.root / "list.txt"
    file.write_text("7654321\n12a\n")
    before = sorted(objecting.out.parent.iterdir())
    program = [sys.executable, "-c", "from common.cli import main; main()", "import", "mimic-iv"]
    done = subprocess.run(
        [*program, objecting.root, objecting.out, "--opt-out", file], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "list.txt, line 2: '12a' is no patient id" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(objecting.out.parent.iterdir()) == before


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_images", [False, True])
def test_images_are_links_or_copies_and_can_be_read(mimic, monkeypatch, copy_images):
    populate(mimic, 3)
    mimic.write()
    monkeypatch.chdir(mimic.root.parent)
    import_mimic_iv(
        MimicSource(Path("mimic-iv"), cxr=Path("mimic-iv/cxr")),
        Path("out"),
        Options("ward", copy_images=copy_images),
    )
    monkeypatch.chdir("/")
    shard, problems = inspect(mimic.out)
    assert problems == []
    assert shard is not None
    assert shard.images is not None
    files = [mimic.out / path for path in shard.images["path"]]
    assert len(files) > 3
    assert {file.is_symlink() for file in files} == {not copy_images}
    assert all(shard.image_bytes(row)[:2] == b"\xff\xd8" for row in range(len(files)))


# -- killed, at once, in the way ----------------------------------------------------------------


# Runs an import that stops at a chosen moment, says so, and waits to be killed.
HANGING = """
import sys, time
from pathlib import Path
from client.site.shard.importers import mimic, staging
from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options

root, out, moment = map(Path, sys.argv[1:])

def hang(*_, **__):
    (out.parent / "reached").touch()
    time.sleep(60)

def after(owner, name):
    real = getattr(owner, name)
    def both(*args, **kwargs):
        real(*args, **kwargs)
        hang()
    setattr(owner, name, both)

match moment.name:
    case "made": after(staging.Staging, "__init__")
    case "staged": after(staging.Staging, "_flush")
    case "writing": after(staging._SiteWriter, "_append")
    case "linking": after(staging._SiteWriter, "_place_images")
    case "finished": after(staging._SiteWriter, "finish")
    case "between" | "replaced":
        real = Path.rename
        def rename(self, target):
            real(self, target)
            if (target == out) == (moment.name == "replaced"):
                hang()
        Path.rename = rename
import_mimic_iv(MimicSource(root, cxr=root / "cxr", notes=root / "note"), out, Options("ward"),
                overwrite=True)
"""


def kill_at(moment: str, root: Path, out: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HANGING, str(root), str(out), moment])
    try:
        reached, patience = out.parent / "reached", time.monotonic() + 30
        while not reached.exists():
            assert child.poll() is None, "the import ended by itself"
            assert time.monotonic() < patience
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    reached.unlink()


MOMENTS = ["made", "staged", "writing", "linking", "finished"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_import_leaves_no_shard_and_the_next_starts_clean(mimic, moment):
    populate(mimic, 3).write()
    kill_at(moment, mimic.root, mimic.out)
    assert not mimic.out.exists()
    mimic.run(write=False)
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


@pytest.mark.parametrize("moment", ["writing", "finished"])
def test_a_killed_import_leaves_the_old_shard_as_it_was(mimic, moment):
    populate(mimic, 3).run()
    before = content(mimic.out)
    mimic.patient(99)
    mimic.stay(99, 990)
    mimic.xray(99, 9900, 5)
    mimic.write()
    kill_at(moment, mimic.root, mimic.out)
    assert content(mimic.out) == before
    got = mimic.run(write=False, overwrite=True)
    assert "99" in got.records["patient_id"]
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


def test_an_import_killed_while_it_cleans_up_has_done_its_work(mimic):
    populate(mimic, 3).run()
    mimic.patient(99)
    mimic.stay(99, 990)
    mimic.xray(99, 9900, 5)
    mimic.write()
    kill_at("replaced", mimic.root, mimic.out)
    assert "99" in Shard.open(mimic.out).records["patient_id"]
    mimic.run(write=False, overwrite=True)
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


def test_an_import_killed_between_old_and_new_brings_the_old_one_back(mimic):
    populate(mimic, 3).run()
    before = content(mimic.out)
    mimic.write()
    kill_at("between", mimic.root, mimic.out)
    with pytest.raises(ShardError, match="exists already"):
        mimic.run(write=False)
    assert content(mimic.out) == before
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("sites", [None, 2])
def test_an_import_that_fails_between_old_and_new_brings_the_old_one_back(
    mimic, monkeypatch, failure, sites
):
    populate(mimic, 3, images=False).run(sites=sites)
    before = content(mimic.out)
    rename = Path.rename

    def fail_once(self, target):
        if target == mimic.out:
            monkeypatch.setattr(Path, "rename", rename)
            assert not mimic.out.exists()
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(type(failure)):
        mimic.run(overwrite=True, sites=sites)
    assert content(mimic.out) == before
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


def test_two_imports_at_once_do_not_meet(mimic):
    populate(mimic, 3, images=False)
    place = mimic.out.parent / f".{mimic.out.name}.importing"
    place.mkdir(parents=True)
    held = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match=r"another import into .* is running"):
            mimic.run()
    finally:
        os.close(held)
    mimic.run()


def test_an_import_that_fails_leaves_the_old_shard_and_nothing_else(mimic):
    populate(mimic, 3, images=False).run()
    before = content(mimic.out)
    mimic.put("icu/chartevents.csv.gz", b"").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ShardError, match="cut off"):
        mimic.run(write=False, overwrite=True)
    assert content(mimic.out) == before
    assert sorted(p.name for p in mimic.out.parent.iterdir()) == ["mimic-iv", "out"]


def test_overwriting_one_shard_by_several_and_back_leaves_nothing_of_the_other(mimic):
    populate(mimic, 8, images=False)
    one = mimic.run()
    first = content(mimic.out)
    mimic.run(sites=2, overwrite=True)
    assert sorted(p.name for p in mimic.out.iterdir()) == ["site-1", "site-2"]
    mimic.run(overwrite=True)
    assert content(mimic.out) == first
    assert one.records.height > 8


def test_import_json_tells_what_was_read_kept_and_left_out(mimic):
    got = populate(mimic, 3).run(sites=2)
    for folder in mimic.out.iterdir():
        story = json.loads((folder / "import.json").read_text(encoding="utf-8"))
        assert story["source"] == "MIMIC-IV"
        assert story["options"]["sites"] == 2
        by_name = {table["table"]: table for table in story["tables"]}
        for name, counts in got.tally.tables.items():
            assert by_name[name]["rows"] == counts.rows
            assert by_name[name]["kept"] + sum(by_name[name]["skipped"].values()) == counts.rows


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("kind", [pl.Int64, pl.Datetime("us")])
def test_a_stay_is_found_by_time_like_a_search_through_all(overlapping, kind):
    """Of the stays that hold a time the one that began last, also where others lie within it."""
    rng = random.Random(2)
    stays: list[tuple[int, int, int, int]] = []
    for patient in range(20):
        end = 0
        for _ in range(rng.randrange(6)):
            begin = rng.randrange(60) if overlapping else end + rng.randrange(1, 20)
            end = begin + rng.choice([0, 5, 20, 50])
            stays.append((len(stays), patient, begin, end))
    nested = [(a, b) for a in stays for b in stays if a[1] == b[1] and a[2] < b[2] and b[3] < a[3]]
    assert bool(nested) == overlapping
    spans = pl.DataFrame(stays, schema=["stay", "patient", "begin", "end"], orient="row")
    rows = [(rng.randrange(25), rng.randrange(120), None) for _ in range(2000)]
    rows += [(rng.randrange(25), 5, 77) for _ in range(10)]
    frame = pl.DataFrame(
        rows, schema={"patient": pl.Int64, "time": pl.Int64, "stay": pl.Int64}, orient="row"
    ).with_row_index("row")
    found = timeline.find_stay(
        frame.with_columns(pl.col("time").cast(kind)),
        spans.with_columns(pl.col("begin", "end").cast(kind)),
    )
    assert found.height == frame.height
    for row, stay in found.select("row", "stay").iter_rows():
        patient, moment, given = rows[row]
        holding = [(b, h) for h, p, b, e in stays if p == patient and b <= moment <= e]
        assert stay == (given or max(holding, default=(None, None))[1])

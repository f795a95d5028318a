"""The trees are what MIMIC-IV publishes: columns, identifiers, times, files."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from simulations.cohort.layout import LAYOUT
from simulations.cohort.plain import read

IN_DEMO = [table for table in LAYOUT if table.startswith(("hosp/", "icu/"))]
PUBLISHED = {
    "note/radiology": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text",
    "note/discharge": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text",
    "cxr/mimic-cxr-2.0.0-metadata": "dicom_id,subject_id,study_id,"
    "PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning",
    "cxr/mimic-cxr-2.0.0-chexpert": "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,"
    "Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,No Finding,"
    "Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices",
}


def header(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.readline().strip()


@pytest.mark.parametrize("table", IN_DEMO)
def test_columns_are_those_of_the_demo(table: str, trees: dict[str, Path], open_data: Path) -> None:
    demo = header(open_data / "mimic-iv-demo" / f"{table}.csv.gz")
    assert header(trees["riverside"] / f"{table}.csv.gz") == demo


@pytest.mark.parametrize("table", PUBLISHED)
def test_columns_are_those_published(table: str, trees: dict[str, Path]) -> None:
    assert header(trees["riverside"] / f"{table}.csv.gz") == PUBLISHED[table]


def test_items_have_the_labels_of_the_demo(trees: dict[str, Path], open_data: Path) -> None:
    for table, key in (
        ("hosp/d_labitems", ["label", "fluid", "category"]),
        ("icu/d_items", ["label"]),
    ):
        ours = read(trees["riverside"], table).select("itemid", *key)
        theirs = read(open_data / "mimic-iv-demo", table).select("itemid", *key)
        both = ours.join(theirs, on="itemid", suffix="_demo")
        assert both.height == ours.height
        for column in key:
            assert (both[column] == both[f"{column}_demo"]).all()


def test_identifiers_link_and_are_disjoint(trees: dict[str, Path]) -> None:
    seen: set[int] = set()
    for tree in trees.values():
        patients = read(tree, "hosp/patients")["subject_id"]
        assert patients.is_unique().all()
        assert patients.is_between(10_000_000, 19_999_999).all()
        assert seen.isdisjoint(patients)
        seen |= set(patients)
        admissions = read(tree, "hosp/admissions").select("subject_id", "hadm_id")
        assert admissions["hadm_id"].is_between(20_000_000, 29_999_999).all()
        assert admissions["hadm_id"].is_unique().all()
        assert set(admissions["subject_id"]) == set(patients)
        icu = read(tree, "icu/icustays").select("subject_id", "hadm_id", "stay_id")
        assert icu["stay_id"].is_between(30_000_000, 39_999_999).all()
        assert icu.join(admissions, on=["subject_id", "hadm_id"], how="anti").is_empty()
        for table in ("icu/chartevents", "icu/procedureevents"):
            rows = read(tree, table)
            assert rows.join(icu, on=icu.columns, how="anti").is_empty()
        labs = read(tree, "hosp/labevents")
        linked = labs.filter(pl.col("hadm_id").is_not_null())
        assert linked.join(admissions, on=["subject_id", "hadm_id"], how="anti").is_empty()
        assert 0.02 < labs["hadm_id"].null_count() / labs.height < 0.4
        for table, items in (
            ("hosp/labevents", "hosp/d_labitems"),
            ("icu/chartevents", "icu/d_items"),
        ):
            assert read(tree, table).join(read(tree, items), on="itemid", how="anti").is_empty()


def test_times_are_in_order(trees: dict[str, Path]) -> None:
    for tree in trees.values():
        stays = read(tree, "hosp/admissions").sort("subject_id", "admittime")
        assert (stays["admittime"] < stays["dischtime"]).all()
        dead = stays.filter(pl.col("hospital_expire_flag") == 1)
        assert (dead["deathtime"] == dead["dischtime"]).all()
        before = pl.col("dischtime").shift().over("subject_id")
        assert stays.filter(pl.col("admittime") <= before).is_empty()
        icu = read(tree, "icu/icustays").join(stays, on="hadm_id")
        assert (icu["intime"] < icu["outtime"]).all()
        assert icu.filter(pl.col("intime") < pl.col("admittime")).is_empty()
        assert icu.filter(pl.col("outtime") > pl.col("dischtime")).is_empty()
        labs = read(tree, "hosp/labevents")
        delay = (labs["storetime"] - labs["charttime"]).dt.total_minutes()
        assert delay.is_between(29, 120).all()
        chart = read(tree, "icu/chartevents")
        delay = (chart["storetime"] - chart["charttime"]).dt.total_minutes()
        assert delay.is_between(2, 60).all()


def test_a_report_is_stored_after_its_image_and_names_its_findings(trees: dict[str, Path]) -> None:
    with_notes = [tree for tree in trees.values() if (tree / "note").exists()]
    assert len(with_notes) == 3
    for tree in with_notes:
        notes = read(tree, "note/radiology")
        assert (notes["storetime"] > notes["charttime"]).all()
        truth = pl.read_parquet(tree / "truth.parquet")
        chest = notes.filter(pl.col("text").str.contains("(?i)EXAMINATION: +CHEST"))
        both = truth.with_columns(charttime=pl.col("time").dt.truncate("1m")).join(
            chest.with_columns(pl.col("charttime").cast(pl.Datetime("ms"))),
            on=["subject_id", "hadm_id", "charttime"],
        )
        assert both.height == chest.height > 50
        waited = (both["storetime"].cast(pl.Datetime("ms")) - both["time"]).dt.total_minutes()
        assert waited.min() >= 60
        labels = read(tree, "cxr/mimic-cxr-2.0.0-chexpert")
        ill = both.join(labels.filter(pl.col("Cardiomegaly") == 1), on="study_id")
        assert ill["text"].str.contains("(?i)cardiomegaly").all()


def test_values_without_numbers_and_both_scales_of_temperature(trees: dict[str, Path]) -> None:
    tree = trees["lakeview"]
    chart, labs = read(tree, "icu/chartevents"), read(tree, "hosp/labevents")
    heat = {223762: (30, 43), 223761: (86, 109)}
    for itemid, limits in heat.items():
        rows = chart.filter(pl.col("itemid") == itemid)
        assert rows.height > 20
        assert rows["valuenum"].is_between(*limits).all()
    for table in (chart, labs):
        silent = table.filter(pl.col("valuenum").is_null())
        assert 0 < silent.height < table.height / 10
        assert silent["value"].is_not_null().all()


def test_every_image_is_where_mimic_cxr_jpg_would_put_it(trees: dict[str, Path]) -> None:
    for tree in trees.values():
        images = read(tree, "cxr/mimic-cxr-2.0.0-metadata")
        files = {p.relative_to(tree / "cxr").as_posix() for p in tree.rglob("*.jpg")}
        named = {
            f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"
            for subject, study, dicom in images.select(
                "subject_id", "study_id", "dicom_id"
            ).iter_rows()
        }
        assert files == named
        assert set(images["ViewPosition"]) <= {"AP", "PA", "LATERAL"}
        assert all(re.fullmatch(r"(?:[0-9a-f]{8}-){4}[0-9a-f]{8}", i) for i in images["dicom_id"])
        row = images.row(0, named=True)
        place = f"files/p{str(row['subject_id'])[:2]}/p{row['subject_id']}/s{row['study_id']}"
        with Image.open(tree / "cxr" / place / f"{row['dicom_id']}.jpg") as image:
            assert image.mode == "L"
            assert image.size == (row["Columns"], row["Rows"])


def test_hospitals_lack_different_things(trees: dict[str, Path]) -> None:
    assert not (trees["lakeview"] / "note").exists()
    with_procedure = {
        name: read(tree, "icu/procedureevents")["hadm_id"].n_unique()
        / read(tree, "icu/icustays")["hadm_id"].n_unique()
        for name, tree in trees.items()
    }
    assert with_procedure["northgate"] < 0.2 < 0.6 < with_procedure["riverside"]
    with_labs = {
        name: read(tree, "hosp/labevents")["subject_id"].n_unique() / 120
        for name, tree in trees.items()
    }
    assert with_labs["st-clara"] < 0.8 < with_labs["riverside"]

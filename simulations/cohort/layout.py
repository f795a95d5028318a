"""The layout in which MIMIC-IV 2.2, MIMIC-IV-Note and MIMIC-CXR-JPG are published."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from simulations.cohort.latent import Floats

_LAYOUT = {
    "hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
    "hosp/admissions": "subject_id hadm_id admittime dischtime deathtime admission_type"
    " admit_provider_id admission_location discharge_location insurance language marital_status"
    " race edregtime edouttime hospital_expire_flag",
    "hosp/labevents": "labevent_id subject_id hadm_id specimen_id itemid order_provider_id"
    " charttime storetime value valuenum valueuom ref_range_lower ref_range_upper flag priority"
    " comments",
    "hosp/d_labitems": "itemid label fluid category",
    "icu/icustays": "subject_id hadm_id stay_id first_careunit last_careunit intime outtime los",
    "icu/chartevents": "subject_id hadm_id stay_id caregiver_id charttime storetime itemid value"
    " valuenum valueuom warning",
    "icu/procedureevents": "subject_id hadm_id stay_id caregiver_id starttime endtime storetime"
    " itemid value valueuom location locationcategory orderid linkorderid ordercategoryname"
    " ordercategorydescription patientweight isopenbag continueinnextdept statusdescription"
    " originalamount originalrate",
    "icu/d_items": "itemid label abbreviation linksto category unitname param_type lownormalvalue"
    " highnormalvalue",
    "note/radiology": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "note/discharge": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "cxr/mimic-cxr-2.0.0-metadata": "dicom_id subject_id study_id"
    " PerformedProcedureStepDescription ViewPosition Rows Columns StudyDate StudyTime"
    " ProcedureCodeSequence_CodeMeaning ViewCodeSequence_CodeMeaning"
    " PatientOrientationCodeSequence_CodeMeaning",
}
LAYOUT: dict[str, tuple[str, ...]] = {
    **{table: tuple(columns.split()) for table, columns in _LAYOUT.items()},
    "cxr/mimic-cxr-2.0.0-chexpert": (
        *("subject_id", "study_id", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema"),
        *("Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity", "No Finding"),
        *("Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
    ),
}
"""Columns of each table, in order."""


def table(name: str, **columns: object) -> pl.DataFrame:
    """A table with its columns in the published order."""
    return pl.DataFrame(columns).select(LAYOUT[name])


def write_table(root: Path, name: str, frame: pl.DataFrame) -> None:
    """Writes ``<name>.csv.gz``; the same bytes for the same rows."""
    path = root / f"{name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.BytesIO()
    frame.write_csv(text, datetime_format="%Y-%m-%d %H:%M:%S")
    path.write_bytes(gzip.compress(text.getvalue(), compresslevel=4, mtime=0))


def texts(value: Floats, digits: int) -> NDArray[np.str_]:
    """Numbers as a laboratory prints them."""
    return np.char.mod(f"%.{digits}f", value)

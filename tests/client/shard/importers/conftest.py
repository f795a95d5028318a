"""A builder of small trees in MIMIC-IV's published layout: times are hours after `BEGIN`."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from client.site.shard import Shard, inspect
from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.mimic_items import ITEMS
from client.site.shard.importers.staging import Options
from client.site.shard.importers.tally import Tally

BEGIN = datetime(2150, 1, 1)
MICU, SICU = "Medical Intensive Care Unit (MICU)", "Surgical Intensive Care Unit (SICU)"
PATHOLOGIES = (
    "Atelectasis|Cardiomegaly|Consolidation|Edema|Enlarged Cardiomediastinum|Fracture|Lung Lesion|"
    "Lung Opacity|No Finding|Pleural Effusion|Pleural Other|Pneumonia|Pneumothorax|Support Devices"
)
HEADERS = {
    "hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
    "hosp/admissions": "subject_id hadm_id admittime dischtime deathtime admission_type "
    "admit_provider_id admission_location discharge_location insurance language marital_status "
    "race edregtime edouttime hospital_expire_flag",
    "hosp/labevents": "labevent_id subject_id hadm_id specimen_id itemid order_provider_id "
    "charttime storetime value valuenum valueuom ref_range_lower ref_range_upper flag priority "
    "comments",
    "hosp/d_labitems": "itemid label fluid category",
    "icu/icustays": "subject_id hadm_id stay_id first_careunit last_careunit intime outtime los",
    "icu/chartevents": "subject_id hadm_id stay_id caregiver_id charttime storetime itemid value "
    "valuenum valueuom warning",
    "icu/procedureevents": "subject_id hadm_id stay_id caregiver_id starttime endtime storetime "
    "itemid value valueuom location locationcategory orderid linkorderid ordercategoryname "
    "ordercategorydescription patientweight isopenbag continueinnextdept statusdescription "
    "originalamount originalrate",
    "icu/d_items": "itemid label abbreviation linksto category unitname param_type "
    "lownormalvalue highnormalvalue",
    "note/radiology": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "note/discharge": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "cxr/mimic-cxr-2.0.0-metadata": "dicom_id subject_id study_id "
    "PerformedProcedureStepDescription ViewPosition Rows Columns StudyDate StudyTime",
    "cxr/mimic-cxr-2.0.0-chexpert": f"subject_id|study_id|{PATHOLOGIES}",
}


def clock(hours: Any) -> Any:
    """Hours after `BEGIN` as MIMIC-IV writes times; text and None stay what they are."""
    if not isinstance(hours, int | float):
        return hours
    return (BEGIN + timedelta(hours=hours)).strftime("%Y-%m-%d %H:%M:%S")


def jpeg(shade: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (16, 12), shade).save(stream, "JPEG")
    return stream.getvalue()


@dataclass
class Imported:
    """Shards of an import, opened and found whole, images included."""

    shards: dict[str, Shard]
    tally: Tally

    def __getattr__(self, table: str) -> pl.DataFrame:
        frames = [
            frame.with_columns(site=pl.lit(name))
            for name, shard in self.shards.items()
            if (frame := getattr(shard, table)) is not None
        ]
        return pl.concat(frames) if frames else pl.DataFrame()

    def record(self, stay: int | None = None) -> dict[str, Any]:
        """The only record (of a stay)."""
        rows = self.records
        if stay is not None:
            rows = rows.filter(pl.col("stay_id") == str(stay))
        return rows.row(0, named=True) if rows.height == 1 else pytest.fail(f"{rows}")

    def skipped(self, table: str) -> dict[str, int]:
        return dict(self.tally[table].skipped)


class Mimic:
    """Rows of every table; `write` makes the files, `run` imports them."""

    def __init__(self, root: Path) -> None:
        self.root = root / "mimic-iv"
        self.out = root / "out"
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in HEADERS}
        self.headers = {
            name: text.split("|" if "|" in text else None) for name, text in HEADERS.items()
        }
        for item in ITEMS:
            table = "hosp/d_labitems" if item.source == "lab" else "icu/d_items"
            self.add(table, itemid=item.itemid, label=item.label)

    def add(self, table: str, **cells: Any) -> None:
        """A row; whatever is called time is in hours after `BEGIN`."""
        times = {name: clock(cell) for name, cell in cells.items() if name.endswith("time")}
        self.tables[table].append(cells | times)

    def patient(self, subject: Any, *, gender: str = "F", age: Any = 60, year: Any = 2150) -> None:
        self.add(
            "hosp/patients", subject_id=subject, gender=gender, anchor_age=age, anchor_year=year
        )

    def stay(
        self,
        subject: Any,
        hadm: Any,
        begin: Any = 0,
        end: Any = 240,
        *,
        unit: str | None = MICU,
        kind: str = "EW EMER.",
        died: Any = None,
        flag: Any = None,
    ) -> None:
        """An admission, with a stay in intensive care unless `unit` is None."""
        flag = int(died is not None) if flag is None else flag
        self.add(
            "hosp/admissions", subject_id=subject, hadm_id=hadm, admittime=begin, dischtime=end,
            deathtime=died, admission_type=kind, hospital_expire_flag=flag,
        )  # fmt: skip
        if unit is not None:
            self.add(
                "icu/icustays", subject_id=subject, hadm_id=hadm, stay_id=hadm, intime=begin,
                outtime=end, first_careunit=unit, last_careunit=unit,
            )  # fmt: skip

    def value(
        self,
        subject: Any,
        hadm: Any,
        itemid: Any,
        value: Any,
        measured: Any,
        stored: Any = None,
        unit: str | None = None,
    ) -> None:
        """A laboratory value (itemid below 200,000) or a vital sign."""
        table = "hosp/labevents" if int(float(itemid)) < 200_000 else "icu/chartevents"
        self.add(
            table, subject_id=subject, hadm_id=hadm, itemid=itemid, charttime=measured,
            storetime=stored, value=value, valuenum=value, valueuom=unit,
        )  # fmt: skip

    def procedure(
        self, subject: Any, hadm: Any, itemid: Any, start: Any, value: Any = 1, stored: Any = None
    ) -> None:
        self.add(
            "icu/procedureevents", subject_id=subject, hadm_id=hadm, itemid=itemid,
            starttime=start, storetime=stored, value=value, valueuom="min",
        )  # fmt: skip

    def note(
        self,
        subject: Any,
        hadm: Any,
        text: str | None,
        written: Any,
        stored: Any,
        category: str = "radiology",
    ) -> None:
        self.add(
            f"note/{category}", subject_id=subject, hadm_id=hadm, charttime=written,
            storetime=stored, text=text,
        )  # fmt: skip

    def xray(
        self,
        subject: Any,
        study: Any,
        hours: float,
        *,
        dicom: str | None = None,
        view: str | None = "AP",
        image: bytes | None = None,
        labels: dict[str, Any] | None = None,
        on_disk: bool = True,
    ) -> None:
        """One image; with `labels` also the study's row of CheXpert labels."""
        dicom, time = dicom or f"d{study}", BEGIN + timedelta(hours=hours)
        self.add(
            "cxr/mimic-cxr-2.0.0-metadata", dicom_id=dicom, subject_id=subject, study_id=study,
            ViewPosition=view, StudyDate=time.strftime("%Y%m%d"),
            StudyTime=time.strftime("%H%M%S.%f").lstrip("0")[:-3],
        )  # fmt: skip
        if labels is not None:
            self.add("cxr/mimic-cxr-2.0.0-chexpert", subject_id=subject, study_id=study, **labels)
        if on_disk:
            folder = self.root / f"cxr/files/p{str(subject)[:2]}/p{subject}/s{study}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{dicom}.jpg").write_bytes(jpeg() if image is None else image)

    def write(self) -> Path:
        """All tables as csv.gz files, with the columns that are published."""
        for name, rows in self.tables.items():
            self.put(f"{name}.csv.gz", self.text(self.headers[name], rows))
        return self.root

    @staticmethod
    def text(header: list[str], rows: list[dict[str, Any]], **form: Any) -> str:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, header, restval="", **{"lineterminator": "\n"} | form)
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def put(self, name: str, content: str | bytes) -> Path:
        """A file of the tree; what ends in .gz is packed."""
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        file.write_bytes(gzip.compress(data, 1, mtime=0) if name.endswith(".gz") else data)
        return file

    def source(self, **options: Any) -> MimicSource:
        """The modules that hold rows."""
        folders = {
            name: self.root / folder
            for name, folder in (("notes", "note"), ("cxr", "cxr"))
            if any(rows for table, rows in self.tables.items() if table.startswith(folder))
        }
        return MimicSource(self.root, **(folders | options))

    def run(
        self,
        *,
        write: bool = True,
        objectors: tuple[int, ...] = (),
        overwrite: bool = False,
        hour: float | None = None,
        exclude_early_discharges: bool = False,
        **options: Any,
    ) -> Imported:
        """Imports the tree, and holds the result to the contract and its counts to their sum."""
        if write:
            self.write()
        folders, tally = import_mimic_iv(
            self.source(hour=hour, exclude_early_discharges=exclude_early_discharges),
            self.out,
            Options(options.pop("name", "ward"), **options),
            objectors=objectors,
            overwrite=overwrite,
        )
        shards = {}
        for folder in folders:
            shard, problems = inspect(folder)
            assert problems == []
            assert shard is not None
            shards[shard.hospital] = shard
        for name, table in tally.tables.items():
            assert table.rows == table.kept + sum(table.skipped.values()), (name, table)
        return Imported(shards, tally)


@pytest.fixture
def mimic(tmp_path: Path) -> Mimic:
    return Mimic(tmp_path)


@pytest.fixture
def make_mimic(tmp_path: Path) -> Callable[[str], Mimic]:
    """Several trees in one test."""
    return lambda name: Mimic(tmp_path / name)


@pytest.fixture
def ward_of_one(mimic: Mimic) -> Mimic:
    """Patient 10 with admission 100 over ten days, and one heart rate."""
    mimic.patient(10)
    mimic.stay(10, 100)
    mimic.value(10, 100, 220045, 80, 1)
    return mimic

"""MIMIC-IV v2.2 and v3.1 in their published layout, with MIMIC-IV-Note and MIMIC-CXR-JPG.

A stay is a hospital admission with at least one stay in intensive care. With images, each X-ray
study taken during a stay is a record, as in HAIM and UNI-MLM; without, a fixed hour is, as in
AdaCoMed. When an input became available: `storetime`, where there is one, for laboratory values,
vital signs and notes (a report without it is left out: its own time is that of the image it
describes); `starttime` for procedures, whose value is known only at the end and enters as 1; study
date and time for images (`mimic_cxr`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from client.site.shard.contract import EVENT_SOURCES, MAX_AGE_YEARS
from client.site.shard.importers.mimic_cxr import (
    add_pathologies,
    read_images,
    records_of_studies,
    whole_images,
)
from client.site.shard.importers.mimic_items import ITEMS
from client.site.shard.importers.staging import Options, Staging, workplace, write_shards
from client.site.shard.importers.tables import (
    Progress,
    find_table,
    parse_id,
    parse_number,
    parse_times,
    read_whole,
    require_table,
    scan,
)
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import (
    DEFAULT_HOUR,
    at_hour,
    outcomes,
    site_of_patient,
    without_objectors,
)
from client.site.shard.importers.units import to_canonical
from common.errors import ShardError

PLANNED = ("ELECTIVE", "SURGICAL SAME DAY ADMISSION", "AMBULATORY OBSERVATION")
"""Admission types that are no unplanned readmission."""
META = {
    "dataset": "MIMIC-IV",
    "licence": "the data use agreement under which MIMIC-IV was obtained from PhysioNet",
    "attribution": "Johnson A, Bulgarelli L, Pollard T, Gow B, Moody B, Horng S, Celi LA, Mark R. "
    "MIMIC-IV. PhysioNet. https://doi.org/10.13026/kpb9-mt58",
}
"""What shard.toml says of the origin."""

_NOTES = ("radiology", "discharge")
_EVENT_COLUMNS = ("subject_id", "hadm_id", "itemid")


@dataclass(frozen=True)
class MimicSource:
    """Where the modules lie, and what to make of them.

    Attributes:
        root: Folder with `hosp` and `icu`.
        notes: MIMIC-IV-Note: the folder with `note`, or that folder itself.
        cxr: MIMIC-CXR-JPG: the folder with metadata, CheXpert labels and `files`.
        hour: Records at this hour of each stay; None takes X-ray times where there are images,
            else hour 48.
        exclude_early_discharges: See `timeline.outcomes`.
    """

    root: Path
    notes: Path | None = None
    cxr: Path | None = None
    hour: float | None = None
    exclude_early_discharges: bool = False

    @property
    def record_hour(self) -> float | None:
        """Hour of each stay's record; None where each X-ray study is one."""
        return DEFAULT_HOUR if self.hour is None and self.cxr is None else self.hour


def import_mimic_iv(
    source: MimicSource,
    dest: Path,
    options: Options,
    *,
    objectors: Collection[int] = (),
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[list[Path], Tally]:
    """Imports MIMIC-IV into shards.

    Args:
        dest: The shard, or with several sites the folder of shards: whole afterwards, or absent.
        objectors: subject_id of patients who are never imported.

    Returns:
        Folders of the shards, and what was read, kept and skipped.

    Raises:
        ShardError: A table is missing or cannot be read, or `dest` may not be written.
    """
    tally, dest = Tally(), dest.resolve()
    hosp, icu = _modules(source.root)
    with workplace(dest, overwrite=overwrite) as place:
        every_stay = _stays(hosp, icu, objectors, tally)
        stays = every_stay.filter(pl.col("unit").is_not_null())
        tally.skip("admissions", "no stay in intensive care", every_stay.height - stays.height)
        tally["admissions"].kept += stays.height
        sites = site_of_patient(stays, options.sites)
        images = read_images(source.cxr, objectors, tally) if source.cxr else None
        records = outcomes(
            _records(source, stays, images, objectors, tally),
            stays,
            every_stay,
            exclude_early_discharges=source.exclude_early_discharges,
        )
        _check_items(hosp, icu, tally)
        staging = _staged_tables(source, place / "staging", stays, tally, progress)
        if images is not None:
            staging.add("images", "images", whole_images(images, stays, tally, progress))
        written = write_shards(
            dest,
            place,
            stays,
            records,
            sites,
            staging,
            options,
            tally,
            _about(source, options),
            progress,
        )
    return written, tally


def _records(
    source: MimicSource,
    stays: pl.DataFrame,
    images: pl.DataFrame | None,
    objectors: Collection[int],
    tally: Tally,
) -> pl.DataFrame:
    """Records in the form of `timeline`, with image labels where they are X-ray studies."""
    if source.record_hour is not None:
        return at_hour(stays, source.record_hour, tally)
    assert source.cxr is not None
    assert images is not None
    return add_pathologies(records_of_studies(images, stays, tally), source.cxr, objectors, tally)


def _staged_tables(
    source: MimicSource, folder: Path, stays: pl.DataFrame, tally: Tally, progress: Progress
) -> Staging:
    """Events and notes of the stays' patients, on their way."""
    hosp, icu = _modules(source.root)
    tables = (
        ("lab", find_table(hosp, "labevents"), _values),
        ("chart", find_table(icu, "chartevents"), _values),
        ("procedure", find_table(icu, "procedureevents"), _procedures),
    )
    notes = _note_tables(source.notes)
    files = [*(file for _, file, _ in tables if file), *notes.values()]
    staging = Staging(folder, sum(file.stat().st_size for file in files))
    patients = stays["patient"].unique()
    for kind, file, events_of in tables:
        if file is None:
            tally.remarks.append(f"no table for {kind}: the source is absent in every record")
            continue
        for events in events_of(file, kind, patients, tally, progress):
            staging.add("events", file.name.partition(".")[0], events)
    for name, file in notes.items():
        for texts in _texts(file, name, patients, tally, progress):
            staging.add("notes", name, texts)
    return staging


# -- stays ------------------------------------------------------------------------------------


def _modules(root: Path) -> tuple[Path, Path]:
    hosp, icu = root / "hosp", root / "icu"
    for folder in (hosp, icu):
        if not folder.is_dir():
            raise ShardError(
                f"{root} has no folder {folder.name}",
                cure="give the folder of MIMIC-IV that holds hosp and icu",
            )
    return hosp, icu


def _stays(hosp: Path, icu: Path, objectors: Collection[int], tally: Tally) -> pl.DataFrame:
    """All admissions in the form of `timeline`; `unit` is null without intensive care."""
    patients = read_whole(
        require_table(hosp, "patients"),
        "patients",
        ("subject_id", "gender", "anchor_age", "anchor_year"),
        tally,
    ).select(
        parse_id("subject_id").alias("patient"),
        pl.col("gender").alias("sex"),
        parse_number("anchor_age").alias("anchor_age"),
        parse_number("anchor_year").alias("anchor_year"),
    )
    if strangers := set(objectors).difference(patients["patient"]):
        tally.remarks.append(
            f"{len(strangers)} of {len(objectors)} ids on the opt-out list are nobody's here: "
            "check their spelling"
        )
    patients = without_objectors(patients, "patients", objectors, tally)
    patients = tally.unique("patients", patients, ["patient"])
    admissions = read_whole(
        require_table(hosp, "admissions"),
        "admissions",
        (
            "subject_id",
            "hadm_id",
            "admittime",
            "dischtime",
            "deathtime",
            "admission_type",
            "hospital_expire_flag",
        ),
        tally,
    )
    times = parse_times(admissions, "admittime", "dischtime", "deathtime", available=("deathtime",))
    that_day = pl.min_horizontal("deathtime", "dischtime")
    stays = times.select(
        parse_id("hadm_id").alias("stay"),
        parse_id("subject_id").alias("patient"),
        pl.col("admittime").alias("begin"),
        pl.col("dischtime").alias("end"),
        pl.when("dated").then(that_day).otherwise("deathtime").alias("died_at"),
        pl.col("admission_type").is_in(PLANNED).fill_null(False).alias("planned"),
        (parse_number("hospital_expire_flag") == 1).fill_null(False).alias("died"),
        "garbled",
        "dated",
    )
    stays = without_objectors(stays, "admissions", objectors, tally)
    stays = tally.split("admissions", stays, ("no readable hadm_id", pl.col("stay").is_null()))
    stays = tally.unique("admissions", stays, stays.columns)
    if (twice := stays.filter(pl.col("stay").is_duplicated())).height:
        raise ShardError(
            f"{require_table(hosp, 'admissions')}: hadm_id {twice['stay'][0]} is given twice with "
            f"different contents (and {twice['stay'].n_unique() - 1} others)",
            cure="keep one row per admission",
        )
    admitted = pl.col("patient").is_in(stays["patient"].unique().implode())
    patients = tally.split("patients", patients, ("no admission", ~admitted))
    tally["patients"].kept += patients.height
    begin, end, died_at = pl.col("begin"), pl.col("end"), pl.col("died_at")
    stays = tally.split(
        "admissions",
        stays.join(
            patients.with_columns(listed=True), on="patient", how="left", maintain_order="left"
        ),
        ("the patient is not in table patients", pl.col("listed").is_null()),
        ("a time is unreadable", pl.col("garbled")),
        ("no admission or discharge time", begin.is_null() | end.is_null()),
        ("discharged before admitted", end < begin),
    )
    tally.note(
        "admissions",
        "died before admitted: the discharge counts",
        stays.filter(died_at < begin).height,
    )
    tally.note(
        "admissions",
        "a date of death without a time: the end of that day, at most the discharge",
        stays.filter("dated").height,
    )
    unclear = pl.col("died") != died_at.is_not_null()
    tally.note(
        "admissions",
        "hospital_expire_flag and deathtime disagree: dead if one says so",
        stays.filter(unclear).height,
    )
    age = pl.col("anchor_age") + begin.dt.year() - pl.col("anchor_year")
    stays = stays.with_columns(
        stay_id=pl.col("stay").cast(pl.String),
        died_at=pl.when(died_at >= begin)
        .then(died_at)
        .when(died_at.is_not_null() | pl.col("died"))
        .then(end),
        age=pl.when(age.is_between(0, MAX_AGE_YEARS)).then(age),
    )
    tally.note(
        "admissions",
        f"age missing, or not between 0 and {MAX_AGE_YEARS:g}: unknown",
        stays["age"].null_count(),
    )
    return stays.join(
        _units(icu, stays, objectors, tally), on="stay", how="left", maintain_order="left"
    ).select(
        *("stay", "stay_id", "patient", "begin", "end", "died_at", "planned", "unit", "age", "sex")
    )


def _units(
    icu: Path, stays: pl.DataFrame, objectors: Collection[int], tally: Tally
) -> pl.DataFrame:
    """First unit of intensive care of each admission: columns stay, unit."""
    table = read_whole(
        require_table(icu, "icustays"),
        "icustays",
        ("subject_id", "hadm_id", "first_careunit", "intime"),
        tally,
    )
    frame = parse_times(table, "intime").select(
        parse_id("hadm_id").alias("stay"),
        parse_id("subject_id").alias("patient"),
        pl.col("first_careunit").fill_null("unknown").alias("unit"),
        "intime",
    )
    frame = without_objectors(frame, "icustays", objectors, tally)
    frame = tally.unique("icustays", frame, frame.columns)
    frame = tally.split(
        "icustays",
        frame.join(
            stays.select("stay", owner="patient"), on="stay", how="left", maintain_order="left"
        ),
        ("its admission is not in the import", pl.col("owner").is_null()),
        ("the admission belongs to another patient", pl.col("owner") != pl.col("patient")),
    )
    untimed = frame["intime"].null_count()
    tally.note("icustays", "no readable intime: taken as the last of its admission", untimed)
    tally["icustays"].kept += frame.height
    return (
        frame.sort("intime", nulls_last=True)
        .unique("stay", keep="first", maintain_order=True)
        .select("stay", "unit")
    )


def _of_patients(
    frame: pl.DataFrame, table: str, patients: pl.Series, tally: Tally
) -> pl.DataFrame:
    """Rows of the import's patients that have readable times, with columns patient and stay."""
    frame = frame.with_columns(
        parse_id("subject_id").alias("patient"), parse_id("hadm_id").alias("stay")
    )
    patient = pl.col("patient")
    frame = tally.split(
        table,
        frame,
        ("no readable subject_id", patient.is_null()),
        ("patient not among the import's", ~patient.is_in(patients.implode())),
        ("a time is unreadable", pl.col("garbled")),
    )
    given = pl.col("hadm_id").str.strip_chars() != ""
    for what, rule in (
        ("hadm_id unreadable: found by time", pl.col("stay").is_null() & given),
        ("a date without a time: the end of that day counts", pl.col("dated")),
    ):
        tally.note(table, what, frame.filter(rule).height)
    return frame


# -- events -----------------------------------------------------------------------------------


def _check_items(hosp: Path, icu: Path, tally: Tally) -> None:
    """Remarks on items that the dictionaries lack, or call by another name."""
    labels: dict[int, str] = {}
    for folder, name in ((icu, "d_items"), (hosp, "d_labitems")):
        file = find_table(folder, name)
        if file is None:
            tally.remarks.append(f"no dictionary {name}: its items were not checked")
            continue
        frame = read_whole(file, name, ("itemid", "label"), tally)
        tally[name].kept += frame.height
        labels |= dict(frame.select(parse_id("itemid"), pl.col("label").fill_null("")).iter_rows())
    for item in ITEMS:
        label = labels.get(item.itemid)
        if label is not None and _plain(label) != _plain(item.label):
            tally.remarks.append(
                f"item {item.itemid} is called '{label}' here; read as {item.source} {item.series} "
                f"('{item.label}')"
            )
    if labels and (unknown := [i for i in ITEMS if i.itemid not in labels]):
        names = ", ".join(f"{item.itemid} ({item.series})" for item in unknown)
        tally.remarks.append(f"items that are in no dictionary: {names}")


def _plain(label: str) -> str:
    return "".join(label.lower().split())


def _items(kind: str) -> pl.DataFrame:
    """Columns itemid, source, series and own_unit of one kind."""
    chosen = [(i.itemid, i.source, i.series, i.unit) for i in ITEMS if i.source == kind]
    schema = {"itemid": pl.Int64, "source": pl.String, "series": pl.String, "own_unit": pl.String}
    return pl.DataFrame(chosen, schema=schema, orient="row")


def _wanted(items: pl.DataFrame) -> tuple[str, pl.Expr]:
    texts = [f"{itemid}{tail}" for itemid in items["itemid"] for tail in ("", ".0")]
    return "not a canonical series", pl.col("itemid").is_in(texts)


def _values(
    file: Path, kind: str, patients: pl.Series, tally: Tally, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Blocks of `chartevents` or `labevents`: numbers in canonical units."""
    items, table = _items(kind), file.name.partition(".")[0]
    columns = (*_EVENT_COLUMNS, "charttime", "storetime", "valuenum", "valueuom")
    for block in scan(file, table, columns, tally, only=_wanted(items), progress=progress):
        times = ("charttime", "storetime")
        frame = parse_times(block, *times, available=times).with_columns(
            parse_id("itemid"),
            parse_number("valuenum").alias("value"),
            unit=pl.col("valueuom").str.strip_chars().replace("", None),
        )
        frame = tally.split(
            table,
            _of_patients(frame, table, patients, tally),
            ("no number", pl.col("value").is_null()),
            ("no time", pl.col("charttime").is_null() & pl.col("storetime").is_null()),
        )
        late = pl.col("storetime") < pl.col("charttime")
        tally.note(
            table, "stored before it was measured: the later time counts", frame.filter(late).height
        )
        frame = frame.join(items, on="itemid", maintain_order="left").with_columns(
            time=pl.max_horizontal("charttime", "storetime"),
            unit=pl.coalesce("unit", "own_unit"),
        )
        yield to_canonical(frame, table, tally)


def _procedures(
    file: Path, kind: str, patients: pl.Series, tally: Tally, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Blocks of `procedureevents`: 1 when a procedure starts."""
    items, table = _items(kind), file.name.partition(".")[0]
    columns = (*_EVENT_COLUMNS, "starttime")
    for block in scan(file, table, columns, tally, only=_wanted(items), progress=progress):
        frame = parse_times(block, "starttime", available=("starttime",)).with_columns(
            parse_id("itemid"), time="starttime", value=pl.lit(1.0)
        )
        frame = tally.split(
            table,
            _of_patients(frame, table, patients, tally),
            ("no time", pl.col("time").is_null()),
        )
        yield frame.join(items, on="itemid", maintain_order="left")


# -- notes ------------------------------------------------------------------------------------


def _note_tables(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    place = folder / "note" if (folder / "note").is_dir() else folder
    found = {name: find_table(place, name) for name in _NOTES}
    tables = {name: file for name, file in found.items() if file}
    if not tables:
        raise ShardError(
            f"{place} holds neither radiology.csv.gz nor discharge.csv.gz",
            cure="give the folder of MIMIC-IV-Note",
        )
    return tables


def _texts(
    file: Path, category: str, patients: pl.Series, tally: Tally, progress: Progress
) -> Iterator[pl.DataFrame]:
    """Blocks of a note table; a note counts from when it was filed."""
    columns = ("subject_id", "hadm_id", "charttime", "storetime", "text")
    for block in scan(file, category, columns, tally, progress=progress):
        frame = parse_times(block, "charttime", "storetime", available=("storetime",)).with_columns(
            time="storetime", category=pl.lit(category), text=pl.col("text").str.strip_chars()
        )
        yield tally.split(
            category,
            _of_patients(frame, category, patients, tally),
            ("no text", pl.col("text").is_null() | (pl.col("text") == "")),
            ("no storetime: when it could be read is not known", pl.col("time").is_null()),
            ("filed before it was written", pl.col("time") < pl.col("charttime")),
        )


# -- the story --------------------------------------------------------------------------------


def _about(source: MimicSource, options: Options) -> dict[str, Any]:
    modules = [
        "hosp",
        "icu",
        *(["note"] if source.notes else []),
        *(["cxr-jpg"] if source.cxr else []),
    ]
    return {
        "source": "MIMIC-IV",
        "options": {
            "modules": modules,
            "records": "X-ray studies"
            if source.record_hour is None
            else f"hour {source.record_hour:g}",
            "exclude_early_discharges": source.exclude_early_discharges,
            "complete_only": options.complete_only,
            "sites": options.sites,
            "sources": list(EVENT_SOURCES),
        },
    }

"""MIMIC-CXR-JPG: chest X-rays, the records that they are, and their CheXpert labels.

An image counts from study date and time. The views of one study share the time of the first, for a
report filed between two views tells the labels; a view taken more than an hour later was another
examination in all but number, and keeps its own time.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import polars as pl

from client.site.shard.importers.tables import (
    Progress,
    parse_id,
    parse_number,
    read_whole,
    require_table,
)
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import (
    CHEXPERT_TASKS,
    find_stay,
    in_stays,
    without_objectors,
)

_METADATA = "mimic-cxr-2.0.0-metadata"
_CHEXPERT = "mimic-cxr-2.0.0-chexpert"
_ONE_EXAMINATION = timedelta(hours=1)
_NAMES_A_FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"  # and no other folder
_JPEG_BEGINS, _JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"
_BROKEN = ("the file is not on disk", "the file is no JPEG", "the JPEG is cut off")


def read_images(folder: Path, objectors: Collection[int], tally: Tally) -> pl.DataFrame:
    """All images of the metadata, whether or not their files are there.

    Args:
        folder: Holds metadata, CheXpert labels and `files`.

    Returns:
        Columns patient, stay (null), study, study_time (of its first view), time (from when the
        image counts), path (in the shard), file (on disk), view, dicom.
    """
    table = read_whole(
        require_table(folder, _METADATA),
        "images",
        ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"),
        tally,
    )
    clock = pl.col("StudyTime").str.strip_chars().str.split(".")
    seconds = clock.list.get(0, null_on_oob=True).str.zfill(6)
    fraction = clock.list.get(1, null_on_oob=True).fill_null("0")
    stamp = pl.concat_str(
        parse_id("StudyDate").cast(pl.String), pl.lit(" "), seconds, pl.lit("."), fraction
    )
    dicom = pl.col("dicom_id")
    frame = table.select(
        parse_id("subject_id").alias("patient"),
        pl.lit(None, dtype=pl.Int64).alias("stay"),
        parse_id("study_id").alias("study"),
        stamp.str.to_datetime("%Y%m%d %H%M%S%.f", time_unit="us", strict=False).alias("time"),
        pl.col("ViewPosition").alias("view"),
        pl.when(dicom.str.contains(_NAMES_A_FILE)).then(dicom).alias("dicom"),
    )
    frame = without_objectors(frame, "images", objectors, tally)
    frame = tally.split(
        "images",
        frame,
        ("no readable dicom_id or study_id", pl.col("dicom").is_null() | pl.col("study").is_null()),
        ("no readable StudyDate and StudyTime", pl.col("time").is_null()),
    )
    text = pl.col("patient").cast(pl.String)
    inside = pl.format("files/p{}/p{}/s{}/{}.jpg", text.str.slice(0, 2), text, "study", "dicom")
    images = tally.unique("images", frame, ["dicom"]).with_columns(
        study_time=pl.col("time").min().over("patient", "study"),
        path=inside.str.replace("^files/", "images/"),
        file=pl.format("{}/{}", pl.lit(str(folder.absolute())), inside),
    )
    late = pl.col("time") - pl.col("study_time") > _ONE_EXAMINATION
    tally.note(
        "images", "taken over an hour after its study's first view", images.filter(late).height
    )
    return images.with_columns(time=pl.when(late).then("time").otherwise("study_time"))


def records_of_studies(images: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """One record per X-ray study during a stay: columns record_id, stay, patient, study, time."""
    studies = (
        images.select("patient", "study", time="study_time")
        .unique()
        .sort("patient", "time", "study")
    )
    outside, dead = "X-ray outside of every stay with intensive care", "X-ray after death"
    placed = in_stays(studies, stays, outside, dead, tally)
    record_id = pl.format("{}-s{}", "stay_id", "study").alias("record_id")
    return placed.select(record_id, "stay", "patient", "study", "time")


def add_pathologies(
    records: pl.DataFrame, folder: Path, objectors: Collection[int], tally: Tally
) -> pl.DataFrame:
    """Adds the fourteen image labels to `records_of_studies`, in place of patient and study: 1
    true, 0 false; uncertain (-1) and blank are unknown."""
    names = {task: task.replace("_", " ").title() for task in CHEXPERT_TASKS}
    key = ["patient", "study"]
    table = read_whole(
        require_table(folder, _CHEXPERT),
        "chexpert",
        ("subject_id", "study_id", *names.values()),
        tally,
    ).with_columns(parse_id("subject_id").alias("patient"), parse_id("study_id").alias("study"))
    table = without_objectors(table, "chexpert", objectors, tally)
    table = tally.split("chexpert", table, ("no readable study_id", pl.col("study").is_null()))
    table = tally.unique("chexpert", table, key)
    ours = table.join(records, on=key, how="semi")
    tally.skip("chexpert", "no record of its study", table.height - ours.height)
    tally["chexpert"].kept += ours.height
    values = {task: parse_number(column) for task, column in names.items()}
    odd = pl.any_horizontal(
        ~value.is_in([1.0, 0.0, -1.0]) | (value.is_null() & pl.col(names[task]).is_not_null())
        for task, value in values.items()
    )
    tally.note("chexpert", "a label other than 1, 0, -1: unknown", ours.filter(odd).height)
    labels = ours.select(
        *key,
        *(
            pl.when(value.is_in([0.0, 1.0])).then(value == 1.0).alias(f"y_{task}")
            for task, value in values.items()
        ),
    )
    return records.join(labels, on=key, how="left", maintain_order="left").drop(key)


def whole_images(
    images: pl.DataFrame, stays: pl.DataFrame, tally: Tally, progress: Progress
) -> pl.DataFrame:
    """Images of the stays whose files are there, and whole."""
    placed = tally.split(
        "images",
        find_stay(images, stays),
        ("in no hospital stay of the import", pl.col("stay").is_null()),
    )
    files, states = placed["file"].to_list(), []
    with ThreadPoolExecutor() as pool:
        for number, state in enumerate(pool.map(_state_of_file, files), 1):
            states.append(state)
            if number % 1000 == 0 or number == len(files):
                progress("images", number, len(files))
    return tally.split(
        "images",
        placed.with_columns(state=pl.Series(states, dtype=pl.String)),
        *((reason, pl.col("state") == reason) for reason in _BROKEN),
    )


def _state_of_file(name: str) -> str | None:
    """Whether a JPEG is there from its first to its last byte; decoding all would take hours."""
    try:
        with open(name, "rb") as file:
            begin = file.read(2)
            file.seek(0, 2)
            file.seek(-min(64, file.tell()), 2)
            end = file.read()
    except OSError:
        return _BROKEN[0]
    if begin != _JPEG_BEGINS:
        return _BROKEN[1]
    return None if _JPEG_ENDS in end else _BROKEN[2]

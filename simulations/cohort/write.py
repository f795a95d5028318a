"""Writes the synthetic cohort to disk: one tree of MIMIC-IV's layout per hospital."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from common.errors import StudyError
from simulations.cohort import hosp, icu, imaging, latent
from simulations.cohort.dates import calendar
from simulations.cohort.layout import write_table
from simulations.cohort.notes import notes
from simulations.cohort.phantom import Scanner, jpeg
from simulations.cohort.profiles import Profile, hospital
from simulations.cohort.truth import ceiling, truth

PATIENTS = 250
MOST_HOSPITALS, MOST_PATIENTS = 100, 20_000
"""More would run out of identifiers."""

Progress = Callable[[str, float], None]


def write_cohort(
    folder: Path,
    hospitals: int,
    *,
    patients: int = PATIENTS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Writes the first `hospitals` hospitals under `folder` and returns their trees by name.

    A hospital is drawn from `seed` and its own number alone: it is the same, to the byte, however
    many others are written. A tree that is there is complete (it is renamed into place) and kept.

    Args:
        hospitals: 1 to 100; names beyond the tenth are numbered.
        patients: Per hospital, 1 to 20,000; about one in four has several stays.
        progress: Called with a hospital's name and the share of it that is done.

    Raises:
        StudyError: Too many or too few, or a tree in the way that was made otherwise.
    """
    if not (1 <= hospitals <= MOST_HOSPITALS and 1 <= patients <= MOST_PATIENTS):
        raise StudyError(
            f"a cohort of {hospitals} hospitals with {patients} patients each cannot be written",
            cure=f"ask for 1 to {MOST_HOSPITALS} hospitals of 1 to {MOST_PATIENTS} patients",
        )
    written = {}
    for index in range(hospitals):
        name, profile = hospital(index)
        path = folder / name
        origin = {"hospital": name, "patients": patients, "seed": seed}
        if path.exists():
            _refuse_another(path, origin)
        else:
            part = path.with_name(f".{path.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            for share in _write_hospital(part, index, profile, patients, seed, origin):
                if progress:
                    progress(name, share)
            part.rename(path)
        written[name] = path
    return written


def digest(folder: Path) -> str:
    """SHA-256 over what a tree (or a folder of trees) says, as hexadecimal digits.

    Of every file, in order of relative path: the path and the content. Content is the text of a
    table, the values of a parquet file, the decoded grey levels of an image: compression is not the
    cohort's. Grey levels still depend on the JPEG codec, which the locked Pillow brings along.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
        elif path.suffix == ".parquet":
            content = pl.read_parquet(path).write_csv().encode()
        elif path.suffix == ".jpg":
            with Image.open(path) as image:
                content = repr(image.size).encode() + image.tobytes()
        else:
            content = path.read_bytes()
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def _refuse_another(path: Path, origin: dict[str, Any]) -> None:
    """A tree made from other arguments is not taken for this one."""
    try:
        known = json.loads((path / "ceiling.json").read_text())
        found = {key: known[key] for key in origin}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    if found != origin:
        raise StudyError(
            f"{path} is in the way: it holds {found or 'something else'}, not {origin}",
            cure="choose another folder, or remove this one",
        )


def _write_hospital(
    root: Path, index: int, profile: Profile, patients: int, seed: int, origin: dict[str, Any]
) -> Iterator[float]:
    """Writes a tree and says, image by image, what share is done."""
    # One stream for each table: a change to one leaves the others as they are.
    streams = iter(np.random.default_rng([seed, index]).spawn(11))
    population = latent.simulate(profile, patients, next(streams))
    dates = calendar(population, index, next(streams))
    images, chests = imaging.metadata(population, dates, profile, next(streams))
    frontal = images.filter(pl.col("ViewPosition") != "LATERAL")["ViewPosition"].to_list()
    tables = {
        "hosp/patients": hosp.patients(population, dates, next(streams)),
        "hosp/admissions": hosp.admissions(population, dates, next(streams)),
        "hosp/labevents": hosp.labevents(population, dates, profile, next(streams)),
        "hosp/d_labitems": hosp.d_labitems(),
        "icu/icustays": icu.icustays(population, dates, next(streams)),
        "icu/chartevents": icu.chartevents(population, dates, profile, next(streams)),
        "icu/procedureevents": icu.procedureevents(population, dates, profile, next(streams)),
        "icu/d_items": icu.d_items(),
        "cxr/mimic-cxr-2.0.0-metadata": images,
        "cxr/mimic-cxr-2.0.0-chexpert": imaging.chexpert(population, dates),
        **notes(population, dates, frontal, profile, next(streams)),
    }
    for name, table in tables.items():
        write_table(root, name, table)
    yield 0.3

    scanner = Scanner(profile.pixels, profile.gamma, profile.contrast, profile.noise)
    grain = next(streams)
    rows = images.select("subject_id", "study_id", "dicom_id", "ViewPosition").iter_rows()
    for number, (subject, study, dicom, view) in enumerate(rows):
        place = root / f"cxr/files/p{str(subject)[:2]}/p{subject}/s{study}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{dicom}.jpg").write_bytes(jpeg(chests[number], view, scanner, grain))
        yield 0.3 + 0.7 * number / len(chests)

    truth(population, dates).write_parquet(root / "truth.parquet")
    report = {**origin, **ceiling(population, dates)}
    (root / "ceiling.json").write_text(json.dumps(report, indent=2) + "\n")
    yield 1.0

"""The form that every source is brought into: stays, and records with their labels.

A **stay** runs from admission to discharge. A **record** is one moment of a stay: what was known by
then goes in, what came after is predicted. Frames use these columns:

* ``stays``: stay (whole number, unique), stay_id (text), patient (whole number), begin, end,
  died_at (in hospital, else null), planned (boolean), unit (text or null: where the patient lay
  first in intensive care, null for none), age (years), sex.
* ``records``: record_id, stay, time, and y_<task> where the source itself has labels (images).

Times are `datetime[us]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Literal

import polars as pl

from client.site.shard.importers.tally import Tally
from common.errors import ShardError

PATHOLOGY_TASKS = (
    "fracture",
    "lung_lesion",
    "enlarged_cardiomediastinum",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "lung_opacity",
    "pneumothorax",
    "edema",
    "cardiomegaly",
)
"""UNI-MLM's ten image tasks, Table I; CheXpert labels."""
CHEXPERT_TASKS = (
    *PATHOLOGY_TASKS,
    "no_finding",
    "pleural_effusion",
    "pleural_other",
    "support_devices",
)
"""All fourteen, as the LLaMA fusion has them."""
OUTCOME_TASKS = (
    "length_of_stay",
    "mortality_48h",
    "hospital_mortality",
    "long_stay",
    "readmission",
)
"""UNI-MLM's two outcomes and AdaCoMed's three."""
DEFAULT_HOUR = 48.0
"""Of the one record of a stay, where nothing else is said (AdaCoMed)."""

_TWO_DAYS, _MONTH = timedelta(hours=48), timedelta(days=30)
_LONG, _SHORT = timedelta(days=7), timedelta(days=3)
_YEAR_HOURS = 8760
_ID = re.compile(r"-?[0-9]{1,19}")
_LARGEST_ID = 2**63 - 1
_MOST_SITES = 200  # each holds four files open while an import writes


def outcomes(
    records: pl.DataFrame,
    stays: pl.DataFrame,
    every_stay: pl.DataFrame,
    *,
    exclude_early_discharges: bool = False,
) -> pl.DataFrame:
    """Adds the five outcomes to records.

    * ``length_of_stay``: discharged alive within 48 h of the record (UNI-MLM, HAIM).
    * ``mortality_48h``: died in hospital within 48 h of the record. HAIM leaves out those
      discharged alive before (`exclude_early_discharges`); UNI-MLM counts them as negative.
    * ``hospital_mortality``: died in this stay (AdaCoMed).
    * ``long_stay``: stay over 7 days (true) against 3 to 7 days (false); shorter ones are unknown,
      and so are records later than 48 h: a late record would know the answer (AdaCoMed).
    * ``readmission``: an unplanned stay begins within 30 days after; unknown for those who died
      (AdaCoMed).

    Args:
        every_stay: Also stays without records, in which a patient may come back.
    """
    nexts = every_stay.filter(~pl.col("planned")).select("patient", again="begin").sort("again")
    # The first unplanned stay that begins after this one ends, if any.
    facts = (
        stays.sort("end")
        .join_asof(
            nexts,
            left_on="end",
            right_on="again",
            by="patient",
            strategy="forward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .select("stay", "begin", "end", "died_at", "again")
    )
    end, died, time = pl.col("end"), pl.col("died_at"), pl.col("time")
    alive, lasted = died.is_null(), end - pl.col("begin")
    soon = end - time <= _TWO_DAYS
    mortality = (died - time <= _TWO_DAYS).fill_null(False)
    if exclude_early_discharges:
        mortality = pl.when(~(alive & soon)).then(mortality)
    return (
        records.join(facts, on="stay", maintain_order="left")
        .with_columns(
            y_length_of_stay=alive & soon,
            y_mortality_48h=mortality,
            y_hospital_mortality=~alive,
            y_long_stay=pl.when((lasted >= _SHORT) & (time - pl.col("begin") <= _TWO_DAYS)).then(
                lasted > _LONG
            ),
            y_readmission=pl.when(alive).then((pl.col("again") - end <= _MONTH).fill_null(False)),
        )
        .drop("begin", "end", "died_at", "again")
    )


def at_hour(stays: pl.DataFrame, hour: float, tally: Tally) -> pl.DataFrame:
    """One record per stay, `hour` hours after its begin; shorter stays have none.

    Raises:
        ShardError: `hour` is no time within a year.
    """
    if not 0 < hour <= _YEAR_HOURS:
        raise ShardError(
            f"a record at hour {hour:g}", cure=f"give an hour above 0, up to {_YEAR_HOURS:,}"
        )
    time = pl.col("begin") + timedelta(hours=hour)
    lasting = tally.split(
        "records",
        stays,
        (f"the stay ended before hour {hour:g}", time > pl.col("end")),
        (f"the patient had died before hour {hour:g}", time > pl.col("died_at")),
    )
    tally["records"].rows += stays.height
    return lasting.select(pl.format("{}-r", "stay_id").alias("record_id"), "stay", time=time)


def find_stay(frame: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Fills a null `stay` with the patient's stay that holds `time`; null where none does.

    Of several that hold it, it is the one that began last.

    Args:
        frame: Columns patient, time, and stay (may be missing).
    """
    if "stay" not in frame.columns:
        frame = frame.with_columns(stay=pl.lit(None, dtype=pl.Int64))
    lost = frame.filter(pl.col("stay").is_null())
    if lost.is_empty():
        return frame
    spans = stays.select("patient", "begin", "end", found="stay").sort("patient", "begin", "found")
    reached = pl.col("end").cum_max().shift().over("patient")
    entangled = spans.filter(reached > pl.col("begin"))["patient"].unique()
    overlap = pl.col("patient").is_in(entangled.implode())
    placed = [
        _last_begun(lost.filter(~overlap), spans),
        _last_holding(lost.filter(overlap), spans.filter(overlap)),
    ]
    given = frame.filter(pl.col("stay").is_not_null())
    return pl.concat([given, *(part.select(frame.columns) for part in placed)])


def _last_begun(lost: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """`find_stay` for patients whose stays follow one another."""
    return (
        lost.drop("stay")
        .sort("time", maintain_order=True)
        .join_asof(
            spans.sort("begin", maintain_order=True),
            left_on="time",
            right_on="begin",
            by="patient",
            strategy="backward",
            check_sortedness=False,
        )
        .with_columns(stay=pl.when(pl.col("time") <= pl.col("end")).then(pl.col("found")))
    )


def _last_holding(lost: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """`find_stay` for patients whose stays overlap, or lie in one another: all are looked at."""
    rows = lost.drop("stay").with_row_index("_row")
    holding = (
        rows.select("_row", "patient", "time")
        .join(spans, on="patient")
        .filter(pl.col("time").is_between("begin", "end"))
        .sort("begin", "found")
        .unique("_row", keep="last", maintain_order=True)
    )
    return rows.join(
        holding.select("_row", stay="found"), on="_row", how="left", maintain_order="left"
    )


def in_stays(
    moments: pl.DataFrame, stays: pl.DataFrame, outside: str, dead: str, tally: Tally
) -> pl.DataFrame:
    """Moments that may be records: during a stay, of a living patient; with stay and stay_id.

    Args:
        moments: Columns patient, time, and others that are kept.
        outside, dead: Reasons under which the others are counted.
    """
    tally["records"].rows += moments.height
    placed = find_stay(moments, stays).join(
        stays.select("stay", "stay_id", "died_at"), on="stay", how="left", maintain_order="left"
    )
    return tally.split(
        "records",
        placed,
        (outside, pl.col("stay").is_null()),
        (dead, pl.col("time") > pl.col("died_at")),
    )


# -- sites ------------------------------------------------------------------------------------


def parse_sites(text: str | None) -> Literal["care-unit"] | int | None:
    """`care-unit`, `hash:N`, or None for one site.

    Raises:
        ShardError: It is none of these.
    """
    if text is None:
        return None
    if text == "care-unit":
        return "care-unit"
    kind, _, number = text.partition(":")
    if kind == "hash" and number.isdecimal() and 1 <= int(number) <= _MOST_SITES:
        return int(number)
    raise ShardError(
        f"--sites {text}", cure=f"write care-unit, or hash:N with N from 1 to {_MOST_SITES}"
    )


def site_of_patient(stays: pl.DataFrame, sites: Literal["care-unit"] | int | None) -> pl.DataFrame:
    """Columns patient and site: each patient belongs to one, whatever happens later.

    Args:
        stays: The stays of all patients.
        sites: By the unit of a patient's first stay, by hash, or one site for all (empty name).

    Raises:
        ShardError: There are more care units than an import can make sites of.
    """
    first = stays.sort("begin", "stay").unique("patient", keep="first", maintain_order=True)
    if sites is None:
        name = pl.Series(["" for _ in range(first.height)], dtype=pl.String)
    elif isinstance(sites, int):
        name = pl.Series([f"site-{_hash(p) % sites + 1}" for p in first["patient"]])
    else:
        name = pl.Series([slug(unit or "unknown") for unit in first["unit"]], dtype=pl.String)
    if (count := name.n_unique()) > _MOST_SITES:
        raise ShardError(
            f"--sites care-unit: {count} care units, which are more than {_MOST_SITES} sites",
            cure="write --sites hash:N, or give units of one kind the same name",
        )
    return first.select("patient").with_columns(site=name)


def slug(unit: str) -> str:
    """A site's name from a unit's: the abbreviation in brackets where there is one."""
    found = re.search(r"\(([^()]+)\)?\s*$", unit)
    text = found.group(1) if found else unit
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64] or "unknown"


def _hash(patient: int) -> int:
    digest = hashlib.sha256(f"fedward site\0{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


# -- patients who object ----------------------------------------------------------------------


def read_opt_out(file: Path | None) -> frozenset[int]:
    """Patients who object: one id a line; empty lines and what follows # are ignored.

    Raises:
        ShardError: The file cannot be read, or a line holds something else.
    """
    if file is None:
        return frozenset()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(
            f"{file}: the opt-out list cannot be read ({error})",
            cure="give a text file in UTF-8 with one subject_id a line; nothing was imported",
        ) from None
    patients = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not _ID.fullmatch(text) or not -_LARGEST_ID - 1 <= int(text) <= _LARGEST_ID:
            raise ShardError(
                f"{file}, line {number}: '{text}' is no patient id",
                cure="write one subject_id a line; nothing was imported",
            )
        patients.add(int(text))
    return frozenset(patients)


def without_objectors(
    frame: pl.DataFrame, table: str, objectors: Collection[int], tally: Tally
) -> pl.DataFrame:
    """Rows whose patient (column `patient`) is known and does not object."""
    patient = pl.col("patient")
    return tally.split(
        table,
        frame,
        ("no readable subject_id", patient.is_null()),
        ("the patient objects", patient.is_in(list(objectors))),
    )

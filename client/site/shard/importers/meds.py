"""MEDS data sets (https://medical-event-data-standard.github.io): one long table of events.

Which codes are stays, records and canonical series is said by a map (`meds_map`). An event counts
from its time, the only one that MEDS has: an ETL that puts results at the time of sampling shows
them from then on. What is known only at the end (discharge diagnoses, DRG) stands at the discharge
and is seen by no record before.

The data are read three times (`meds_data`): codes alone, then what makes stays, records and labels,
then inputs. Only the second is held in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl

from client.site.shard.contract import EVENT_SOURCES, MAX_AGE_YEARS
from client.site.shard.importers.meds_data import COLUMNS, MedsData
from client.site.shard.importers.meds_map import AMONG, MedsMap, NamedCodes, find_codes
from client.site.shard.importers.staging import Options, Staging, workplace, write_shards
from client.site.shard.importers.tables import Progress
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import (
    at_hour,
    find_stay,
    in_stays,
    outcomes,
    site_of_patient,
)
from client.site.shard.importers.units import to_canonical
from common.errors import ShardError

_ADMITTED_WITHIN = timedelta(days=1)
_BYTES_PER_ROW = 40  # at least: parquet can pack a million rows into a megabyte


@dataclass(frozen=True)
class MedsSource:
    """Where the data set lies, and what to make of it.

    Attributes:
        root: Folder with `data` and `metadata`.
        map: What its codes mean.
        hour: Records at this hour of each stay, whatever the map says.
        exclude_early_discharges: See `timeline.outcomes`.
    """

    root: Path
    map: MedsMap
    hour: float | None = None
    exclude_early_discharges: bool = False

    @property
    def records(self) -> float | tuple[str, ...]:
        """Hour of each stay's record, or patterns of the events that are records."""
        if self.hour is not None:
            return self.hour
        return self.map.records.at or self.map.records.hour


def import_meds(
    source: MedsSource,
    dest: Path,
    options: Options,
    *,
    objectors: Collection[int] = (),
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[list[Path], Tally]:
    """Imports a MEDS data set into shards.

    Args:
        dest: The shard, or with several sites the folder of shards: whole afterwards, or absent.
        options: `meta` and `kinds` are taken from map and data set.
        objectors: subject_id of patients who are never imported.

    Returns:
        Folders of the shards, and what was read, kept and skipped.

    Raises:
        ShardError: This is no MEDS data set, its files cannot be read, the map does not fit it, or
            `dest` may not be written.
    """
    mapped, tally = source.map, Tally()
    if options.sites == "care-unit" and not mapped.stays.unit:
        raise ShardError(
            "--sites care-unit: the map names no care units",
            cure="write the codes of entries to them into the map: unit in [stays]",
        )
    dest = dest.resolve()
    data = MedsData(source.root, objectors, progress)
    kinds = (*mapped.series, *(["notes"] if mapped.notes else []))
    options = replace(options, meta=_origin(mapped, data.metadata), kinds=kinds)
    with workplace(dest, overwrite=overwrite) as place:
        vocabulary = data.vocabulary(tally)
        codes = find_codes(mapped, vocabulary, tally)
        _count(vocabulary, codes, tally)
        facts = _facts(data, codes, tally)
        every_stay = _stays(facts, codes, bool(mapped.stays.died), tally)
        stays = every_stay
        if mapped.stays.unit:
            stays = every_stay.filter(pl.col("unit").is_not_null())
            tally.skip("stays.begin", "no entry to a unit", every_stay.height - stays.height)
        tally["stays.begin"].kept += stays.height
        sites = site_of_patient(stays, options.sites)
        if isinstance(source.records, tuple):
            records = _at_events(_of(facts, "records.at"), stays, tally)
        else:
            records = at_hour(stays, source.records, tally)
        records = outcomes(
            records, stays, every_stay, exclude_early_discharges=source.exclude_early_discharges
        )
        for name, task in mapped.tasks.items():
            label = _follows(records, stays, _of(facts, f"tasks.{name}"), task.within_hours)
            records = records.with_columns(label.alias(f"y_{name}"))
        inputs = vocabulary.filter(pl.col("code").is_in(codes.inputs.implode()))["rows"].sum()
        staging = Staging(place / "staging", max(data.size, _BYTES_PER_ROW * int(inputs)))
        patients = stays["patient"].unique()
        columns = COLUMNS if mapped.notes else COLUMNS[:-1]  # texts are long
        for rows in data.rows("inputs", codes.inputs, columns):
            for kind, events in _events(rows, codes, patients, tally):
                staging.add("events", kind, events)
            if mapped.notes:
                staging.add("notes", "notes", _texts(rows, codes, patients, tally))
        written = write_shards(
            dest,
            place,
            stays,
            records,
            sites,
            staging,
            options,
            tally,
            _about(source, options, data.metadata),
            progress,
        )
    return written, tally


def _count(vocabulary: pl.DataFrame, codes: NamedCodes, tally: Tally) -> None:
    named = pl.col("code").is_in(pl.concat([codes.facts["code"], codes.inputs]).implode())
    nameless = pl.col("code").is_null()
    for reason, rule in (("no code", nameless), ("not named in the map", ~named & ~nameless)):
        tally.skip("data", reason, int(vocabulary.filter(rule)["rows"].sum()))
    tally["data"].kept += int(vocabulary.filter(named)["rows"].sum())


# -- stays ------------------------------------------------------------------------------------


def _facts(data: MedsData, codes: NamedCodes, tally: Tally) -> pl.DataFrame:
    """Columns key, patient, time, code, unit: what makes stays, records and labels, sorted."""
    rows = pl.concat(data.rows("stays", codes.facts["code"], ("subject_id", "time", "code")))
    facts = rows.join(codes.facts, on="code")
    held = []
    for name in codes.facts["key"].unique(maintain_order=True):
        if name in AMONG:  # counted there
            continue
        part = _of(facts, name)
        tally[name].rows += part.height
        timeless = pl.col("time").is_null()
        static = name in ("patient.male", "patient.female")
        part = part if static else tally.split(name, part, ("no time", timeless))
        held.append(tally.unique(name, part, part.columns).with_columns(key=pl.lit(name)))
        if not name.startswith("stays."):
            tally[name].kept += held[-1].height
    return pl.concat(held).sort("key", "patient", "time", "code")


def _of(facts: pl.DataFrame, key: str) -> pl.DataFrame:
    return facts.filter(pl.col("key") == key).drop("key")


def _stays(
    facts: pl.DataFrame, codes: NamedCodes, deaths_are_codes: bool, tally: Tally
) -> pl.DataFrame:
    """All stays in the form of `timeline`; `unit` is null where the patient came to none.

    MEDS has no stay ids: stays are the patient's pairs of begin and end, numbered in time.
    """
    stays = _pairs(_of(facts, "stays.begin"), _of(facts, "stays.end"), tally)
    stays = stays.join(_patients(facts, tally), on="patient", how="left").sort(
        "patient", "begin", "end", "begin_code"
    )
    begin, end, death = pl.col("begin"), pl.col("end"), pl.col("death")
    if deaths_are_codes:
        died = pl.col("end_code").is_in(codes.of("stays.died").implode())
        # The time of death may be after the discharge: an administrative one, or a date alone.
        died_at = pl.when(died).then(pl.when(death >= begin).then(death).otherwise(end))
    else:
        died_at = pl.when(death.is_between(begin, end)).then(death)
    # As in MIMIC-IV, of whose birth the year alone is known.
    age = (begin.dt.year() - pl.col("birth").dt.year()).cast(pl.Float64)
    stays = stays.with_row_index("stay").select(
        pl.col("stay").cast(pl.Int64),
        pl.format("{}-{}", "patient", pl.int_range(1, pl.len() + 1).over("patient")).alias(
            "stay_id"
        ),
        "patient",
        "begin",
        "end",
        died_at=died_at,
        planned=pl.col("begin_code").is_in(codes.of("stays.planned").implode()),
        age=pl.when(age.is_between(0, MAX_AGE_YEARS)).then(age),
        sex="sex",
    )
    tally.note("stays.begin", "age unknown", stays["age"].null_count())
    return stays.join(_units(_of(facts, "stays.unit"), stays, tally), on="stay", how="left")


def _pairs(begins: pl.DataFrame, ends: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Columns patient, begin, begin_code, end, end_code.

    A patient's begins and ends in order of time (at one moment, ends first: a transfer) fall into
    blocks of some begins followed by some ends. One of each is a stay; as many of one as of the
    other are stays that overlap, first to first. Otherwise a time is missing: the last begin and
    the first end are a stay, and the others are none.
    """
    block = ["patient", "block"]
    moves = (
        pl.concat([begins.with_columns(ends=pl.lit(False)), ends.with_columns(ends=pl.lit(True))])
        .sort("patient", "time", pl.col("ends").not_(), "code")
        .with_columns(
            starts=~pl.col("ends") & pl.col("ends").shift(fill_value=True).over("patient")
        )
        .with_columns(block=pl.col("starts").cum_sum().over("patient"))
        .with_columns(
            begins=(~pl.col("ends")).sum().over(block),
            ended=pl.col("ends").sum().over(block),
            place=pl.int_range(pl.len()).over(*block, "ends"),
        )
    )
    even = pl.col("begins") == pl.col("ended")
    inner = pl.when(pl.col("ends")).then(0).otherwise(pl.col("begins") - 1)
    moves = moves.with_columns(
        pair=pl.when(even).then("place").when(pl.col("place") == inner).then(0)
    )
    first = moves.filter(~pl.col("ends")).select(*block, "pair", begin="time", begin_code="code")
    last = moves.filter("ends").select(*block, "pair", end="time", end_code="code")
    pairs = first.join(last, on=[*block, "pair"])
    tally.skip("stays.begin", "no end of its own", first.height - pairs.height)
    tally.skip("stays.end", "no begin of its own", last.height - pairs.height)
    tally["stays.end"].kept += pairs.height
    overlapping = moves.filter(even & (pl.col("begins") > 1) & ~pl.col("ends"))
    tally.note("stays.begin", "overlap: first begin to first end", overlapping.height)
    return pairs.drop("block", "pair")


def _patients(facts: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Columns patient, birth, death (the first ones), sex (null where it is both or neither)."""
    key = pl.col("key")
    people = facts.group_by("patient").agg(
        birth=pl.col("time").filter(key == "patient.birth").min(),
        death=pl.col("time").filter(key == "patient.death").min(),
        male=(key == "patient.male").any(),
        female=(key == "patient.female").any(),
    )
    male, female = pl.col("male"), pl.col("female")
    both = people.filter(male & female).height
    tally.note("patient.female", "also male: sex unknown", both)
    sex = pl.when(male & ~female).then(pl.lit("M")).when(female & ~male).then(pl.lit("F"))
    return people.select("patient", "birth", "death", sex=sex)


def _units(entries: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """First unit of each stay: columns stay, unit.

    Patients are in the bed before the admission is on paper: an entry outside of every stay belongs
    to one that begins within a day.
    """
    placed = find_stay(entries, stays).sort("time", "unit")
    soon = placed.join_asof(
        stays.select("patient", "begin", soon="stay").sort("begin"),
        left_on="time",
        right_on="begin",
        by="patient",
        strategy="forward",
        tolerance=_ADMITTED_WITHIN,
        check_sortedness=False,
    ).with_columns(stay=pl.coalesce("stay", "soon"))
    early = soon.filter(placed["stay"].is_null() & pl.col("soon").is_not_null())
    tally.note("stays.unit", "up to a day before the stay", early.height)
    held = tally.split("stays.unit", soon, ("in no stay", pl.col("stay").is_null()))
    tally["stays.unit"].kept += held.height
    return held.unique("stay", keep="first", maintain_order=True).select(
        "stay", pl.col("unit").fill_null("unknown")
    )


# -- records ----------------------------------------------------------------------------------


def _at_events(events: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """One record at each time of these events within a stay."""
    moments = events.select("patient", "time").unique(maintain_order=True)
    placed = in_stays(moments, stays, "in no stay of the import", "after death", tally)
    placed = placed.sort("stay", "time")
    number = pl.int_range(1, pl.len() + 1).over("stay")
    return placed.select(pl.format("{}-r{}", "stay_id", number).alias("record_id"), "stay", "time")


def _follows(
    records: pl.DataFrame, stays: pl.DataFrame, events: pl.DataFrame, hours: float
) -> pl.Series:
    """Whether the patient has such an event after each record, up to `hours` later."""
    events = events.select("patient", next="time").sort("next")
    return (
        records.join(stays.select("stay", "patient"), on="stay", maintain_order="left")
        .with_row_index("row")
        .sort("time")
        .join_asof(
            events,
            left_on="time",
            right_on="next",
            by="patient",
            strategy="forward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .sort("row")
        .select((pl.col("next") - pl.col("time") <= timedelta(hours=hours)).fill_null(False))
        .to_series()
    )


# -- inputs -----------------------------------------------------------------------------------


def _events(
    rows: pl.DataFrame, codes: NamedCodes, patients: pl.Series, tally: Tally
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Source and events of it: numbers in canonical units, 1 for a procedure."""
    joined = rows.join(codes.series, on="code").with_columns(
        stay=pl.lit(None, dtype=pl.Int64),
        value=pl.when(pl.col("source") == "procedure").then(1.0).otherwise(pl.col("numeric_value")),
    )
    for (source,), part in joined.partition_by("source", as_dict=True).items():
        kind = str(source)
        tally[kind].rows += part.height
        kept = tally.split(
            kind,
            part,
            ("patient not among the import's", ~pl.col("patient").is_in(patients.implode())),
            ("no time", pl.col("time").is_null()),
            ("no number", pl.col("value").is_null()),
            ("not a finite number", ~pl.col("value").is_finite()),
        )
        yield kind, to_canonical(kept, kind, tally)


def _texts(
    rows: pl.DataFrame, codes: NamedCodes, patients: pl.Series, tally: Tally
) -> pl.DataFrame:
    frame = rows.join(codes.notes, on="code").with_columns(
        stay=pl.lit(None, dtype=pl.Int64), text=pl.col("text_value").str.strip_chars()
    )
    tally["notes"].rows += frame.height
    return tally.split(
        "notes",
        frame,
        ("patient not among the import's", ~pl.col("patient").is_in(patients.implode())),
        ("no time", pl.col("time").is_null()),
        ("no text", pl.col("text").is_null() | (pl.col("text") == "")),
    )


# -- the story --------------------------------------------------------------------------------


def _origin(mapped: MedsMap, metadata: dict[str, Any]) -> dict[str, str]:
    """dataset, licence, attribution: what the map says, else the data set itself."""
    said = {"dataset": metadata.get("dataset_name"), "licence": metadata.get("license")}
    said |= mapped.dataset.model_dump(exclude_none=True)
    return {key: value for key, value in said.items() if value}


def _about(source: MedsSource, options: Options, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "MEDS",
        "metadata": metadata,
        "map": source.map.model_dump(mode="json", exclude_defaults=True),
        "options": {
            "records": f"hour {source.records:g}"
            if not isinstance(source.records, tuple)
            else list(source.records),
            "exclude_early_discharges": source.exclude_early_discharges,
            "complete_only": options.complete_only,
            "sites": options.sites,
            "sources": [kind for kind in EVENT_SOURCES if kind in source.map.series],
        },
    }

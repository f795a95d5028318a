"""Out of core: inputs wait on disk in buckets of patients, and become shards bucket by bucket.

However large the source, memory holds one block of a file and one bucket of patients. The shards
are made in a hidden folder beside their place and renamed when all of them are whole: a killed
import leaves nothing but that folder, which the next one removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from client.site.shard import contract
from client.site.shard.importers.tables import Progress
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import find_stay
from client.site.shard.shard import HOSPITAL, META, bring_back, replace_folder
from common.errors import ShardError

_BYTES_PER_BUCKET = 16 << 20  # of compressed source
_MOST_BUCKETS = 256
_BYTES_AHEAD = 1 << 26
_FEW_PATIENTS = 500
_STORY = "import.json"

KINDS: Mapping[str, tuple[str, ...]] = {
    "events": ("source", "series", "value"),
    "images": ("path", "file", "view"),
    "notes": ("category", "text"),
}
"""Inputs and their own columns; all have table (of the source), patient, stay (or null), time."""
_MADE = {META, _STORY, "images", "report.html", *(f"{t}.parquet" for t in ("records", *KINDS))}


@dataclass(frozen=True)
class Options:
    """How to import, whatever the source.

    Attributes:
        name: The hospital's name, where there is one site.
        sites: None, `care-unit` or a number of sites; see `timeline.site_of_patient`.
        complete_only: Keep only records that see something of every kind, as UNI-MLM does.
        copy_images: Copy image files instead of linking to them.
        meta: More keys of shard.toml: dataset, licence, attribution.
        kinds: What a complete record sees: inputs as in `KINDS`, events by their sources.
    """

    name: str
    sites: Any = None
    complete_only: bool = False
    copy_images: bool = False
    meta: Mapping[str, str] = field(default_factory=dict)
    kinds: Sequence[str] = ("images", "notes", *contract.EVENT_SOURCES)

    def __post_init__(self) -> None:
        """Raises ShardError where `name` cannot name a site."""
        if not HOSPITAL.fullmatch(self.name):
            raise ShardError(
                f"'{self.name}' cannot name a hospital",
                cure="use up to 64 letters, digits and _ . - and begin with a letter or digit",
            )


class Staging:
    """Inputs on their way, in buckets of patients.

    Args:
        folder: Where they wait; made and removed by the caller.
        source_bytes: Size of the source's large tables; decides the number of buckets.
    """

    def __init__(self, folder: Path, source_bytes: int) -> None:
        self._folder = folder
        folder.mkdir()
        self.buckets = min(_MOST_BUCKETS, 1 + source_bytes // _BYTES_PER_BUCKET)
        self._waiting: dict[str, list[pl.DataFrame]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, table: str, frame: pl.DataFrame) -> None:
        """Stores rows with columns patient, stay, time and those of `KINDS[kind]`."""
        wanted = frame.select(pl.lit(table).alias("table"), "patient", "stay", "time", *KINDS[kind])
        self._waiting[kind].append(wanted)
        if sum(f.estimated_size() for f in self._waiting[kind]) >= _BYTES_AHEAD:
            self._flush(kind)

    def bucket(self, kind: str, number: int) -> pl.DataFrame | None:
        """All rows of the bucket's patients; None where there is none."""
        self._flush(kind)
        path = self._path(kind, number)
        if not path.exists():
            return None
        frames = []
        with path.open("rb") as file:
            while file.tell() < path.stat().st_size:  # one stream after the other
                frames.append(pl.DataFrame(pa.ipc.open_stream(file).read_all()))
        path.unlink()
        return pl.concat(frames)

    def of(self, number: int) -> pl.Expr:
        """Whether a patient belongs to the bucket."""
        return pl.col("patient") % self.buckets == number

    def _flush(self, kind: str) -> None:
        if not self._waiting[kind]:
            return
        frame = pl.concat(self._waiting[kind])
        self._waiting[kind] = []
        keyed = frame.with_columns(bucket=pl.col("patient") % self.buckets)
        for (number,), part in keyed.partition_by("bucket", as_dict=True).items():
            with self._path(kind, number).open("ab") as file:
                part.drop("bucket").write_ipc_stream(file, compat_level=pl.CompatLevel.oldest())

    def _path(self, kind: str, number: Any) -> Path:
        return self._folder / f"{kind}-{number:04d}"


@contextmanager
def workplace(dest: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `dest`, gone afterwards; what an earlier, killed import left is
    removed first, or brought back where it was about to be replaced.

    Raises:
        ShardError: Something lies at `dest`, or another import is on its way to it.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    place = dest.parent / f".{dest.name}.importing"
    try:
        place.mkdir(exist_ok=True)
    except FileExistsError:
        raise ShardError(
            f"{place} is a file: an import works in a folder of this name", cure="remove the file"
        ) from None
    held = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(
                f"another import into {dest} is running", cure="wait for it, or end it"
            ) from None
        bring_back(dest)
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            if dest.exists():
                _check_replaceable(dest, overwrite)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(held)


def write_shards(
    dest: Path,
    place: Path,
    stays: pl.DataFrame,
    records: pl.DataFrame,
    sites: pl.DataFrame,
    staging: Staging,
    options: Options,
    tally: Tally,
    about: Mapping[str, Any],
    progress: Progress = lambda *_: None,
) -> list[Path]:
    """Makes the shards of all sites from what is staged, and puts them in their place at once.

    Args:
        dest: The shard, or with several sites the folder of shards.
        place: From `workplace`.
        stays, records: See `timeline`; records with their labels.
        sites: Columns patient and site.
        about: Source and options, for import.json.

    Returns:
        The shards' folders.

    Raises:
        ShardError: No record is left.
    """
    if (patients := stays["patient"].n_unique()) < _FEW_PATIENTS:
        tally.remarks.append(
            f"{patients} patients: enough to try the path, too few to learn anything from"
        )
    made = place / "shards"
    writers: dict[str, _SiteWriter] = {}
    facts = stays.join(sites, on="patient").select(
        "stay", "stay_id", "patient", "begin", "age", "sex", "site"
    )
    labelled = records.join(facts, on="stay", maintain_order="left").with_columns(
        cutoff_hours=_hours("time")
    )
    for number in range(staging.buckets):
        _write_bucket(number, labelled, stays, facts, staging, options, tally, writers, made)
        progress("writing shards", number + 1, staging.buckets)
    if not writers:
        raise ShardError(
            "no record is left: " + (_reasons(tally) or "the source holds none"),
            cure="check source and options; nothing was written",
        )
    story = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": f"fedward {version('fedward')}",
        **about,
        **tally.as_dict(),
    }
    for site, writer in writers.items():
        writer.finish({"name": site, "hospital": site, **options.meta}, story)
    single = options.sites is None
    replace_folder(made / next(iter(writers)) if single else made, dest)
    return [dest] if single else [dest / site for site in sorted(writers)]


def _write_bucket(
    number: int,
    records: pl.DataFrame,
    stays: pl.DataFrame,
    facts: pl.DataFrame,
    staging: Staging,
    options: Options,
    tally: Tally,
    writers: dict[str, _SiteWriter],
    made: Path,
) -> None:
    mine = records.filter(staging.of(number))
    spans = stays.filter(staging.of(number))
    inputs: dict[str, pl.DataFrame] = {}
    for kind in KINDS:
        frame = staging.bucket(kind, number)
        if frame is not None:
            inputs[kind] = _placed(kind, find_stay(frame, spans), mine, facts, tally)
    if options.complete_only:
        complete = _complete(mine, inputs, options.kinds)
        tally.skip("records", "not complete", mine.height - complete.height)
        inputs = {kind: _placed_of(frame, complete, tally) for kind, frame in inputs.items()}
        mine = complete
    for frame in inputs.values():
        for table, rows in frame.group_by("table").len().iter_rows():
            tally[table].kept += rows
    tally["records"].kept += mine.height
    for (site,), part in (
        mine.sort("patient", "stay", "time")
        .partition_by("site", as_dict=True, maintain_order=True)
        .items()
    ):
        name = str(site) or options.name
        if name not in writers:
            writers[name] = _SiteWriter(made / name, options.copy_images)
        chosen = {kind: frame.filter(pl.col("site") == site) for kind, frame in inputs.items()}
        writers[name].add(_as_records(part), chosen)


def _placed(
    kind: str,
    frame: pl.DataFrame,
    records: pl.DataFrame,
    facts: pl.DataFrame,
    tally: Tally,
) -> pl.DataFrame:
    """Inputs of stays with records, up to their last one; with hours, site and stay_id."""
    last = records.group_by("stay").agg(last=pl.col("cutoff_hours").max())
    joined = frame.join(
        facts.select("stay", "stay_id", "begin", "site", owner="patient"), on="stay", how="left"
    ).join(last, on="stay", how="left")
    joined = joined.with_columns(hours=_hours("time"))
    held = []
    for (table,), part in joined.partition_by("table", as_dict=True).items():
        name = str(table)
        kept = tally.split(
            name,
            part,
            ("in no hospital stay of the import", pl.col("stay_id").is_null()),
            ("the stay belongs to another patient", pl.col("owner") != pl.col("patient")),
            ("the stay has no record", pl.col("last").is_null()),
            ("available only after the stay's last record", pl.col("hours") > pl.col("last")),
        )
        held.append(tally.unique(name, kept, ("stay", "hours", *KINDS[kind])))
    own = KINDS[kind]
    return (
        pl.concat(held)
        .select("table", "site", "stay", "stay_id", "hours", *own)
        .sort("stay", "hours", *own)
    )


def _placed_of(frame: pl.DataFrame, records: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """The same for the records that are left."""
    last = records.group_by("stay").agg(last=pl.col("cutoff_hours").max())
    joined = frame.join(last, on="stay", how="left", maintain_order="left")
    seen = (pl.col("hours") <= pl.col("last")).fill_null(False)
    for table, rows in joined.filter(~seen).group_by("table").len().iter_rows():
        tally.skip(table, "no complete record sees it", rows)
    return joined.filter(seen).drop("last")


def _complete(
    records: pl.DataFrame, inputs: Mapping[str, pl.DataFrame], kinds: Sequence[str]
) -> pl.DataFrame:
    """Records that see an input of each kind; events count by their sources."""
    events = inputs.get("events")
    for kind in kinds:
        frame = inputs.get(kind)
        if kind in contract.EVENT_SOURCES and events is not None:
            frame = events.filter(pl.col("source") == kind)
        if frame is None:
            return records.clear()
        earliest = frame.group_by("stay").agg(earliest=pl.col("hours").min())
        records = (
            records.join(earliest, on="stay", how="left", maintain_order="left")
            .filter(pl.col("earliest") <= pl.col("cutoff_hours"))
            .drop("earliest")
        )
    return records


def _as_records(part: pl.DataFrame) -> pl.DataFrame:
    labels = [c for c in part.columns if c.startswith(contract.LABEL_PREFIX)]
    return part.select(
        "record_id",
        pl.col("patient").cast(pl.String).alias("patient_id"),
        "stay_id",
        "cutoff_hours",
        "age",
        "sex",
        *labels,
    )


def _hours(column: str) -> pl.Expr:
    """Hours since the stay's begin, one formula for inputs and cutoffs."""
    return (pl.col(column) - pl.col("begin")).dt.total_microseconds() / 3.6e9


class _SiteWriter:
    """One shard in the making, piece by piece, each of them whole patients.

    It holds itself to the contract: stays and patients never straddle pieces, so that what
    `contract` finds nothing wrong with here, it finds nothing wrong with in the whole shard.
    """

    def __init__(self, folder: Path, copy_images: bool) -> None:
        self.folder, self._copy = folder, copy_images
        folder.mkdir(parents=True)
        self._files: dict[str, pq.ParquetWriter] = {}

    def add(self, records: pl.DataFrame, inputs: Mapping[str, pl.DataFrame]) -> None:
        self._append("records", records, contract.check_records)
        for table, frame in inputs.items():
            if frame.height:
                check = partial(contract.check_inputs, table, stays=records["stay_id"])
                self._append(table, frame, check)
                if table == "images":  # now no path leads out of the shard
                    self._place_images(frame)

    def _append(
        self, table: str, frame: pl.DataFrame, check: Callable[..., Iterator[ShardError]]
    ) -> None:
        whole = contract.normalise(table, frame)
        for problem in check(whole, file=f"{table}.parquet"):
            raise problem
        rows = whole.to_arrow(compat_level=pl.CompatLevel.oldest())
        if table not in self._files:
            path = self.folder / f"{table}.parquet"
            self._files[table] = pq.ParquetWriter(path, rows.schema, compression="zstd")
        self._files[table].write_table(rows)

    def finish(self, meta: Mapping[str, Any], story: Mapping[str, Any]) -> None:
        for file in self._files.values():
            file.close()
        (self.folder / META).write_text(tomli_w.dumps(dict(meta)), encoding="utf-8")
        (self.folder / _STORY).write_text(
            json.dumps(story, indent=1, ensure_ascii=False), encoding="utf-8"
        )

    def _place_images(self, frame: pl.DataFrame) -> None:
        put: Callable[[str, Path], Any] = shutil.copyfile if self._copy else os.symlink
        for path, file in frame.select("path", "file").unique().iter_rows():
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            put(file, target)


def _reasons(tally: Tally) -> str:
    reasons = [
        f"{rows:,} of {name} {reason}"
        for name, table in tally.tables.items()
        for reason, rows in table.skipped.most_common(2)
    ]
    return "; ".join(reasons[:8])


def _check_replaceable(dest: Path, overwrite: bool) -> None:
    """Raises ShardError unless `overwrite`, and nothing would be lost but what imports made."""
    if not overwrite:
        raise ShardError(f"{dest} exists already", cure="choose another folder, or --overwrite it")
    whole = not dest.is_dir() or (dest / META).is_file()
    for folder in [dest] if whole else sorted(dest.iterdir()):
        if not (folder / META).is_file():
            raise ShardError(
                f"{dest} holds something that is no shard: {folder.name}",
                cure="choose another folder",
            )
        if not (folder / _STORY).is_file():
            raise ShardError(
                f"{folder} was not made by an import: it has no {_STORY}",
                cure="choose another folder",
            )
        if added := sorted({entry.name for entry in folder.iterdir()} - _MADE):
            raise ShardError(
                f"{folder / added[0]} was not made by an import, and would be lost",
                cure="move it elsewhere, or choose another folder",
            )

"""Hospitals as one: what pooled training would have, for comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from client.site.shard import Shard, write_shard
from client.site.shard.shard import replace_folder

Split = Callable[[str, str], bool]
"""Whether a patient (hospital, patient_id) validates."""

_INPUTS = ("events", "images", "notes", "embeddings")


def with_split(path: Path, dest: Path, validates: Split) -> Path:
    """A shard that names each patient's population, so that another federation of the same
    patients can hold out the same ones."""
    return _write([Shard.open(path)], dest, Shard.open(path).hospital, validates, prefixed=False)


def merge(shards: Mapping[str, Path], dest: Path, name: str, validates: Split) -> Path:
    """One shard with the patients of all hospitals; ids get the hospital's name in front.

    Labels that a hospital does not have are unknown there.
    """
    opened = [Shard.open(path) for path in shards.values()]
    return _write(opened, dest, name, validates, prefixed=True)


def _write(shards: list[Shard], dest: Path, name: str, validates: Split, *, prefixed: bool) -> Path:
    tables: dict[str, list[pl.DataFrame]] = {"records": [], **{t: [] for t in _INPUTS}}
    for shard in shards:
        hospital = shard.hospital
        held_out = [validates(hospital, p) for p in shard.records["patient_id"]]
        named = pl.when(pl.Series(held_out)).then(pl.lit("validation")).otherwise(pl.lit("train"))
        records = shard.records.with_columns(population=named)
        tables["records"].append(_prefixed(records, hospital) if prefixed else records)
        for table in _INPUTS:
            frame: pl.DataFrame | None = getattr(shard, table)
            if frame is None:
                continue
            tables[table].append(_prefixed(frame, hospital) if prefixed else frame)
    whole = {
        table: pl.concat(frames, how="diagonal_relaxed")
        for table, frames in tables.items()
        if frames
    }
    with at_once(dest) as making:
        write_shard(
            making,
            meta={**shards[0].meta, "name": name, "hospital": name},
            records=whole["records"],
            events=whole.get("events"),
            images=whole.get("images"),
            notes=whole.get("notes"),
            embeddings=whole.get("embeddings"),
            overwrite=True,
        )
        for shard in shards:
            if shard.images is not None:
                for path in shard.images["path"].unique():
                    target = making / (f"{shard.hospital}/{path}" if prefixed else path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to((shard.path / path).resolve())
    return dest


@contextmanager
def at_once(dest: Path) -> Iterator[Path]:
    """A folder to fill; it comes to `dest` when it is whole, in place of what lies there."""
    making = dest.with_name(f".{dest.name}.making")
    shutil.rmtree(making, ignore_errors=True)  # of one that was cut off
    making.mkdir(parents=True)
    yield making
    replace_folder(making, dest)


def _prefixed(frame: pl.DataFrame, hospital: str) -> pl.DataFrame:
    ids = [c for c in ("record_id", "patient_id", "stay_id", "path") if c in frame.columns]
    return frame.with_columns(pl.format(f"{hospital}/{{}}", c).alias(c) for c in ids)

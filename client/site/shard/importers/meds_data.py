"""The files of a MEDS data set: checked against the schemas of the package `meds`, read in batches.

Files need be neither sorted nor hold whole patients, which MEDS asks for but this import can do
without.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import meds
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from flexible_schema import SchemaValidationError, TableValidationError

from client.site.shard.importers.tables import Progress
from client.site.shard.importers.tally import Tally
from common.errors import ShardError

_BATCH_ROWS, _BATCH_TEXTS = 1 << 19, 1 << 15
_TYPES = {
    "subject_id": pl.Int64(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "numeric_value": pl.Float64(),
    "text_value": pl.String(),
}
COLUMNS = tuple(_TYPES)
"""Of the table of events."""


class MedsData:
    """A data set without the patients who object.

    Args:
        root: Folder with `data` and `metadata`.
        objectors: Their subject_id.

    Attributes:
        size: Bytes of all data files.
        metadata: What metadata/dataset.json says; empty without it.

    Raises:
        ShardError: This is no MEDS data set, or a file breaks its schema or cannot be read.
    """

    def __init__(self, root: Path, objectors: Collection[int], progress: Progress) -> None:
        for folder in (root / meds.data_subdirectory, root / "metadata"):
            if not folder.is_dir():
                raise ShardError(
                    f"{root} is no MEDS data set: it has no folder {folder.name}",
                    cure="give the folder that holds data and metadata",
                )
        self._files = sorted((root / meds.data_subdirectory).rglob("*.parquet"))
        if not self._files:
            raise ShardError(
                f"{root / meds.data_subdirectory} holds no parquet file",
                cure="give the folder of a MEDS data set whose data are there",
            )
        for file in self._files:
            with _reading(file):
                _check_schema(file, pq.read_schema(file))
        self.metadata = _read_metadata(root / meds.dataset_metadata_filepath)
        self.size = sum(file.stat().st_size for file in self._files)
        self._objectors = pl.Series(sorted(objectors), dtype=pl.Int64)
        self._progress = progress

    def vocabulary(self, tally: Tally) -> pl.DataFrame:
        """Columns code (may be null) and rows, of patients who may be imported.

        Raises:
            ShardError: There are no events.
        """
        subject = pl.col("subject_id")
        counts = pl.DataFrame(schema={"code": pl.String})
        for batch in self._read("codes", ("subject_id", "code")):
            part = batch.group_by("code").agg(
                all=pl.len().cast(pl.Int64),
                nobody=subject.null_count().cast(pl.Int64),
                objects=subject.is_in(self._objectors.implode()).sum().cast(pl.Int64),
            )
            both = pl.concat([counts, part], how="diagonal")
            counts = both.group_by("code").agg(pl.all().sum())
        if counts.is_empty():
            raise ShardError("the data files hold no events", cure="give a data set that has some")
        tally["data"].rows += int(counts["all"].sum())
        tally.skip("data", "no subject_id", int(counts["nobody"].sum()))
        tally.skip("data", "the patient objects", int(counts["objects"].sum()))
        rows = pl.col("all") - pl.col("nobody") - pl.col("objects")
        return counts.select("code", rows=rows).filter(pl.col("rows") > 0)

    def rows(self, what: str, codes: pl.Series, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Rows with these codes that have a subject, in batches; subject_id is called patient.

        Args:
            what: For the progress.
        """
        subject = pl.col("subject_id")
        imported = subject.is_not_null() & ~subject.is_in(self._objectors.implode())
        # A text of a batch keeps the texts of the whole batch in memory: take these instead.
        wanted = pl.DataFrame({"code": codes.unique()}).with_columns(held="code")
        for batch in self._read(what, columns):
            found = batch.filter(imported).join(wanted, on="code", maintain_order="left")
            yield found.drop("code").rename({"held": "code", "subject_id": "patient"})

    def _read(self, what: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Batches of all files; a column that a file lacks is null."""
        done, most = 0, _BATCH_TEXTS if "text_value" in columns else _BATCH_ROWS
        for file in self._files:
            size, seen = file.stat().st_size, 0
            with _reading(file), pq.ParquetFile(file) as parquet:
                there = [name for name in columns if name in parquet.schema_arrow.names]
                for batch in parquet.iter_batches(most, columns=there):
                    frame = pl.DataFrame(pa.Table.from_batches([batch]))
                    yield frame.select(
                        (pl.col(name) if name in there else pl.lit(None)).cast(_TYPES[name])
                        for name in columns
                    )
                    seen += batch.num_rows
                    self._progress(what, done + size * seen // parquet.metadata.num_rows, self.size)
            done += size
            self._progress(what, done, self.size)


def _check_schema(file: Path, schema: pa.Schema) -> None:
    """Columns and types of `DataSchema`; other widths and encodings of the same kind are read."""
    same = pa.schema([pa.field(f.name, _plain_type(f.name, f.type)) for f in schema])
    try:
        meds.DataSchema.validate(same)
    except SchemaValidationError as error:
        raise ShardError(
            f"{file}: {error.message}", cure="write the table as MEDS' DataSchema asks"
        ) from None


def _plain_type(name: str, given: pa.DataType) -> pa.DataType:
    """MEDS' own type of a column where a value of type `given` becomes it unchanged in meaning."""
    wanted = {c: meds.DataSchema.column_type(c) for c in meds.DataSchema.columns()}.get(name)
    value = given.value_type if pa.types.is_dictionary(given) else given
    kinds = pa.types.is_integer, pa.types.is_floating, _is_text, _is_local_time
    if wanted is not None and any(kind(wanted) and kind(value) for kind in kinds):
        return wanted
    if pa.types.is_null(given) and name in meds.DataSchema.optional_columns():
        return wanted
    return given


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_local_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) and kind.tz is None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise ShardError(
            f"{file} cannot be read ({str(error).splitlines()[0]})",
            cure="copy or download it again",
        ) from None


def _read_metadata(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        meds.DatasetMetadataSchema.validate(found)
    except (OSError, ValueError, TypeError, TableValidationError) as error:
        why = getattr(error.__cause__, "message", error)
        raise ShardError(
            f"{file}: {why}", cure="write it as MEDS' DatasetMetadataSchema asks, or remove it"
        ) from None
    return found

"""The shard contract: which tables and columns a hospital writes, and what may stand in them.

Every check yields a `ShardError` that names file, row (counting from 0, as the table lies on disk)
and cure. Times decide what a record may see, so a time that is missing or not finite is an error
and never "always visible".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import polars as pl

from common.errors import ShardError

Kind = Literal["text", "number", "vector", "flag"]


@dataclass(frozen=True)
class Column:
    """A column of a table: what it holds and whether a row may leave it empty."""

    name: str
    kind: Kind = "text"
    nullable: bool = False


_STAY_AND_TIME = (Column("stay_id"), Column("hours", "number"))
TABLES: dict[str, tuple[Column, ...]] = {
    "records": (
        Column("record_id"),
        Column("patient_id"),
        Column("stay_id"),
        Column("cutoff_hours", "number"),
        Column("age", "number", nullable=True),
        Column("sex", nullable=True),
    ),
    "events": (
        *_STAY_AND_TIME,
        Column("source"),
        Column("series"),
        Column("value", "number", nullable=True),
    ),
    "images": (*_STAY_AND_TIME, Column("path"), Column("view", nullable=True)),
    "notes": (*_STAY_AND_TIME, Column("category", nullable=True), Column("text")),
    "embeddings": (*_STAY_AND_TIME, Column("source"), Column("vector", "vector")),
}
"""Tables of a shard with their columns. All but `records` may be absent; other columns are
ignored. `records` also holds one nullable boolean `y_<task>` per task and may hold `population`."""

EVENT_SOURCES = ("chart", "lab", "procedure")
POPULATIONS = ("train", "validation")
LABEL_PREFIX = "y_"
MAX_AGE_YEARS = 130.0

_TARGET: dict[Kind, pl.DataType | type[pl.DataType]] = {
    "text": pl.String,
    "number": pl.Float64,
    "vector": pl.List(pl.Float32),
    "flag": pl.Boolean,
}
_WORDS = {
    "text": "text",
    "number": "a number",
    "vector": "a list of numbers",
    "flag": "boolean (true, false or null)",
}


def columns_of(table: str, frame: pl.DataFrame) -> tuple[Column, ...]:
    """The contract's columns for this table, with the label columns that `frame` brings."""
    if table != "records":
        return TABLES[table]
    labels = tuple(
        Column(name, "flag", nullable=True)
        for name in frame.columns
        if name.startswith(LABEL_PREFIX)
    )
    optional = (Column("population"),) if "population" in frame.columns else ()
    return (*TABLES[table], *optional, *labels)


def check_form(table: str, frame: pl.DataFrame, file: str) -> Iterator[ShardError]:
    """Columns and types. While this yields anything, `normalise` cannot be called."""
    for column in columns_of(table, frame):
        if column.name not in frame.columns:
            yield ShardError(
                f"{file}: no column '{column.name}'",
                cure=f"add it ({_WORDS[column.kind]}); the table has {', '.join(frame.columns)}",
            )
        elif not _fits(frame.schema[column.name], column):
            yield ShardError(
                f"{file}: column '{column.name}' is {frame.schema[column.name]}, "
                f"not {_WORDS[column.kind]}",
                cure=f"write it as {_TARGET[column.kind]}",
            )
    if table == "records" and not any(name.startswith(LABEL_PREFIX) for name in frame.columns):
        yield ShardError(
            f"{file}: no label column", cure="add a nullable boolean column y_<task> per task"
        )


def normalise(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The contract's columns in the contract's types, in the contract's order."""
    return frame.select(
        pl.col(column.name).cast(_TARGET[column.kind]) for column in columns_of(table, frame)
    )


def check_records(records: pl.DataFrame, file: str) -> Iterator[ShardError]:
    """Rules of the table `records`, normalised."""
    if records.is_empty():
        yield ShardError(f"{file}: no records", cure="a hospital has at least one record")
        return
    yield from _check_cells("records", records, file)
    cutoff, age = pl.col("cutoff_hours"), pl.col("age")
    yield from _rows(
        records,
        ~cutoff.is_finite() | (cutoff < 0),
        file,
        "cutoff_hours is {cutoff_hours}: not a time of 0 h or more",
        "give the hours since the stay began up to which inputs may be seen",
    )
    yield from _rows(
        records,
        ~age.is_between(0, MAX_AGE_YEARS),
        file,
        "age is {age}",
        f"give years from 0 to {MAX_AGE_YEARS:g}, or null",
    )
    yield from _rows(
        records,
        pl.col("record_id").is_duplicated(),
        file,
        "record_id '{record_id}' is given twice",
        "give every record its own id, or remove the second one",
        skip=pl.col("record_id").is_first_distinct(),
    )
    yield from _check_owners(records, file)


def _check_owners(records: pl.DataFrame, file: str) -> Iterator[ShardError]:
    """A stay has one patient, and a patient one population: they are what privacy counts."""
    first_owner = pl.col("patient_id").first().over("stay_id")
    yield from _rows(
        records.with_columns(owner=first_owner),
        pl.col("patient_id") != pl.col("owner"),
        file,
        "stay '{stay_id}' belongs to patient '{patient_id}' here and to '{owner}' above: "
        "one person would count as two, and could train and validate at once",
        "give the stay to one patient",
    )
    if "population" not in records.columns:
        return
    yield from _rows(
        records,
        ~pl.col("population").is_in(POPULATIONS),
        file,
        "population is '{population}'",
        f"write one of {', '.join(POPULATIONS)}, or leave the column out",
    )
    yield from _rows(
        records.with_columns(other=pl.col("population").first().over("patient_id")),
        pl.col("population") != pl.col("other"),
        file,
        "patient '{patient_id}' is in population '{population}' here and in '{other}' above",
        "put all records of a patient into one population",
    )


def check_inputs(
    table: str, frame: pl.DataFrame, stays: pl.Series, file: str
) -> Iterator[ShardError]:
    """Rules of a normalised table of inputs.

    Args:
        stays: The stays that `records` names.
    """
    yield from _check_cells(table, frame, file)
    yield from _rows(
        frame,
        ~pl.col("hours").is_finite(),
        file,
        "hours is {hours}",
        "give the hours since the stay began at which this became available",
    )
    yield from _rows(
        frame,
        ~pl.col("stay_id").is_in(stays.unique().implode()),
        file,
        "stay '{stay_id}' is not in records.parquet",
        "remove the row, or add the stay's record",
    )
    if table == "events":
        yield from _rows(
            frame,
            ~pl.col("source").is_in(EVENT_SOURCES),
            file,
            "source is '{source}'",
            f"use one of {', '.join(EVENT_SOURCES)}",
        )
    if table == "images":
        path = pl.col("path")
        yield from _rows(
            frame,
            path.str.starts_with("/") | path.str.contains(r"(^|[\\/])\.\.([\\/]|$)"),
            file,
            "path '{path}' leads out of the shard",
            "give a path relative to the shard's folder",
        )
    if table == "embeddings":
        yield from _check_vectors(frame, file)
    # Hashes first: they settle the usual case of no duplicate in a fraction of the time.
    if frame.hash_rows().n_unique() < frame.height:
        yield from _rows(
            frame,
            ~pl.struct(pl.all()).is_first_distinct(),
            file,
            "the same as an earlier row (stay '{stay_id}', hour {hours})",
            "remove the copy; an entry given twice would count twice",
        )


def _check_vectors(frame: pl.DataFrame, file: str) -> Iterator[ShardError]:
    vectors = frame.with_columns(
        width=pl.col("vector").list.len(),
        expected=pl.col("vector").list.len().first().over("source"),
    )
    yield from _rows(
        vectors,
        (pl.col("width") != pl.col("expected")) | (pl.col("width") == 0),
        file,
        "the vector of source '{source}' has {width} numbers, the first one has {expected}",
        "encode a source with one model only",
    )
    finite = pl.col("vector").list.eval(pl.element().is_finite().fill_null(False)).list.all()
    yield from _rows(
        vectors, ~finite, file, "the vector holds a number that is not finite", "encode it again"
    )


def _check_cells(table: str, frame: pl.DataFrame, file: str) -> Iterator[ShardError]:
    """Empty cells where the contract wants a value; empty text is no identifier."""
    for column in columns_of(table, frame):
        if column.nullable:
            continue
        bad = pl.col(column.name).is_null()
        if column.kind == "text" and column.name != "text":
            bad = bad | (pl.col(column.name) == "")
        yield from _rows(
            frame, bad, file, f"'{column.name}' is empty", "fill it in, or remove the row"
        )


def _rows(
    frame: pl.DataFrame,
    bad: pl.Expr,
    file: str,
    message: str,
    cure: str,
    *,
    skip: pl.Expr | None = None,
) -> Iterator[ShardError]:
    """One error for the first row where `bad` holds (null does not), and the number of others."""
    condition = bad.fill_null(False)
    if skip is not None:
        condition = condition & ~skip
    mask = frame.select(condition.alias("bad"))["bad"]
    if not mask.any():
        return
    found = frame.with_row_index("row").filter(mask)
    row = found.row(0, named=True)
    more = f" (and {found.height - 1} more rows)" if found.height > 1 else ""
    yield ShardError(f"{file}, row {row['row']}: {message.format(**row)}{more}", cure=cure)


def _fits(dtype: pl.DataType, column: Column) -> bool:
    if column.nullable and dtype == pl.Null:
        return True
    if column.kind == "text":
        return dtype in (pl.String, pl.Categorical) or isinstance(dtype, pl.Enum)
    if column.kind == "number":
        return dtype.is_numeric()
    if column.kind == "vector":
        return isinstance(dtype, pl.List | pl.Array) and dtype.inner.is_numeric()
    return dtype == pl.Boolean

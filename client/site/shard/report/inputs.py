"""A shard's inputs as one table, and what each record sees of them, without any identifier.

Records, stays and patients are numbers here. So nothing computed from these tables can carry an
identifier into the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from client.site.shard.contract import EVENT_SOURCES, LABEL_PREFIX
from client.site.shard.shard import Shard

SOURCES = (*EVENT_SOURCES, "image", "note", "embedding")
"""Where inputs come from, in the page's order."""


@dataclass(frozen=True)
class Inputs:
    """Who sees what.

    An **item** is one stream of inputs: a series, the images of a view, the notes of a category,
    the embeddings of a source.

    Attributes:
        tasks: Names of the labels.
        records: One row per record: record, stay, patient (numbers), cutoff, age, sex and the
            labels `y_<task>`.
        items: item (number), source, name.
        table: One row per input that may be read: stay, item, hours, value (events only). Events
            without a finite value are left out, as every encoder does.
        skipped: How many those are, per source.
    """

    tasks: tuple[str, ...]
    records: pl.DataFrame
    items: pl.DataFrame
    table: pl.DataFrame
    skipped: Mapping[str, int]

    @classmethod
    def of(cls, shard: Shard) -> Inputs:
        records = shard.records.select(
            record=pl.int_range(pl.len(), dtype=pl.UInt32),
            stay=pl.col("stay_id").rank("dense").cast(pl.UInt32),
            patient=pl.col("patient_id").rank("dense").cast(pl.UInt32),
            cutoff="cutoff_hours",
            age="age",
            sex="sex",
            stay_id="stay_id",
            **{LABEL_PREFIX + task: pl.col(LABEL_PREFIX + task) for task in shard.tasks},
        )
        stays = records.select("stay_id", "stay").unique()
        streams = list(_streams(shard))
        long = pl.concat(streams) if streams else _EMPTY
        readable = ~pl.col("source").is_in(EVENT_SOURCES) | pl.col("value").is_finite().fill_null(
            False
        )
        skipped = dict(long.filter(~readable)["source"].value_counts().iter_rows())
        long = long.filter(readable)
        items = (
            long.select("source", "name")
            .unique()
            .sort(pl.col("source").replace_strict(SOURCES, range(len(SOURCES))), "name")
            .with_row_index("item")
        )
        table = (
            long.join(stays, on="stay_id")
            .join(items, on=["source", "name"])
            .select("stay", "item", "hours", "value")
            .sort("hours", "value")
        )
        return cls(shard.tasks, records.drop("stay_id"), items, table, skipped)

    @cached_property
    def seen(self) -> pl.DataFrame:
        """What records see: one row per record and item with hours <= cutoff.

        Columns record, item and value: the last one at or before the cutoff (of several at one
        hour the largest), null where the item has no values.
        """
        pairs = self.records.select("record", "stay", "cutoff").join(
            self.table.select("stay", "item").unique(), on="stay"
        )
        found = pairs.sort("cutoff").join_asof(
            self.table.with_columns(at="hours"),
            left_on="cutoff",
            right_on="hours",
            by=["stay", "item"],
            check_sortedness=False,
        )
        return found.filter(pl.col("at").is_not_null()).select("record", "item", "value")

    @cached_property
    def n_seen(self) -> pl.Series:
        """How many inputs each record sees, in the order of `records`."""
        counted = self.table.select(
            "stay", "hours", n=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("stay")
        )
        found = (
            self.records.select("record", "stay", "cutoff")
            .sort("cutoff")
            .join_asof(
                counted, left_on="cutoff", right_on="hours", by="stay", check_sortedness=False
            )
        )
        return found.sort("record")["n"].fill_null(0)

    @cached_property
    def last_cutoff(self) -> pl.DataFrame:
        """stay, cutoff: the latest one. What comes after it is never read."""
        return self.records.group_by("stay").agg(pl.col("cutoff").max())

    def known(self, task: str) -> pl.DataFrame:
        """record, patient, label of the records whose label is known."""
        return self.records.select(
            "record", "patient", label=pl.col(LABEL_PREFIX + task)
        ).drop_nulls("label")


_EMPTY = pl.DataFrame(
    schema={
        "stay_id": pl.String,
        "source": pl.String,
        "name": pl.String,
        "hours": pl.Float64,
        "value": pl.Float64,
    }
)


def _streams(shard: Shard) -> Iterator[pl.DataFrame]:
    """The shard's input tables in the form of `_EMPTY`."""
    names = {
        "image": (shard.images, pl.col("view").fill_null("no view")),
        "note": (shard.notes, pl.col("category").fill_null("no category")),
        "embedding": (shard.embeddings, pl.col("source")),
    }
    if shard.events is not None:
        yield shard.events.select("stay_id", "source", "hours", "value", name="series").select(
            _EMPTY.columns
        )
    for source, (frame, name) in names.items():
        if frame is not None:
            yield frame.select(
                "stay_id",
                "hours",
                source=pl.lit(source),
                name=name,
                value=pl.lit(None, dtype=pl.Float64),
            ).select(_EMPTY.columns)

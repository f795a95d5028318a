"""What the notes are: how many, how long, empty, repeated. Their text never leaves this module."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from client.site.shard.report.facts import Histogram, Spread, histogram, spread
from client.site.shard.shard import Shard

REPEATED_FROM = 40
"""Characters below which an equal text is no surprise ("No change.")."""


@dataclass(frozen=True)
class Category:
    """Notes of one category; lengths in words."""

    name: str
    n: int
    empty: int
    words: Spread


@dataclass(frozen=True)
class Texts:
    """The notes of a shard.

    Attributes:
        characters, words: Lengths.
        lengths: log10 of the characters of notes that are not empty.
        empty: Notes of white space only.
        repeated: Notes of 40 characters or more whose text an earlier row has.
        across_patients: Such texts that stand with more than one patient.
    """

    n: int
    characters: Spread
    words: Spread
    lengths: Histogram
    empty: int
    repeated: int
    across_patients: int
    categories: tuple[Category, ...]


def texts(shard: Shard) -> Texts | None:
    """None for a shard without notes."""
    if shard.notes is None or shard.notes.is_empty():
        return None
    owner = shard.records.select("stay_id", "patient_id").unique()
    text = pl.col("text").str.strip_chars()
    notes = shard.notes.join(owner, on="stay_id", how="left").select(
        patient="patient_id",
        category=pl.col("category").fill_null("no category"),
        characters=text.str.len_chars(),
        words=text.str.count_matches(r"\S+"),
        digest=text.hash(),
    )
    long = notes.filter(pl.col("characters") >= REPEATED_FROM)
    owners = long.group_by("digest").agg(pl.col("patient").n_unique())
    return Texts(
        n=notes.height,
        characters=spread(notes["characters"], 0.01, 0.99),
        words=spread(notes["words"], 0.01, 0.99),
        lengths=histogram(notes.filter(pl.col("characters") > 0)["characters"].log(10), 30),
        empty=int((notes["characters"] == 0).sum()),
        repeated=long.height - owners.height,
        across_patients=int((owners["patient"] > 1).sum()),
        categories=tuple(
            Category(
                name=str(name),
                n=group.height,
                empty=int((group["characters"] == 0).sum()),
                words=spread(group["words"], 0.01, 0.99),
            )
            for (name,), group in sorted(
                notes.partition_by("category", as_dict=True).items(), key=lambda g: -g[1].height
            )
        ),
    )

"""What an import read, kept and left out, and why: nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl


@dataclass
class TableTally:
    """Counts of one table of the source.

    Attributes:
        file: Its name, for the person who imports.
        rows: Rows read.
        kept: Rows that stand in the shards as inputs.
        skipped: Rows left out, by reason; they and `kept` sum to `rows`.
        noted: Rows that were kept, but not as they stand (a unit converted, a time mended).
    """

    file: str = ""
    rows: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


class Tally:
    """Counts of all tables, and remarks about the source as a whole."""

    def __init__(self) -> None:
        self.tables: dict[str, TableTally] = {}
        self.remarks: list[str] = []

    def __getitem__(self, table: str) -> TableTally:
        return self.tables.setdefault(table, TableTally())

    def skip(self, table: str, reason: str, rows: int) -> None:
        if rows:
            self[table].skipped[reason] += rows

    def note(self, table: str, what: str, rows: int) -> None:
        if rows:
            self[table].noted[what] += rows

    def split(self, table: str, frame: pl.DataFrame, *rules: tuple[str, pl.Expr]) -> pl.DataFrame:
        """Rows for which no rule holds; the others are counted under the first one that does.

        Args:
            rules: Reason, and when it holds (null does not).
        """
        for reason, bad in rules:
            held = frame.filter(~bad.fill_null(False))
            self.skip(table, reason, frame.height - held.height)
            frame = held
        return frame

    def unique(self, table: str, frame: pl.DataFrame, columns: Iterable[str]) -> pl.DataFrame:
        """The first of rows that agree in `columns`; copies are counted."""
        held = frame.unique(list(columns), keep="first", maintain_order=True)
        self.skip(table, "given twice", frame.height - held.height)
        return held

    def as_dict(self) -> dict[str, Any]:
        """For import.json: tables as a list, counters as plain mappings, largest first."""
        return {
            "tables": [
                {
                    "table": name,
                    "file": tally.file,
                    "rows": tally.rows,
                    "kept": tally.kept,
                    "skipped": dict(tally.skipped.most_common()),
                    "noted": dict(tally.noted.most_common()),
                }
                for name, tally in self.tables.items()
            ],
            "remarks": self.remarks,
        }

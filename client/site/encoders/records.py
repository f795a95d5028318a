"""Encoders that read tables: statistics of series, demographics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.site.encoders import series
from client.site.encoders.encoder import Embedding, file_digest, fingerprint
from client.site.shard import Shard, clinical
from common.study import unknown


class SeriesStatistics:
    """Eleven bounded statistics and a presence flag per series; see `series.statistics`.

    Args:
        names: Canonical series. A source may mix chart, lab and procedure series: those of one kind
            then stand together, kinds in the order in which they first appear.
    """

    tokens = 1

    def __init__(self, names: Sequence[str]) -> None:
        kinds = {name: kind for kind, name in clinical.SERIES}
        for name in names:
            if name not in kinds:
                raise unknown("series", name, kinds, cure="docs/shard.md lists the series")
        self._groups: dict[str, list[str]] = {}
        for name in names:
            self._groups.setdefault(kinds[name], []).append(name)
        self.dim = sum(series.dimension(len(group)) for group in self._groups.values())
        self.fingerprint = fingerprint(SeriesStatistics, series, clinical, groups=self._groups)
        self.description = (
            f"series-statistics: 11 statistics and presence of {len(names)} series, {self.dim} "
            "numbers; scaled by public clinical constants"
        )

    def encode_records(
        self, shard: Shard, records: pl.DataFrame
    ) -> tuple[Embedding, NDArray[np.bool_]]:
        if shard.events is None:
            absent = np.zeros((records.height, self.dim), dtype=np.float32)
            return absent, np.zeros(records.height, dtype=bool)
        parts = [
            series.statistics(shard.events, records, kind, group)
            for kind, group in self._groups.items()
        ]
        present = np.logical_or.reduce([present for _, present in parts])
        return np.concatenate([x for x, _ in parts], axis=1), present

    def input_digest(self, shard: Shard) -> str:
        return _digest(shard, "events", "records")


class Demographics:
    """Age and sex; see `series.demographics`."""

    tokens = 1
    dim = len(series.DEMOGRAPHICS)

    def __init__(self) -> None:
        self.fingerprint = fingerprint(Demographics, series, clinical)
        self.description = (
            f"demographics: age and sex, {self.dim} numbers; scaled by public clinical constants"
        )

    def encode_records(
        self, shard: Shard, records: pl.DataFrame
    ) -> tuple[Embedding, NDArray[np.bool_]]:
        return series.demographics(records)

    def input_digest(self, shard: Shard) -> str:
        return _digest(shard, "records")


def _digest(shard: Shard, *tables: str) -> str:
    files = [shard.path / f"{table}.parquet" for table in tables]
    digests = file_digest(file for file in files if file.is_file())
    return fingerprint(tables=digests)

"""Encoded records of one population of one hospital, ready to be trained or scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Records as tensors, with the map from patients to their records.

    Attributes:
        rows_of_patient: For each patient the numbers of their records, int64. Every record belongs
            to exactly one patient: the unit of privacy.
        inputs: source -> [N, T_source, d_source] float32; zero where absent.
        present: source -> [N, T_source] bool; False where the token is missing or padding.
        labels: [N, K] int8; 1 true, 0 false, -1 unknown.
        record_ids: N identifiers, which never leave the hospital.
    """

    rows_of_patient: list[np.ndarray]
    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: Tensor
    record_ids: list[str]

    @property
    def n_patients(self) -> int:
        return len(self.rows_of_patient)

    @property
    def n_records(self) -> int:
        return len(self.record_ids)

    def subset(self, patients: Sequence[int] | np.ndarray) -> Dataset:
        """The records of these patients only, renumbered; tensors are copied, order is kept."""
        chosen = [self.rows_of_patient[int(p)] for p in patients]
        rows = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        bounds = np.cumsum([0, *(len(c) for c in chosen)])
        return Dataset(
            rows_of_patient=[
                np.arange(start, end, dtype=np.int64) for start, end in pairwise(bounds)
            ],
            inputs={source: x[rows] for source, x in self.inputs.items()},
            present={source: m[rows] for source, m in self.present.items()},
            labels=self.labels[rows],
            record_ids=[self.record_ids[row] for row in rows],
        )

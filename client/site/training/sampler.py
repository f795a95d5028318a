"""Which patients enter a step, which of their records, and in which rows of the model's batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.site.encoders.dataset import Dataset
from client.site.training.entropy import Entropy


@dataclass(frozen=True)
class MicroBatch:
    """Patients of one forward pass, k rows each.

    Attributes:
        rows: [P, k] int64, record numbers; -1 in the rows of a dummy patient. A patient with fewer
            than k records repeats the first of them with weight 0.
        weights: [P, k] float64, 1 / (number of the patient's records chosen), or 0.
        valid: [P] bool, False for dummy patients.
    """

    rows: Tensor
    weights: Tensor
    valid: Tensor

    def gather(
        self, dataset: Dataset, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """inputs, present and labels of the P·k rows on `device`; a dummy row has zero inputs, all
        present, and labels 0: harmless in any loss, and no patient's."""
        rows = self.rows.flatten()
        real = rows >= 0
        whole = bool(real.all())
        chosen = rows if whole else rows[real]

        def take(values: Tensor, filler: float) -> Tensor:
            some = values[chosen]
            if not whole:
                padded = values.new_full((len(rows), *values.shape[1:]), filler)
                padded[real] = some
                some = padded
            return some.to(device)

        return (
            {source: take(x, 0) for source, x in dataset.inputs.items()},
            {source: take(m, True) for source, m in dataset.present.items()},
            take(dataset.labels, 0),
        )


class PatientSampler:
    """Poisson sampling of patients, then up to k of each one's records without replacement.

    Sampling records, or stays, instead would let a patient with 8 of them move the sum by 6.5·C
    (measured). A sample is never truncated: it is cut into micro-batches.

    Args:
        rows_of_patient: Record numbers of each patient.
        sample_rate: q.
        records_per_patient: k.
        entropy: Draws from `entropy.patients` and `entropy.records`.
    """

    def __init__(
        self,
        rows_of_patient: Sequence[np.ndarray],
        sample_rate: float,
        records_per_patient: int,
        entropy: Entropy,
    ) -> None:
        self._rows = rows_of_patient
        self._rate = sample_rate
        self._most = records_per_patient
        self._entropy = entropy

    def draw(self) -> list[np.ndarray]:
        """The record numbers chosen of each patient of one step; possibly no patient at all."""
        drawn = np.flatnonzero(self._entropy.patients.uniforms(len(self._rows)) <= self._rate)
        chosen = []
        for patient in drawn:
            rows = self._rows[int(patient)]
            if len(rows) > self._most:
                keys = self._entropy.records.uniforms(len(rows))
                rows = rows[np.argsort(keys)[: self._most]]
            if len(rows):
                chosen.append(rows)
        return chosen

    def pack(
        self, chosen: Sequence[np.ndarray], micro_batch: int, *, pad: bool
    ) -> Iterator[MicroBatch]:
        """Micro-batches that hold every chosen record once.

        Args:
            chosen: A draw.
            micro_batch: Patients per micro-batch.
            pad: Fill the last one with dummy patients, and make one of dummies alone from an empty
                draw: the shape then says nothing, and no row's result depends on it.
        """
        for start in range(0, max(len(chosen), int(pad)), micro_batch):
            some = chosen[start : start + micro_batch]
            patients = micro_batch if pad else len(some)
            rows = np.full((patients, self._most), -1, dtype=np.int64)
            weights = np.zeros((patients, self._most))
            for slot, records in enumerate(some):
                rows[slot] = records[0]
                rows[slot, : len(records)] = records
                weights[slot, : len(records)] = 1 / len(records)
            yield MicroBatch(
                rows=torch.from_numpy(rows),
                weights=torch.from_numpy(weights),
                valid=torch.arange(patients) < len(some),
            )

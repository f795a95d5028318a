"""Made-up patients for the attack. None of them resembles anybody; each is there to be found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from client.site.encoders.dataset import Dataset

SOURCES = {"scan": (1, 2048), "notes": (3, 48)}  # name -> tokens, features
TASKS = 16


def ordinary(patients: int, seed: int, most_records: int = 5) -> Dataset:
    """Patients of 1 to `most_records` records, some without a source, some with unknown labels."""
    some = torch.Generator().manual_seed(seed)
    counts = [1 + p % most_records for p in range(patients)]
    n = sum(counts)
    return _dataset(
        counts,
        {s: torch.randn(n, t, d, generator=some) for s, (t, d) in SOURCES.items()},
        torch.randint(-1, 2, (n, TASKS), generator=some),
        {s: torch.rand(n, t, generator=some) < 0.8 for s, (t, _) in SOURCES.items()},
    )


def canaries(patients: int, records: int, seed: int) -> Dataset:
    """Patients with large random features and random labels, nearly the same in all their records:
    gradients far above any clipping norm, each in a direction of its own. That a patient's records
    agree is what makes clipping them one by one expensive."""
    some = torch.Generator().manual_seed(seed)

    def like_first(shape: tuple[int, ...], scale: float) -> Tensor:
        mine = torch.randn(patients, 1, *shape, generator=some)
        each = torch.randn(patients, records, *shape, generator=some)
        return (scale * (mine + 0.2 * each)).flatten(0, 1)

    labels = torch.randint(0, 2, (patients, TASKS), generator=some)
    return _dataset(
        [records] * patients,
        {s: like_first(shape, 2.0) for s, shape in SOURCES.items()},
        labels.repeat_interleave(records, 0),
    )


def cancelling(differences: Sequence[float], seed: int) -> Dataset:
    """Two patients per relative difference, each of two records that far apart, with opposite
    labels. An adapter that gives every record the same logits makes their gradients cancel down to
    it. The features of the second patient are all equal: rounding errors then agree in all
    coordinates instead of averaging out.
    """
    some = torch.Generator().manual_seed(seed)
    apart = torch.tensor(differences).repeat_interleave(2)
    flat = torch.arange(len(apart)) % 2 == 1
    inputs = {}
    for source, shape in SOURCES.items():
        first = 10 * torch.randn(len(apart), *shape, generator=some)
        moved = 10 * torch.randn(first.shape, generator=some)
        first[flat], moved[flat] = first[flat][..., :1], moved[flat][..., :1]
        inputs[source] = torch.stack([first, first + apart[:, None, None] * moved], 1)
    label = torch.randint(0, 2, (len(apart), TASKS), generator=some)
    return _dataset(
        [2] * len(apart),
        {source: x.flatten(0, 1) for source, x in inputs.items()},
        torch.stack([label, 1 - label], 1).flatten(0, 1),
    )


def joined(first: Dataset, second: Dataset) -> Dataset:
    """The patients of both, those of `first` before those of `second`."""
    shift = first.n_records
    return Dataset(
        rows_of_patient=[*first.rows_of_patient, *(r + shift for r in second.rows_of_patient)],
        inputs={s: torch.cat([x, second.inputs[s]]) for s, x in first.inputs.items()},
        present={s: torch.cat([m, second.present[s]]) for s, m in first.present.items()},
        labels=torch.cat([first.labels, second.labels]),
        record_ids=[str(i) for i in range(shift + second.n_records)],
    )


def _dataset(
    counts: list[int],
    inputs: dict[str, Tensor],
    labels: Tensor,
    present: dict[str, Tensor] | None = None,
) -> Dataset:
    bounds = np.cumsum([0, *counts])
    if present is None:
        present = {s: torch.ones(x.shape[:2], dtype=torch.bool) for s, x in inputs.items()}
    return Dataset(
        rows_of_patient=[np.arange(start, end) for start, end in pairwise(bounds)],
        inputs={s: x * present[s][..., None] for s, x in inputs.items()},
        present=present,
        labels=labels.to(torch.int8),
        record_ids=[str(i) for i in range(int(bounds[-1]))],
    )

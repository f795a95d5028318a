"""From the inputs of a record to one embedding: several notes or images up to the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.site.encoders.encoder import Embedding, unit_norm

Pooling = Literal[
    "latest", "mean", "time-weighted", "time-weighted-by-max", "time-weighted-by-range"
]
UNNORMALISED: frozenset[Pooling] = frozenset({"time-weighted-by-max", "time-weighted-by-range"})
"""Poolings that are `weighted_sum`s, whose size says how long the inputs span."""


def weights(hours: NDArray[np.float64], pooling: Pooling) -> NDArray[np.float64]:
    """Weight of each of a record's n >= 1 inputs; they sum to 1 but for the `UNNORMALISED`.

    * ``latest``: the last one; several of the same hour share it.
    * ``mean``: all alike.
    * ``time-weighted``: w_j proportional to t_j - min t, so that the first input weighs 0 and the
      last one most; inputs that all have one time, a single one among them, weigh alike.
    * ``time-weighted-by-max``: (t_j - min t) / max t, as UNI-MLM prints it; 0 for a single input,
      and for inputs that are all from before the stay or its first moment (max t <= 0).
    * ``time-weighted-by-range``: (t_j - min t) / (max t - min t), as in HAIM's code; 0 for a single
      input.

    Args:
        hours: Times ``[n]`` of the inputs, in hours, in any order.
    """
    if pooling == "latest":
        raw = (hours == hours.max()).astype(np.float64)
    elif pooling in UNNORMALISED:
        since = hours - hours.min()
        whole = hours.max() if pooling == "time-weighted-by-max" else since.max()
        return np.asarray(since / whole) if whole > 0 else np.zeros(len(hours))
    elif pooling == "time-weighted" and hours.max() > hours.min():
        raw = hours - hours.min()
    else:
        raw = np.ones(len(hours))
    return np.asarray(raw / raw.sum())


def pool(
    embeddings: Sequence[Embedding], share: NDArray[np.float64], tokens: int
) -> tuple[Embedding, NDArray[np.bool_]]:
    """Weighted mean per token position, over the inputs that have that position.

    Args:
        embeddings: Of each input `[t, d]`, t <= tokens.
        share: Weights `[n]`, not negative.

    Returns:
        `[tokens, d]` float32, zero where no input of positive weight has a token, and that mask.
    """
    total = np.zeros((tokens, embeddings[0].shape[1]))
    mass = np.zeros(tokens)
    for embedding, weight in zip(embeddings, share, strict=True):
        total[: len(embedding)] += weight * embedding
        mass[: len(embedding)] += weight
    present = mass > 0
    total[present] /= mass[present, None]
    return total.astype(np.float32), present


def weighted_sum(
    embeddings: Sequence[Embedding], share: NDArray[np.float64], tokens: int
) -> tuple[Embedding, NDArray[np.bool_]]:
    """Weighted sum per token position of embeddings that are scaled to norm 1 each.

    Args:
        embeddings: Of each input `[t, d]`, t <= tokens.
        share: Weights `[n]`, not negative, of any sum.

    Returns:
        `[tokens, d]` float32 and the mask of positions that any input has: an input of weight 0 is
        there, as a zero.
    """
    total = np.zeros((tokens, embeddings[0].shape[1]))
    present = np.zeros(tokens, dtype=bool)
    for embedding, weight in zip(embeddings, share, strict=True):
        total[: len(embedding)] += weight * unit_norm(embedding)
        present[: len(embedding)] = True
    return total.astype(np.float32), present

"""From the inputs of a record to one embedding: several notes or images up to the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.site.encoders.encoder import Embedding

Pooling = Literal["latest", "mean", "time-weighted"]


def weights(hours: NDArray[np.float64], pooling: Pooling) -> NDArray[np.float64]:
    """Weight of each of a record's n >= 1 inputs; they sum to 1.

    * ``latest``: the last one; several of the same hour share it.
    * ``mean``: all alike.
    * ``time-weighted``: w_j proportional to t_j - min t, so that the first input weighs 0 and the
      last one most; inputs that all have one time, a single one among them, weigh alike. UNI-MLM
      divides by max t instead (its weights do not sum to 1, and a single image weighs 0), HAIM by
      max t - min t (again 0 for a single image).

    Args:
        hours: Times ``[n]`` of the inputs, in hours, in any order.
    """
    if pooling == "latest":
        raw = (hours == hours.max()).astype(np.float64)
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

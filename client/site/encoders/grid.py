"""Grids of an image's tokens: averaged to fewer by area, and read row by row."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from client.site.encoders.encoder import Embedding


def grid_shape(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most `tokens` cells that keeps the proportions.

    A grid that has no more cells stays as it is; a square one stays square (14 x 14 patches become
    7 x 7 for 49 to 63 tokens).
    """
    if height * width <= tokens:
        return height, width
    rows = min(max(1, math.isqrt(tokens * height // width)), tokens)
    columns = max(1, math.isqrt(tokens * width // height))
    return rows, min(columns, tokens // rows)


def pool_grid(x_HWd: NDArray[np.float32], tokens: int) -> Embedding:
    """Features on a grid as tokens `[t, d]`, t <= tokens, row by row.

    A grid of more cells than `tokens` is averaged by area to `grid_shape`.
    """
    height, width, dim = x_HWd.shape
    rows, columns = grid_shape(height, width, tokens)
    if (rows, columns) == (height, width):
        return np.ascontiguousarray(x_HWd.reshape(-1, dim), dtype=np.float32)
    x_RWd = (overlap(height, rows) @ x_HWd.reshape(height, -1)).reshape(rows, width, dim)
    x_WRd = x_RWd.swapaxes(0, 1).reshape(width, -1)
    x_CRd = (overlap(width, columns) @ x_WRd).reshape(columns, rows, dim)
    return np.ascontiguousarray(x_CRd.swapaxes(0, 1).reshape(-1, dim), dtype=np.float32)


@lru_cache(maxsize=64)
def overlap(source: int, target: int) -> csr_array:
    """Share `[target, source]` of each source pixel in each target pixel; rows sum to 1.

    Sparse, and not only because most shares are 0: a dense product would wake the threads of
    NumPy's BLAS, which spin on while torch computes. With torch on both of two processors that made
    a DenseNet 2.3 times slower.
    """
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return csr_array((np.clip(shared, 0, None) / (source / target)).astype(np.float32))

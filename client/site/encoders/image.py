"""An embedded image encoder that needs no download: a fixed descriptor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from client.site.encoders import encoder, grid
from client.site.encoders.encoder import Embedding, fingerprint, unit_norm
from client.site.encoders.grid import overlap
from client.site.shard import images, to_grey

_ORIENTATIONS = 8
_LEVELS = 28


class _Form(NamedTuple):
    """How finely a piece of an image is described.

    Attributes:
        side: Pixels of its side.
        frequencies: Lowest ones of the cosine transform, in each direction.
        cells: Of the gradient histograms, in each direction.
    """

    side: int
    frequencies: int
    cells: int

    @property
    def dim(self) -> int:
        return int(self.frequencies**2 - 1 + self.cells**2 * _ORIENTATIONS + _LEVELS)


_WHOLE = _Form(side=128, frequencies=14, cells=6)
_TILE = _Form(side=32, frequencies=7, cells=3)
_PLACE = 0.5
"""Of a tile's row and column, which run from -1 to 1: they should weigh less than what it shows."""


class ImageDescriptor:
    """Coarse shape, edges and grey levels of an image, by fixed formulas.

    **Not a trained network.** It knows no anatomy and no finding. It can tell a dense lung field
    from a clear one, a rotated or small image from a large one; it cannot see a rib fracture. It
    makes the image path run anywhere, the same on every machine, with nothing learned from anybody.

    The image, grey and averaged to 128 x 128, its 1st to 99th percentile stretched to [0, 1], gives
    three parts, each scaled to equal length, and together to root mean square 1 (L2 norm sqrt(d)):

    * the 14 x 14 lowest frequencies of its cosine transform, without the mean, each c as
      sign(c) ln(1 + |c|);
    * histograms of 8 gradient orientations (sign ignored) in 6 x 6 cells, weighted by gradient
      size, square-rooted (Dalal and Triggs 2005, without blocks), less the mean of each cell;
    * the square root of the histogram of 28 grey levels before stretching, less its mean.

    Without these means most of the vector would be the same for every image: a constant input,
    which under differential privacy spends the clipping norm on nothing.

    Above one token, the image is cut into the largest square grid of at most `tokens` tiles, each
    of 32 x 32 pixels, and each gives the same three parts with 7 x 7 frequencies and 3 x 3 cells,
    stretched by the percentiles of the whole image, and its row and column from -1/2 to 1/2. A
    tile's waves and edges are shortened to length 1 but not lengthened: an empty tile has none.

    8-bit and 12/16-bit files; of a colour image the first channel counts.

    Args:
        tokens: Most tokens of an image; 511 numbers each for 1, else 150.
    """

    def __init__(self, tokens: int = 1) -> None:
        self._grid = math.isqrt(tokens) if tokens > 1 else None
        self.tokens = self._grid**2 if self._grid else 1
        self.dim = _TILE.dim + 2 if self._grid else _WHOLE.dim
        self.fingerprint = fingerprint(ImageDescriptor, images, encoder, grid, tiles=self._grid)
        of = f" of {self._grid} x {self._grid} tiles" if self._grid else ""
        self.description = (
            f"image-descriptor: cosine transform, gradient orientations and grey levels{of}, "
            f"{self.dim} numbers; fixed formulas, not a trained network"
        )

    def encode(self, inputs: Sequence[Image.Image]) -> list[Embedding]:
        """One vector `[1, dim]` per image, or the tiles `[tokens, dim]` row by row."""
        if self._grid:
            return [_tiles(to_grey(image), self._grid) for image in inputs]
        return [_whole(to_grey(image))[None] for image in inputs]


def area_resize(grey: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Averages `[height, width]` over the area of each of `side` x `side` pixels.

    What OpenCV calls INTER_AREA: each source pixel counts by the part of it that lies in the target
    pixel. (With one side shorter than `side` and the other longer, OpenCV interpolates linearly
    instead.) The aspect ratio is not kept (as in HAIM).
    """
    height, width = grey.shape
    narrow = (overlap(width, side) @ (overlap(height, side) @ grey).T).T
    return np.ascontiguousarray(narrow, dtype=np.float32)


def _whole(grey: NDArray[np.float32]) -> Embedding:
    small, stretched = _stretched(grey, _WHOLE.side)
    waves, edges, levels = _parts(small, stretched, _WHOLE)
    edges = _centred(unit_norm(edges))
    return unit_norm(np.concatenate([unit_norm(waves), edges, levels]))


def _tiles(grey: NDArray[np.float32], count: int) -> Embedding:
    """The `count` x `count` tiles of an image, `[count², dim]`."""
    side = _TILE.side
    small, stretched = _stretched(grey, count * side)
    tokens = []
    for row, column in np.ndindex(count, count):
        tile = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        waves, edges, levels = _parts(small[tile], stretched[tile], _TILE)
        place = _PLACE * ((2 * np.array([row, column]) + 1) / count - 1)
        # Lengthened, the rounding errors of an empty tile would pass for a picture.
        shown = _shortened(waves), _centred(_shortened(edges))
        tokens.append(unit_norm(np.concatenate([*shown, levels, place])))
    return np.stack(tokens)


def _stretched(
    grey: NDArray[np.float32], side: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The image at `side` x `side` pixels, as it is and with its percentiles at 0 and 1."""
    small = area_resize(grey, side).astype(np.float64)
    low, high = np.percentile(small, [1, 99])
    return small, np.clip((small - low) / max(high - low, 1e-6), 0, 1)


def _parts(
    small: NDArray[np.float64], stretched: NDArray[np.float64], form: _Form
) -> tuple[NDArray[np.float64], NDArray[np.float64], Embedding]:
    """Waves and edges, of any length, and levels of one piece of an image."""
    levels, _ = np.histogram(small, bins=_LEVELS, range=(0.0, 1.0))
    roots = unit_norm(np.sqrt(levels))
    return _waves(stretched, form), _edges(stretched, form), roots - roots.mean()


def _centred(edges: NDArray[Any]) -> NDArray[Any]:
    cells = edges.reshape(-1, _ORIENTATIONS)
    return np.asarray((cells - cells.mean(axis=1, keepdims=True)).ravel())


def _shortened(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(1.0, float(np.linalg.norm(vector)))


def _waves(image: NDArray[np.float64], form: _Form) -> NDArray[np.float64]:
    low = dctn(image, norm="ortho")[: form.frequencies, : form.frequencies].ravel()[1:]
    return np.asarray(np.sign(low) * np.log1p(np.abs(low)))


def _edges(image: NDArray[np.float64], form: _Form) -> NDArray[np.float64]:
    down, right = np.gradient(image)
    size = np.hypot(down, right)
    angle = np.arctan2(down, right) % np.pi
    orientation = np.minimum((angle / np.pi * _ORIENTATIONS).astype(int), _ORIENTATIONS - 1)
    cell = np.minimum(np.arange(form.side) * form.cells // form.side, form.cells - 1)
    bin_of = (cell[:, None] * form.cells + cell[None]) * _ORIENTATIONS + orientation
    histogram = np.bincount(bin_of.ravel(), size.ravel(), minlength=form.cells**2 * _ORIENTATIONS)
    return np.asarray(np.sqrt(histogram))

"""An embedded image encoder that needs no download: a fixed descriptor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import csr_array

from client.site.encoders import encoder
from client.site.encoders.encoder import Embedding, fingerprint, unit_norm
from client.site.shard import images, to_grey

_SIDE = 128
_FREQUENCIES = 14
_CELLS = 6
_ORIENTATIONS = 8
_LEVELS = 28


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

    8-bit and 12/16-bit files; of a colour image the first channel counts.
    """

    tokens = 1
    dim = _FREQUENCIES**2 - 1 + _CELLS**2 * _ORIENTATIONS + _LEVELS

    def __init__(self) -> None:
        self.fingerprint = fingerprint(ImageDescriptor, images, encoder)
        self.description = (
            f"image-descriptor: cosine transform, gradient orientations and grey levels, "
            f"{self.dim} numbers; fixed formulas, not a trained network"
        )

    def encode(self, inputs: Sequence[Image.Image]) -> list[Embedding]:
        """One vector `[1, dim]` per image."""
        return [_describe(to_grey(image))[None] for image in inputs]


def area_resize(grey: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Averages `[height, width]` over the area of each of `side` x `side` pixels.

    What OpenCV calls INTER_AREA: each source pixel counts by the part of it that lies in the target
    pixel. (With one side shorter than `side` and the other longer, OpenCV interpolates linearly
    instead.) The aspect ratio is not kept (as in HAIM).
    """
    height, width = grey.shape
    narrow = (_overlap(width, side) @ (_overlap(height, side) @ grey).T).T
    return np.ascontiguousarray(narrow, dtype=np.float32)


@lru_cache(maxsize=64)
def _overlap(source: int, target: int) -> csr_array:
    """Share `[target, source]` of each source pixel in each target pixel; rows sum to 1.

    Sparse, and not only because most shares are 0: a dense product would wake the threads of
    NumPy's BLAS, which spin on while torch computes. With torch on both of two processors that made
    a DenseNet 2.3 times slower.
    """
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return csr_array((np.clip(shared, 0, None) / (source / target)).astype(np.float32))


def _describe(grey: NDArray[np.float32]) -> Embedding:
    small = area_resize(grey, _SIDE).astype(np.float64)
    low, high = np.percentile(small, [1, 99])
    stretched = np.clip((small - low) / max(high - low, 1e-6), 0, 1)
    levels, _ = np.histogram(small, bins=_LEVELS, range=(0.0, 1.0))
    edges, roots = unit_norm(_edges(stretched)), unit_norm(np.sqrt(levels))
    cells = edges.reshape(-1, _ORIENTATIONS)
    centred = (cells - cells.mean(axis=1, keepdims=True)).ravel(), roots - roots.mean()
    return unit_norm(np.concatenate([unit_norm(_waves(stretched)), *centred]))


def _waves(image: NDArray[np.float64]) -> NDArray[np.float64]:
    low = dctn(image, norm="ortho")[:_FREQUENCIES, :_FREQUENCIES].ravel()[1:]
    return np.asarray(np.sign(low) * np.log1p(np.abs(low)))


def _edges(image: NDArray[np.float64]) -> NDArray[np.float64]:
    down, right = np.gradient(image)
    size = np.hypot(down, right)
    angle = np.arctan2(down, right) % np.pi
    orientation = np.minimum((angle / np.pi * _ORIENTATIONS).astype(int), _ORIENTATIONS - 1)
    cell = np.minimum(np.arange(_SIDE) * _CELLS // _SIDE, _CELLS - 1)
    bin_of = (cell[:, None] * _CELLS + cell[None]) * _ORIENTATIONS + orientation
    histogram = np.bincount(bin_of.ravel(), size.ravel(), minlength=_CELLS**2 * _ORIENTATIONS)
    return np.asarray(np.sqrt(histogram))

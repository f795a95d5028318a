"""What the image files are: sizes, depths, grey levels; unreadable, inverted and repeated ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from client.site.shard.images import decode_image, to_grey
from client.site.shard.report.facts import Histogram
from client.site.shard.shard import Shard
from common.errors import ShardError

SAMPLE = 500
"""Most image files that are opened."""
LEVELS = 64
INVERTED_BY = 0.12
"""Grey levels, of 1. Of 243 adult chest X-rays no right one and three of four inverted ones differ
by more."""


@dataclass(frozen=True)
class Pictures:
    """The image files of a shard.

    Attributes:
        n: Rows of the table.
        views: Rows per view.
        looked_at: Files that were opened, evenly spread over the table; what follows is of those.
        unreadable, inverted, repeated: Files. Repeated: the same content as an earlier one.
        across_patients: Contents that stand with more than one patient.
        sizes: Width and height in pixels: files, the most frequent first.
        depths: Words for bit depth and channels: files.
        grey: Share of pixels per grey level, mean over files, `[LEVELS]` from black to white.
        brightness: Mean grey level of each file, in [0, 1].
    """

    n: int
    views: Mapping[str, int]
    looked_at: int
    unreadable: int
    inverted: int
    repeated: int
    across_patients: int
    sizes: Mapping[tuple[int, int], int]
    depths: Mapping[str, int]
    grey: tuple[float, ...]
    brightness: Histogram


@dataclass(frozen=True)
class _Look:
    digest: bytes
    size: tuple[int, int]
    depth: str
    inverted: bool
    levels: NDArray[np.float64]
    mean: float


def pictures(shard: Shard) -> Pictures | None:
    """Opens up to `SAMPLE` files; None for a shard without the table."""
    if shard.images is None or shard.images.is_empty():
        return None
    n = shard.images.height
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int))
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(lambda row: _look(shard, int(row)), rows))
    owner = dict(shard.records.select("stay_id", "patient_id").iter_rows())
    patients = [owner[stay] for stay in shard.images["stay_id"].gather(rows)]
    readable = [look for look in looks if look is not None]
    owners: dict[bytes, set[str]] = {}
    for look, patient in zip(looks, patients, strict=True):
        if look is not None:
            owners.setdefault(look.digest, set()).add(patient)
    views = shard.images["view"].fill_null("no view").value_counts(sort=True)
    levels = np.mean([look.levels for look in readable], axis=0) if readable else np.zeros(LEVELS)
    counts, edges = np.histogram([look.mean for look in readable], bins=25, range=(0, 1))
    return Pictures(
        n=n,
        views=dict(views.iter_rows()),
        looked_at=len(looks),
        unreadable=len(looks) - len(readable),
        inverted=sum(look.inverted for look in readable),
        repeated=len(readable) - len(owners),
        across_patients=sum(len(people) > 1 for people in owners.values()),
        sizes=dict(Counter(look.size for look in readable).most_common()),
        depths=dict(Counter(look.depth for look in readable).most_common()),
        grey=tuple(levels.tolist()),
        brightness=Histogram(tuple(edges.tolist()), tuple(counts.tolist())),
    )


def looks_inverted(grey: NDArray[np.float32]) -> bool:
    """Whether black and white seem exchanged, as in a DICOM export that forgot MONOCHROME1.

    The air beside the neck should be darker than the spine: the median of the two upper corners (an
    eighth of each side) is compared with that of the middle columns.

    Args:
        grey: `[height, width]` in [0, 1].
    """
    height, width = grey.shape
    h, w, half = max(1, height // 8), max(1, width // 8), max(1, width // 25)
    corners = np.concatenate([grey[:h, :w].ravel(), grey[:h, -w:].ravel()])
    middle = grey[:, max(0, width // 2 - half) : width // 2 + half]
    return bool(np.median(corners) - np.median(middle) > INVERTED_BY)


def _look(shard: Shard, row: int) -> _Look | None:
    """One file, or None if it cannot be read."""
    try:
        data = shard.image_bytes(row)
        image = decode_image(data, "")
    except ShardError:
        return None
    grey = to_grey(image)
    counts, _ = np.histogram(grey, bins=LEVELS, range=(0, 1))
    colour = "grey" if len(image.getbands()) == 1 and image.mode != "P" else "colour"
    deep = image.mode.startswith(("I", "F"))
    return _Look(
        digest=sha256(data).digest(),
        size=image.size,
        depth=f"{'more than 8' if deep else '1' if image.mode == '1' else '8'} bit, {colour}",
        inverted=looks_inverted(grey),
        levels=counts / counts.sum(),
        mean=float(grey.mean()),
    )

"""A small, valid shard that tests bend."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image


def picture(seed: int, *, mode: str = "L", size: tuple[int, int] = (60, 48)) -> bytes:
    """A PNG of smooth random shapes; 16-bit with mode `I;16`."""
    coarse = np.random.default_rng(seed).random((6, 5))
    grey = np.kron(coarse, np.ones((10, 10)))[: size[1], : size[0]]
    if mode == "I;16":
        image = Image.fromarray(np.rint(grey * 65535).astype(np.uint16))
    else:
        image = Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def tables() -> dict[str, Any]:
    """Arguments of `write_shard`: three patients, four stays, five records, every table."""
    return {
        "meta": {"name": "Test ward", "hospital": "ward", "dataset": "made up"},
        "records": pl.DataFrame(
            {
                "record_id": ["r0", "r1", "r2", "r3", "r4"],
                "patient_id": ["p0", "p0", "p1", "p1", "p2"],
                "stay_id": ["s0", "s0", "s1", "s2", "s3"],
                "cutoff_hours": [12.0, 24.0, 24.0, 24.0, 24.0],
                "age": [70.0, 70.0, None, 41.0, 55.0],
                "sex": ["F", "F", "M", "M", None],
                "y_death": [False, True, None, False, False],
                "y_stay": [True, True, False, None, False],
            }
        ),
        "events": pl.DataFrame(
            {
                "stay_id": ["s0", "s0", "s0", "s1", "s3"],
                "hours": [1.0, 10.0, 20.0, 3.0, 30.0],
                "source": ["chart", "chart", "lab", "lab", "chart"],
                "series": ["heart_rate", "heart_rate", "lactate", "lactate", "heart_rate"],
                "value": [80.0, 110.0, 4.0, 1.0, 60.0],
            }
        ),
        "images": pl.DataFrame(
            {
                "stay_id": ["s0", "s0", "s1"],
                "hours": [2.0, 18.0, 5.0],
                "path": ["images/a.png", "images/b.png", "images/c.png"],
                "view": ["AP", "AP", None],
            }
        ),
        "notes": pl.DataFrame(
            {
                "stay_id": ["s0", "s0", "s2"],
                "hours": [1.0, 20.0, 2.0],
                "category": ["Admission", "Progress", "Admission"],
                "text": ["No edema. HR 72.", "Now with edema, HR 110.", "Cough and fever."],
            }
        ),
        "embeddings": pl.DataFrame(
            {
                "stay_id": ["s0", "s1"],
                "hours": [1.0, 1.0],
                "source": ["slide", "slide"],
                "vector": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
            }
        ),
        "files": {f"images/{name}.png": picture(i) for i, name in enumerate("abc")},
    }


@pytest.fixture
def ward(tmp_path: Path) -> Callable[..., Path]:
    """Writes the small shard unchecked, tables replaced by keyword (None: no such table)."""

    def write(name: str = "ward", **changed: Any) -> Path:
        import tomli_w

        parts = {**tables(), **changed}
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        (folder / "shard.toml").write_text(tomli_w.dumps(parts.pop("meta")))
        for path, data in parts.pop("files").items():
            (folder / path).write_bytes(data)
        for table, frame in parts.items():
            if frame is not None:
                frame.write_parquet(folder / f"{table}.parquet")
        return folder

    return write


@pytest.fixture
def parts() -> dict[str, Any]:
    return tables()


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
    return picture

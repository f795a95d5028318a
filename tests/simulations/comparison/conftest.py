"""Two tiny hospitals, made once for each file of tests, and a study small enough for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.study import Study
from simulations import synthetic_hospitals


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic_hospitals(tmp_path_factory.mktemp("cohort"), 2, patients=40)


@pytest.fixture(scope="module")
def two_sources() -> dict[str, Any]:
    """The demo study with laboratory values and notes alone, as what a file would say."""
    raw = Study.load("demo").model_dump(mode="json", exclude_none=True)
    raw["sources"] = {name: raw["sources"][name] for name in ("lab", "note")}
    return raw

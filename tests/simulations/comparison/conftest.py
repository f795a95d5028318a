"""Two tiny hospitals, made once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations import synthetic_hospitals


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic_hospitals(tmp_path_factory.mktemp("cohort"), 2, patients=40)

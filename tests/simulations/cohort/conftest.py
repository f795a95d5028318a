"""A small cohort that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.cohort.write import write_cohort


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four hospitals of 120 patients."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), 4, patients=120, seed=0)

"""One core: the engine's kernels here are small."""

from __future__ import annotations

import pytest
import torch

from common.study import Study
from simulations.attack.engine import audit_study

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def study() -> Study:
    return audit_study(2.0, patients_declared=1000)

"""Hospitals for the daemon's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def ward_module() -> ModuleType:
    path = Path(__file__).with_name("ward.py")
    spec = importlib.util.spec_from_file_location("ward", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ward"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module

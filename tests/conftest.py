"""Fixtures that every room shares."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Kernels here are small. Threads that wait for each other on a busy machine cost ten times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: what tests
    say of Ctrl-C would depend on who started them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def open_data() -> Path:
    """Folder of openly licensed real shards: FEDWARD_DATA, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("FEDWARD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no open data at {folder}; set FEDWARD_DATA to the folder that holds it")
    return folder


def load(path: Path) -> ModuleType:
    """A helper module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ward_module() -> ModuleType:
    """Small hospitals behind a guard."""
    import torch

    torch.set_num_threads(1)
    return load(REPOSITORY / "tests" / "client" / "daemon" / "ward.py")


@pytest.fixture(scope="session")
def killing() -> ModuleType:
    """A daemon that is killed at random moments."""
    return load(REPOSITORY / "tests" / "privacy" / "killing.py")

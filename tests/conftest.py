"""Fixtures that every room shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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

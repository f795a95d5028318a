"""A coordinator's folder, hospitals, and one coordinator that runs for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.coordinator import enrol, front
from deploy.coordinator.layout import CoordinatorFolder
from deploy.coordinator.superlink import healthy
from tests.deploy.coordinator.ward import Hospital, Joining, Served, ended, new_folder, started


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return new_folder(tmp_path / "coordinator")


@pytest.fixture
def hospital(tmp_path: Path) -> Joining:
    return lambda name: Hospital(tmp_path / "hospitals", name)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Sites a and b are enrolled; c was, and is revoked."""
    if front.binary() is None:
        pytest.skip("nginx is not installed")
    root = tmp_path_factory.mktemp("served")
    folder = new_folder(root / "coordinator")
    hospitals = {name: Hospital(root, name).admitted(folder) for name in "abc"}
    enrol.revoke(folder, "c")
    process = started(folder)
    assert healthy(folder)
    yield Served(folder, process, hospitals)
    assert ended(process) == 0

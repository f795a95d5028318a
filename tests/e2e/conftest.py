"""One deployment on real data, shared by the tests of a module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from common.study import Study
from tests.e2e.deployment import Deployment, deployed

# What takes longer than the rest together: `make test-e2e`.
LONG = ["test_kills.py", "test_faults.py", "test_attackers.py", "test_wire.py"]
collect_ignore = [] if os.environ.get("FEDWARD_E2E") == "all" else LONG
REGIONS = Path(__file__).parents[3] / "shared" / "data" / "eicu-demo-regions"
SITES = ("region-midwest", "region-south", "region-west")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    if not which("nginx"):
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    if not REGIONS.is_dir():
        pytest.skip(f"{REGIONS} is not here")
    with deployed({name: REGIONS / name for name in SITES}) as made:
        yield made


def study(name: str, **changes: Any) -> Study:
    """The eICU study with three of its regions and few, short rounds."""
    raw = Study.load("eicu-regions").model_dump(mode="json", exclude_none=True)
    raw["name"] = name
    raw["training"]["steps_per_round"] = 3
    raw["training_without_privacy"]["steps_per_round"] = 3
    raw["federation"]["rounds"] = 3
    raw["federation"]["sites"] = {s: raw["federation"]["sites"][s] for s in SITES}
    for part, values in changes.items():
        raw[part] = {**raw[part], **values}
    return Study.model_validate(raw)

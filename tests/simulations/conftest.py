"""Fake sites behind a real `flwr run`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from common.study import Study, resolve
from simulations.launcher import Run

FAKE = Path(__file__).resolve().parent.parent / "server" / "fake_sites.py"
NAMES = ["alpha", "beta", "gamma", "delta"]


@pytest.fixture
def study() -> Study:
    text = f"""
    name = "fake"
    [sources.age]
    modality = "table"
    encoder = "demographics"
    [tasks.death]
    prevalence = 0.2
    [privacy]
    mode = "none"
    [federation]
    rounds = 3
    deadline_seconds = 60
    startup_seconds = 120
    {
        "".join(
            f'''
    [federation.sites.{name}]
    patients_declared = 100
    '''
            for name in NAMES
        )
    }
    """
    return resolve(Study.from_toml(text))


@pytest.fixture
def fake_run(study: Study, tmp_path: Path) -> Any:
    """Makes a `Run` whose daemon is fake; `delay` seconds of work per site and round."""

    def make(out: str = "out", *, delay: float = 0.0, resume: bool = False, **changes: Any) -> Run:
        raw = study.model_dump(mode="json")
        raw["federation"] |= changes

        def command(socket: Path) -> list[str]:
            return [
                sys.executable,
                str(FAKE),
                str(socket),
                str(tmp_path / "keys"),
                str(delay),
                *NAMES,
            ]

        return Run(
            Study.model_validate(raw),
            tmp_path / out,
            "run-1",
            resume,
            tmp_path / "coordinator.key",
            command,
        )

    return make


@pytest.fixture
def processes_under() -> Any:
    """Lists the processes whose command line or environment holds a text, this one left out."""

    def find(text: str) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in words and state != "Z":
                found.append(f"{entry.name}: {words[:200]!r}")
        return found

    return find

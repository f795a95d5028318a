"""`flwr run .` with nothing configured: Flower's two nodes serve all four hospitals of the demo."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from simulations.processes import Family

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.timeout(900)
def test_two_nodes_serve_four_hospitals() -> None:
    with tempfile.TemporaryDirectory(prefix="fw") as short, Family() as family:
        base = Path(short)
        (base / "neutral").mkdir()
        home = base / "home"
        binaries = Path(sys.executable).parent
        env = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(base / "flower"),
            "FEDWARD_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
            "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(base),
        }
        before = (REPOSITORY / "pyproject.toml").read_bytes()
        reports: list[Path] = []
        for attempt in range(3):  # Ray gives up on a machine too busy to start it in time
            log = base / f"run-{attempt}.log"
            submitted = family.start(
                [str(binaries / "flwr"), "run", str(REPOSITORY), "--stream"],
                env=env,
                cwd=base / "neutral",
                log=log,
            )
            while submitted.poll() is None:
                family.watch()
                time.sleep(0.5)
            reports = list(home.glob("runs/*/report.json"))
            if "timed out during startup" not in log.read_text():
                break
        assert len(reports) == 1, log.read_text()[-3000:]
        report = json.loads(reports[0].read_text())
        assert report["status"] == "completed"
        assert sorted(s["name"] for s in report["sites"]) == [
            "lakeview",
            "northgate",
            "riverside",
            "st-clara",
        ]
        assert all(s["steps"] == 50 for s in report["sites"])
        assert all(0 < s["epsilon"] <= 8 for s in report["sites"])
        assert (REPOSITORY / "pyproject.toml").read_bytes() == before

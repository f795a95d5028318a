"""Whatever process is killed in the middle of a round, the study completes, and every release
stands in the ledger once."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import pytest

from common.study import Study
from tests.e2e.conftest import SITES, study
from tests.e2e.deployment import Deployment, Hospital, command_line, descendants, kill, wait_for

ROUNDS = 3


@pytest.fixture(scope="module")
def settled(deployment: Deployment) -> Study:
    """Rounds that last long enough to be met in the middle; a run for each kind of kill."""
    path = deployment.settled(
        study(
            "kills",
            training={"steps_per_round": 40},
            privacy={"spare_rounds": 1.0, "delta": 1e-4},
            federation={"rounds": ROUNDS},
        )
    )
    deployment.approve(path, runs=len(KILLS))
    return Study.load(path)


def daemon(deployment: Deployment, hospital: Hospital) -> None:
    assert hospital.daemon is not None
    for pid in (*descendants(hospital.daemon.pid), hospital.daemon.pid):
        kill(pid)
    hospital.daemon.wait()
    deployment.start_daemon(hospital)  # as systemd does


def supernode(deployment: Deployment, hospital: Hospital) -> None:
    kill(hospital.supernode)  # the relay starts it again


def relay(deployment: Deployment, hospital: Hospital) -> None:
    assert hospital.relay is not None
    for pid in (*descendants(hospital.relay.pid), hospital.relay.pid):
        kill(pid)
    hospital.relay.wait()
    time.sleep(15)  # RestartSec of the unit
    deployment.start_relay(hospital)


def coordinators(deployment: Deployment, part: str) -> int:
    assert deployment.coordinator is not None
    for pid in descendants(deployment.coordinator.pid):
        if part in command_line(pid):
            return pid
    raise LookupError(part)


def server_app(deployment: Deployment, hospital: Hospital) -> None:
    kill(coordinators(deployment, "serverapp"))
    deployment.coordinate("resume", "server_app")


def superlink(deployment: Deployment, hospital: Hospital) -> None:
    """`serve` starts it again. A ServerApp that outlives it goes on by itself; else one resumes."""
    app = coordinators(deployment, "serverapp")
    kill(coordinators(deployment, "flower-superlink"))
    done = len(deployment.lines("superlink"))
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(deployment.lines("superlink")) == done:
        if not os.path.exists(f"/proc/{app}"):
            break
        time.sleep(0.5)
    if len(deployment.lines("superlink")) == done:
        deployment.coordinate("resume", "superlink")


KILLS: list[Callable[[Deployment, Hospital], None]] = [
    daemon,
    supernode,
    relay,
    server_app,
    superlink,
]


@pytest.mark.parametrize("strike", KILLS, ids=lambda strike: strike.__name__)
def test_it_completes(
    deployment: Deployment, settled: Study, strike: Callable[[Deployment, Hospital], None]
) -> None:
    run = strike.__name__
    hospital = deployment.hospitals[SITES[0]]
    deployment.submit(deployment.folder / "kills.toml", run)
    deployment.await_round(run, 1)
    deployment.await_training(hospital)
    struck = time.monotonic()
    strike(deployment, hospital)
    deployment.await_round(run, 2, seconds=240)
    print(f"\n{run}: next round {time.monotonic() - struck:.0f} s after the kill")
    report = deployment.await_end(run)
    assert report["rounds"] == ROUNDS
    for name, there in deployment.hospitals.items():
        released = [c for c in there.charges if c["run"] == run]
        asked = Counter(c["request_digest"] for c in released)
        assert max(asked.values()) == 1, f"{name}: charged twice: {asked}"
        assert "VALID" in deployment.fedward("audit", "verify", there.folder.state)


def test_every_node_is_back(deployment: Deployment, settled: Study) -> None:
    def all_connected() -> bool:
        return deployment.coordinate("status").count("yes") >= len(SITES)

    wait_for(all_connected, 120, "all sites connected", deployment.story)

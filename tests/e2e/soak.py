"""A long study under random kills, with the memory of those who live through it.

    python -m tests.e2e.soak --minutes 60 --seed 0 [--out FILE]

Every two to four minutes one of these is killed: the first hospital's daemon, any hospital's
SuperNode or relay, the ServerApp. The other hospitals' daemons, `serve` and the SuperLink live on:
their resident memory must stay flat. Prints one line a minute and a summary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.e2e.conftest import REGIONS, SITES, study
from tests.e2e.deployment import Deployment, command_line, deployed, descendants
from tests.e2e.test_kills import coordinators, daemon, relay, server_app, supernode

RUN = "server_app"  # the name that `server_app` resumes
WARM_UP = 0.2  # of the time, in which memory may still grow


def watched(deployment: Deployment) -> dict[str, int]:
    """Resident bytes of what is never killed."""
    assert deployment.coordinator is not None
    pids = {"serve": deployment.coordinator.pid, "superlink": coordinators(deployment, "superlink")}
    for name in SITES[1:]:
        process = deployment.hospitals[name].daemon
        assert process is not None
        (pid,) = [
            p
            for p in (process.pid, *descendants(process.pid))
            if "site serve" in command_line(p) and "setpriv" not in command_line(p)
        ][-1:]
        pids[f"daemon {name}"] = pid
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


def soak(deployment: Deployment, minutes: float, seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    path = deployment.settled(
        study(
            "soak",
            training={"steps_per_round": 20},
            privacy={"spare_rounds": 1.0, "epsilon": 100.0, "delta": 1e-4},
            federation={"rounds": 2000},
        )
    )
    deployment.approve(path)
    deployment.submit(path, RUN)
    deployment.await_round(RUN, 1)
    began = time.monotonic()
    end = began + 60 * minutes
    next_kill, next_look = began + 60.0, began
    kills: dict[str, int] = defaultdict(int)
    memory: dict[str, list[tuple[float, int]]] = defaultdict(list)
    while time.monotonic() < end:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 60
            found = watched(deployment)
            for name, size in found.items():
                memory[name].append((now - began, size))
            done = max((line["completed"] for line in deployment.lines(RUN)), default=0)
            shown = "  ".join(f"{n} {s / 2**20:.0f} MB" for n, s in found.items())
            print(f"{(now - began) / 60:5.1f} min  {done} rounds  {shown}", flush=True)
        if now >= next_kill:
            next_kill = now + draw.uniform(120, 240)
            strike = draw.choice([daemon, supernode, relay, server_app])
            hospital = deployment.hospitals[SITES[0] if strike is daemon else draw.choice(SITES)]
            try:
                strike(deployment, hospital)
            except LookupError:
                continue  # it is being started just now
            kills[strike.__name__] += 1
            print(f"       killed {strike.__name__} of {hospital.name}", flush=True)
        time.sleep(1)
    lines = deployment.lines(RUN)
    growth = {}
    for name, samples in memory.items():
        settled = [size for at, size in samples if at >= WARM_UP * 60 * minutes]
        growth[name] = {
            "first_mb": round(settled[0] / 2**20, 1),
            "last_mb": round(settled[-1] / 2**20, 1),
            "change": round(settled[-1] / settled[0] - 1, 4),
        }
    return {
        "minutes": minutes,
        "kills": dict(kills),
        "rounds_completed": max((line["completed"] for line in lines), default=0),
        "rounds_lost": sum(not line.get("aggregated", True) for line in lines),
        "memory": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with deployed({name: REGIONS / name for name in SITES}) as deployment:
        result = json.dumps(soak(deployment, options.minutes, options.seed), indent=1)
    print(result)
    if options.out:
        options.out.write_text(result)


if __name__ == "__main__":
    main()

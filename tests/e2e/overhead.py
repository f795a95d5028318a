"""What a round costs beside training, between real processes over TLS with three hospitals.

    python -m tests.e2e.overhead

One step per round, so that a round is almost all overhead; `inline` is the same study in one
process without any transport: what is left of training and of the messages' own work.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.study import Study
from simulations.inline import run_inline
from tests.e2e.conftest import REGIONS, SITES, study
from tests.e2e.deployment import Deployment, deployed
from tests.e2e.test_study import unpinned

ROUNDS = 5
CASES: dict[str, dict[str, object]] = {
    "uni-mlm": {},
    "40 MB adapter": {
        "model": {"system": "adacomed", "adacomed": {"width": 1224, "shared_width": 1280}}
    },
}


def measure(deployment: Deployment, name: str, changes: dict[str, object]) -> None:
    run = name.replace(" ", "-").lower()
    path = deployment.settled(
        study(run, training={"steps_per_round": 1}, federation={"rounds": ROUNDS}, **changes)
    )
    deployment.approve(path)
    deployment.submit(path, run)
    deployment.await_end(run, seconds=900)
    seconds = [line["seconds"] for line in deployment.lines(run) if line["kind"] == "train"]
    size = sum(a.nbytes for a in deployment.adapter(run).values())
    with TemporaryDirectory() as folder:
        began: list[float] = []
        run_inline(
            unpinned(Study.load(path)),
            deployment.shards,
            Path(folder),
            threads=1,
            on_round=lambda number, adapter: began.append(time.monotonic()),
        )
    inline = float(np.median(np.diff(began)))
    print(
        f"{name}: adapter {size / 1e6:.1f} MB; a round {statistics.median(seconds):.1f} s "
        f"(all: {', '.join(f'{s:.1f}' for s in seconds)}); inline {inline:.1f} s",
        flush=True,
    )


def main() -> None:
    with deployed({name: REGIONS / name for name in SITES}) as deployment:
        for name, changes in CASES.items():
            measure(deployment, name, changes)


if __name__ == "__main__":
    main()

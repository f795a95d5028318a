"""What a round costs beside training: the demo study with one step per round, four sites.

    python -m simulations.benchmarks.overhead

A round of one step still pays everything but training: Flower's messages, Ray's actors, relays,
signatures, the ledger's fsyncs, the engine's check of the model, aggregation and checkpoint. Its
time is therefore an upper bound of the overhead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.study import Study
from simulations.cohort.shards import synthetic_hospitals
from simulations.run import simulate


def round_seconds(out: Path, *, rounds: int, hospitals: int) -> list[float]:
    """Seconds of each training round, first one left out: Ray starts in it."""
    study = Study.load("demo")
    brief = study.model_copy(
        update={"training": study.training.model_copy(update={"steps_per_round": 1})}
    )
    shutil.rmtree(out, ignore_errors=True)
    cohort = synthetic_hospitals(out / "cohort", hospitals, seed=0)
    simulate(brief, cohort, out, rounds=rounds)
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if line["kind"] == "train"][1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the median and the range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args(arguments)
    seconds = round_seconds(given.out, rounds=given.rounds, hospitals=4)
    Console().print(
        f"a round of one step, four sites: median {statistics.median(seconds):.2f} s, "
        f"{min(seconds):.2f} to {max(seconds):.2f} s over {len(seconds)} rounds"
    )


if __name__ == "__main__":
    main()

"""What a round costs beside training: the demo study with one step per round.

    python -m simulations.benchmarks.overhead [--hospitals 50]

A round of one step still pays everything but training: Flower's messages, Ray's actors, relays,
signatures, the ledger's fsyncs, the engine's check of the model, aggregation and checkpoint. Its
time is therefore an upper bound of the overhead. Memory is that of all processes together, shared
pages counted once, at its highest of one look a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console

from common.study import Study
from simulations.cohort.shards import synthetic_hospitals
from simulations.run import simulate


def round_seconds(out: Path, *, rounds: int, hospitals: int) -> list[float]:
    """Seconds of each training round, first one left out: Ray starts in it."""
    study = Study.load("demo")
    brief = study.model_copy(
        update={
            "training": study.training.model_copy(update={"steps_per_round": 1}),
            "federation": study.federation.model_copy(update={"sites": {}}),  # all there are
        }
    )
    shutil.rmtree(out, ignore_errors=True)
    cohort = synthetic_hospitals(out / "cohort", hospitals, seed=0)
    simulate(brief, cohort, out, rounds=rounds)
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if line["kind"] == "train"][1:]


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """The highest memory of this process and all below it, in the list's one element."""
    peak, over = [0], threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not over.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has just ended
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the median and the range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--hospitals", type=int, default=4)
    given = parser.parse_args(arguments)
    with peak_bytes() as peak:
        seconds = round_seconds(given.out, rounds=given.rounds, hospitals=given.hospitals)
    Console().print(
        f"a round of one step, {given.hospitals} hospitals: median "
        f"{statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} s over "
        f"{len(seconds)} rounds; {peak[0] / 1e9:.2f} GB at most"
    )


if __name__ == "__main__":
    main()

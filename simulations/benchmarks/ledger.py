"""What a ledger costs: reading, pricing, and the check before a round.

    python -m simulations.benchmarks.ledger

A ledger of 10,000 lines, 20 studies with a noise of their own each, is read with every signature
checked, and priced; then the marginal work before a round (lock, checks of policy, lifetime and
reserve, one signed line, fsync) is timed on top of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.identity import Identity
from common.messages import Request
from common.privacy.book import Book
from common.privacy.ledger import Ledger
from common.privacy.lifetime import Cap, Lifetime
from common.privacy.lines import Released, body_of, hash_of, signed
from common.privacy.policy import Policy
from common.privacy.pricing import cross_check
from common.study import Study, resolve

_STUDIES = 20


def studies(rounds: int) -> list[Study]:
    """Studies with `rounds` rounds and a noise of their own each."""
    found = []
    for number in range(_STUDIES):
        study = Study.model_validate(
            {
                "name": f"study-{number}",
                "sources": {"table": {"modality": "table", "encoder": "demographics"}},
                "tasks": {"death": {}},
                "privacy": {"epsilon": 0.5 + number / 10, "sample_rate": 0.02},
                "training": {"steps_per_round": 1},
                "federation": {"rounds": rounds, "sites": {"a": {"patients_declared": 2000}}},
            }
        )
        found.append(resolve(study))
    return found


def write(folder: Path, lines: int) -> tuple[Path, list[Study], Identity]:
    """A ledger of about `lines` lines, as a daemon would have written it."""
    some = studies(rounds=lines // _STUDIES)
    key, path = Identity.open(folder / "site.key"), folder / "ledger.jsonl"
    ledger = Ledger.open(path, "a", key, virtual=True)
    cap = Cap(epsilon=1000.0, delta=1e-5)
    ledger.settle_policy(Policy(lifetime=Lifetime(train=cap, validation=cap)))
    for study in some:
        ledger.approve(study)
    head, rows, written = ledger.book.head, [], len(ledger.book.lines)
    for number in range(lines - written):
        study = some[number % _STUDIES]
        line = Released(
            previous=head,
            at=ledger.book.last_at,
            study_hash=study.hash,
            run="run",
            round=number // _STUDIES + 1,
            attempt=0,
            request_digest=f"{number:064x}",
            event=study.round_event("a"),
        )
        body = body_of(line)
        raw = signed(body, key.sign(body))
        head = hash_of(raw)
        rows.append(raw + b"\n")
    with path.open("ab") as file:
        file.writelines(rows)
    return path, some, key


def seconds(act: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=50, help="charges that are timed")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        path, some, key = write(Path(folder), given.lines)
        reads = [seconds(lambda: Book.read(path)) for _ in range(3)]
        book = Book.read(path)
        price = seconds(lambda: book.epsilon(1e-5))
        each = seconds(lambda: [book.epsilon(1e-5, study.hash) for study in some])
        lifetime = seconds(lambda: (book.lifetime("train"), book.lifetime("validation")))
        check = seconds(lambda: cross_check(book.events("train", some[0].hash), 1e-5))
        ledger = Ledger.open(path, "a", key)
        charges = []
        for number in range(given.rounds):
            request = Request(
                kind="train", run="timed", site="a", study_hash=some[0].hash, round=number + 1
            )
            charges.append(
                seconds(lambda request=request: ledger.charge(some[0], "a", request))  # type: ignore[misc]
            )
    table = Table(box=SIMPLE, title=f"a ledger of {given.lines} lines, {_STUDIES} studies")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    for what, value in (
        ("read, chain and every signature checked", statistics.median(reads)),
        ("price all together (PLD)", price),
        ("price each study (PLD)", each),
        ("lifetime of both populations (Rényi filter)", lifetime),
        ("cross-check one study (PRV)", check),
        ("charge before a round, median", statistics.median(charges)),
        ("charge before a round, slowest", max(charges)),
    ):
        table.add_row(what, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()

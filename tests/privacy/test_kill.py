"""Rule 7 under the hardest stop: killed at any moment, a daemon has charged what it released."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.privacy.book import Book
from common.privacy.pricing import epsilon_by_population

KILLS = int(os.environ.get("FEDWARD_KILLS", "20"))


@pytest.mark.timeout(60 + 15 * KILLS)
def test_killed_at_any_moment_every_release_was_charged(
    ward: ModuleType, killing: ModuleType, tmp_path: Path, record_property: Any
) -> None:
    world, study, config = killing.make(ward, tmp_path, KILLS)
    killer = killing.Killer(world, study, tmp_path, seed=int(os.environ.get("FEDWARD_SEED", "1")))
    with killing.Nursery(config) as nursery:
        outcome = killer.run(nursery, KILLS)
        nursery.start()  # sets aside what a kill left unfinished
        nursery.kill()
    killer.check(KILLS + 2)
    book = Book.read(killer.ledger)
    charged = book.events(study_hash=study.hash)
    assert outcome.landed >= KILLS // 4, "most kills came after the answer: they prove nothing"
    assert charged.total() >= len(outcome.answers)
    # Never under-reported: the price of the ledger is at least that of what came out.
    came = {
        study.round_event("a"): outcome.kinds["train"],
        study.evaluation_event(): outcome.kinds["evaluate"],
    }
    spent = book.epsilon(1e-3, study.hash)
    for population, price in epsilon_by_population(came, 1e-3).items():
        assert spent[population] >= price > 0
    for name in ("landed", "lost", "torn"):
        record_property(name, getattr(outcome, name))
    record_property("answers", len(outcome.answers))
    record_property("charges", charged.total())
    print(
        f"{KILLS} kills: {outcome.landed} before the answer, {len(outcome.answers)} answers, "
        f"{charged.total()} charges, {outcome.lost} answers lost, {outcome.torn} lines torn"
    )

"""Prices out of a ledger, held against formulas that share nothing with the accountants."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from common.audit.prices import LARGE, figures, price
from common.audit.reading import end_of, read
from common.errors import FedwardError
from common.privacy.book import Book
from common.privacy.events import GaussianHistogram, PoissonGaussian
from common.study import Study

Makers = dict[str, Callable[..., Any]]


def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """The exact price of Gaussian releases (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(releases) / noise_multiplier

    def excess(epsilon: float) -> float:
        there = norm.cdf(mu / 2 - epsilon / mu)
        return there - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return float(brentq(excess, 0, 50))


@pytest.fixture
def book(path: Path, ledgers: Makers) -> Book:
    scribe = ledgers["small"]()
    scribe.save(path)
    return scribe.book


def test_a_ledgers_prices_are_those_of_its_events(path: Path, book: Book) -> None:
    found = price(read(path))
    rows = {row.population: row for row in found.rows}
    account = next(iter(book.studies.values()))
    assert {row.releases for row in found.rows} == {3, 1}
    for population, row in rows.items():
        assert row.delta == account.delta == 1e-6
        assert row.spent.pld == book.epsilon(account.delta)[population]
        assert row.spent.agree
        assert row.reserved.agree
        assert row.spent.prv is not None
        low, high = row.spent.prv
        assert low <= row.spent.pld <= high * 1.001
        assert row.spent.pld <= row.spent.rdp
    assert rows["train"].spent.pld < rows["train"].reserved.pld <= 2.0, "the study asks for 2"
    event = next(e for e in account.spent if isinstance(e, GaussianHistogram))
    exact = gaussian_epsilon(event.noise_multiplier, 1, 1e-6)
    assert rows["validation"].spent.pld == pytest.approx(exact, rel=2e-3)
    assert rows["validation"].spent.pld >= exact - 1e-6, "rounded pessimistically"

    events = {(e.kind, e.released, e.reserved, e.mechanisms) for e in found.events}
    assert events == {("poisson_gaussian", 3, 5, 5), ("gaussian_histogram", 1, 1, 1)}


def test_a_date_prices_what_was_spent_by_then(path: Path, book: Book) -> None:
    reading = read(path)
    first = price(reading, at=end_of("2026-03-02"), quick=True)
    assert not first.rows
    assert first.caps, "the policy was there"
    third = book.lines[3].at  # of the first release
    then = price(reading, at=end_of(third), quick=True)
    assert [row.releases for row in then.rows] == [1, 0]
    now = price(reading, quick=True)
    assert then.rows[0].spent.pld < now.rows[0].spent.pld
    assert then.rows[0].reserved.pld == now.rows[0].reserved.pld
    with pytest.raises(FedwardError, match="is no date"):
        end_of("31.1.2026")


def test_what_a_study_would_cost_on_top(path: Path, tmp_path: Path, book: Book) -> None:
    text = (
        'name = "next"\n[sources.lab]\nmodality = "series"\nencoder = "series-statistics"\n'
        'series = ["lactate"]\n[tasks.death]\n[privacy]\nepsilon = 1.5\ndelta = 1e-6\n'
        "[federation]\nrounds = 3\n"
    )
    file = tmp_path / "next.toml"
    file.write_text(f"{text}[federation.sites.st-clara]\npatients_declared = 900\n")
    found = price(read(path), what_if=str(file), quick=True)
    assert found.what_if
    assert 1.49 < found.what_if.alone["train"] <= 1.5
    assert found.what_if.now["train"] == pytest.approx(found.together[0].reserved.pld)
    assert found.what_if.now["train"] < found.what_if.then["train"] < 2.0 + 1.5
    for cap in found.caps:
        assert cap.after is not None
        assert cap.epsilon < cap.after
        assert cap.fits
    by_sum = next(cap for cap in found.caps if cap.rule == "sum")
    assert by_sum.after == pytest.approx(by_sum.epsilon + found.what_if.alone["validation"])

    big = text.replace("1.5", "12.0")
    file.write_text(f"{big}[federation.sites.st-clara]\npatients_declared = 900\n")
    assert not any(cap.fits for cap in price(read(path), what_if=str(file), quick=True).caps)
    file.write_text(f"{text}[federation.sites.north]\npatients_declared = 900\n")
    with pytest.raises(FedwardError, match=r"does not name site 'st-clara'(.|\n)*cure: add"):
        price(read(path), what_if=str(file))


def test_a_study_that_is_approved_already_sets_nothing_more_aside(
    path: Path, tmp_path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    scribe = ledgers["small"]()
    scribe.save(path)
    file = tmp_path / "same.toml"
    file.write_text(studies().to_toml())
    found = price(read(path), what_if=str(file), quick=True)
    assert found.what_if
    assert found.what_if.alone == {"train": 0.0, "validation": 0.0}
    assert all(cap.after == cap.epsilon for cap in found.caps)


def test_caps_name_rule_and_theorem(path: Path, book: Book) -> None:
    train, validation = price(read(path), quick=True).caps
    assert (train.rule, validation.rule) == ("rdp", "sum")
    assert "Rényi filter" in train.theorem
    assert "basic composition" in validation.theorem
    assert train.remaining == pytest.approx(8.0 - train.epsilon)
    assert train.epsilon == book.lifetime("train").epsilon  # type: ignore[union-attr]


def test_a_second_approval_is_marked_as_not_preset(
    path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    scribe = ledgers["small"]()
    scribe.wait(days=1).approve(studies(), runs=2)
    scribe.save(path)
    assert not any(row.preset for row in price(read(path), quick=True).rows)


def test_without_privacy_is_infinite_and_null_in_json(
    path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    scribe = ledgers["small"](virtual=True)
    scribe.approve(studies("open", private=False))
    scribe.release(studies("open", private=False))
    scribe.save(path)
    found = price(read(path))
    assert found.together[0].spent.pld == math.inf
    assert any(f.rule == "unprotected" for f in found.findings)
    shown = json.loads(found.model_dump_json())
    assert shown["together"][0]["spent"]["pld"] is None
    assert shown["together"][1]["spent"]["pld"] > 0


@pytest.mark.parametrize("noise", [1e-300, 1e-9, 0.02])
def test_prices_without_meaning_cost_no_gigabytes(noise: float) -> None:
    """PLD's grid for such noise has 10^9 points and more."""
    event = PoissonGaussian(
        sample_rate=0.1, noise_multiplier=noise, steps=10, max_grad_norm=1, denominator=1
    )
    found = figures({event: 3}, 1e-5, quick=False)
    assert found.pld == found.rdp > LARGE

"""Rule 8: events describe, prices are computed, and what is unknown is refused."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from common.errors import PrivacyError
from common.privacy.events import (
    GaussianHistogram,
    NoisyCount,
    PoissonGaussian,
    Unprotected,
    from_json,
    to_json,
)
from common.privacy.pricing import (
    LARGE,
    calibrate_gaussian,
    calibrate_noise_multiplier,
    cross_check,
    epsilon,
    epsilon_by_population,
    epsilon_rdp,
)

DELTA = 1e-5


def steps(noise_multiplier: float = 1.0, count: int = 1000, rate: float = 0.032) -> PoissonGaussian:
    return PoissonGaussian(
        sample_rate=rate,
        noise_multiplier=noise_multiplier,
        steps=count,
        max_grad_norm=1.0,
        denominator=64.0,
    )


@pytest.mark.parametrize(
    ("sigma", "count", "pld", "rdp"), [(1, 1000, 6.589, 7.239), (2, 5000, 5.514, 5.959)]
)
def test_published_prices(sigma, count, pld, rdp):
    event = steps(sigma, count)
    assert epsilon([event], DELTA) == pytest.approx(pld, abs=3e-3)
    assert epsilon_rdp([event], DELTA) == pytest.approx(rdp, rel=2e-3)
    assert epsilon([event], DELTA) < epsilon_rdp([event], DELTA)


def test_gaussian_price_is_the_analytic_one():
    """Balle and Wang 2018: delta(eps) = Phi(1/2z - eps z) - e^eps Phi(-1/2z - eps z)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    z = 3.0
    price = epsilon([NoisyCount(population="train", noise_multiplier=z)], DELTA)
    delta = phi(0.5 / z - price * z) - math.exp(price) * phi(-0.5 / z - price * z)
    assert delta <= DELTA * (1 + 1e-6)
    assert delta == pytest.approx(DELTA, rel=0.02)


def test_rounds_compose_to_the_price_of_the_whole():
    whole = epsilon([steps(count=1000)], DELTA)
    assert epsilon([steps(count=100)] * 10, DELTA) == whole
    assert epsilon([steps(count=400)], DELTA) < whole
    assert epsilon([steps(count=0)], DELTA) == epsilon([], DELTA) == 0.0


def test_populations_are_priced_apart_and_unprotected_is_infinite():
    histograms = GaussianHistogram(noise_multiplier=10.0, count=4)
    prices = epsilon_by_population([steps(), histograms], DELTA)
    assert prices == {
        "train": epsilon([steps()], DELTA),
        "validation": epsilon([histograms], DELTA),
    }
    prices = epsilon_by_population([steps(), histograms, Unprotected(population="train")], DELTA)
    assert prices["train"] == math.inf
    assert prices["validation"] < math.inf


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_calibrated_noise_prices_just_below_the_target(target):
    sigma = calibrate_noise_multiplier(target, DELTA, 0.1, 220)
    assert sigma == round(sigma, 4)
    assert epsilon([steps(sigma, 220, 0.1)], DELTA) <= target
    assert epsilon([steps(sigma - 1e-4, 220, 0.1)], DELTA) > target


def test_calibrated_gaussian_prices_just_below_the_target():
    z = calibrate_gaussian(1.0, DELTA, 3)
    assert 0.99 < epsilon([GaussianHistogram(noise_multiplier=z, count=3)], DELTA) <= 1.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: calibrate_noise_multiplier(0.0, DELTA, 0.1, 10), "epsilon = 0"),
        (lambda: calibrate_noise_multiplier(-1.0, DELTA, 0.1, 10), "epsilon = -1"),
        (lambda: calibrate_noise_multiplier(math.inf, DELTA, 0.1, 10), "epsilon = inf"),
        (lambda: calibrate_noise_multiplier(1.0, 0.0, 0.1, 10), "delta = 0"),
        (lambda: calibrate_noise_multiplier(1.0, 1.0, 0.1, 10), "delta = 1"),
        (lambda: calibrate_noise_multiplier(1.0, DELTA, 0.0, 10), "sample_rate = 0"),
        (lambda: calibrate_noise_multiplier(1.0, DELTA, 1.5, 10), "sample_rate = 1.5"),
        (lambda: calibrate_noise_multiplier(1.0, DELTA, 0.1, 0), "steps = 0"),
        (lambda: calibrate_gaussian(1.0, DELTA, 0), "steps = 0"),
        (lambda: epsilon([steps()], 1.5), "delta = 1.5"),
        (lambda: epsilon([steps()], DELTA, "gdp"), "under-reports"),
        (lambda: epsilon([steps()], DELTA, "moments"), "accountant 'moments' is refused"),
        (lambda: epsilon([{"kind": "laplace"}], DELTA), "no price is known .* dict"),
    ],
)
def test_what_is_no_privacy_or_unknown_is_refused(call, match):
    with pytest.raises(PrivacyError, match=match):
        call()


@pytest.mark.parametrize(
    "event",
    [
        steps(1.2345, 7),
        GaussianHistogram(noise_multiplier=3.5, count=2),
        NoisyCount(population="train", noise_multiplier=10.0),
        Unprotected(population="validation"),
    ],
    ids=lambda e: e.kind,
)
def test_events_survive_json(event):
    line = to_json(event)
    assert "\n" not in line
    assert "epsilon" not in line
    assert from_json(line) == event


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "laplace", "population": "train"}',
        '{"kind": "noisy_count", "population": "train", "noise_multiplier": 1.0, "surprise": 1}',
        '{"kind": "noisy_count", "population": "train", "noise_multiplier": -1.0}',
        '{"kind": "noisy_count", "population": "staff", "noise_multiplier": 1.0}',
        '{"kind": "noisy_count", "population": "train", "unit": "stay", "noise_multiplier": 1.0}',
        "not json",
    ],
)
def test_unreadable_event_is_refused_not_guessed(line):
    with pytest.raises(PrivacyError, match="not a release event"):
        from_json(line)


def test_events_are_frozen():
    with pytest.raises(ValidationError):
        steps().steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "events",
    [
        [steps(1.0, 1000)],
        [steps(0.8, 300, 0.01), steps(3.0, 200, 0.2)],
        [NoisyCount(population="train", noise_multiplier=3.0, count=2)],
        [steps(5.0, 50, 0.5), NoisyCount(population="train", noise_multiplier=10.0)],
    ],
)
def test_an_independent_accountant_agrees_within_the_stated_tolerance(events):
    """PRV bounds the true value from both sides and shares no code with PLD."""
    check = cross_check(events, DELTA)
    assert check.agree
    assert check.prv_upper - check.prv_lower <= 0.03
    assert check.pld <= check.rdp


def test_a_price_that_under_reports_does_not_pass_the_cross_check():
    check = cross_check([steps(1.0, 1000)], DELTA)
    gaussian_dp = 6.092  # what the central limit approximation says of these steps
    assert not check._replace(pld=gaussian_dp).agree
    assert not check._replace(pld=check.pld * 1.01).agree
    assert not check._replace(rdp=check.pld * 0.9).agree


def test_nothing_and_everything_cross_check():
    assert cross_check([], DELTA).agree
    assert cross_check([Unprotected(population="train")], DELTA).agree


@pytest.mark.parametrize("noise", [1e-300, 1e-6, 1e-3, 0.02])
def test_a_noise_that_protects_nobody_is_priced_in_no_time(noise):
    """PLD's grid would take gigabytes; Renyi DP bounds the price from above."""
    event = NoisyCount(population="train", noise_multiplier=noise)
    price = epsilon([event], DELTA)
    assert price > LARGE
    assert math.isinf(price) or price >= (1 / noise - 4.3) / (2 * noise)
    assert cross_check([event], DELTA).agree


@pytest.mark.parametrize(
    ("rate", "noise", "count"), [(0.01, 100.0, 10**10), (0.5, 1e6, 10**10), (1e-9, 1.0, 10**6)]
)
def test_nothing_that_a_coordinator_may_ask_takes_long_to_price(rate, noise, count):
    """PLD would swell to gigabytes, PRV take minutes: a bound stands in."""
    events = [steps(noise, count, rate)]
    assert 0 <= epsilon(events, DELTA) <= epsilon_rdp(events, DELTA) * (1 + 1e-3) + 0.01
    assert cross_check(events, DELTA).agree

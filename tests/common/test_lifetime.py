"""Lifetime caps: a Renyi filter at a fixed order, or the sum of (epsilon, delta)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.events import (
    GaussianHistogram,
    NoisyCount,
    PoissonGaussian,
    ReleaseEvent,
    Unprotected,
)
from common.privacy.lifetime import Cap, Commitment, Spending, spending
from common.privacy.pricing import epsilon, epsilon_at_order

DELTA = 1e-5


def steps(noise_multiplier: float = 2.0, count: int = 100, rate: float = 0.05) -> PoissonGaussian:
    return PoissonGaussian(
        sample_rate=rate,
        noise_multiplier=noise_multiplier,
        steps=count,
        max_grad_norm=1.0,
        denominator=10.0,
    )


def spent(cap: Cap, *events: ReleaseEvent, delta: float = DELTA) -> Spending:
    return spending([Commitment(delta, {event: 1}) for event in events], "train", cap)


def test_a_gaussian_at_one_order_is_the_formula_by_hand() -> None:
    """RDP_a of a Gaussian is a/(2 z²); Canonne, Kamath and Steinke 2020, proposition 12."""
    z, order, count = 3.0, 7, 4
    event = NoisyCount(population="train", noise_multiplier=z, count=count)
    divergence = count * order / (2 * z**2)
    by_hand = divergence + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)
    assert epsilon_at_order([event], DELTA, order) == pytest.approx(by_hand, rel=1e-9)
    assert epsilon_at_order([event] * 2, DELTA, order) == pytest.approx(by_hand + divergence)


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0, 30.0])
def test_the_default_order_wastes_little(target: float) -> None:
    """Of all orders, the default one admits about the most Gaussian noise."""
    cap = Cap(epsilon=target, delta=DELTA)
    z = next(
        z
        for z in (1.05**n for n in range(-60, 200))
        if epsilon_at_order([NoisyCount(population="train", noise_multiplier=z)], DELTA, cap.order)
        <= target
    )
    event = NoisyCount(population="train", noise_multiplier=z)
    best = min(epsilon_at_order([event], DELTA, order) for order in range(2, 200))
    assert epsilon_at_order([event], DELTA, cap.order) <= best * 1.08


def test_the_filter_is_over_all_studies_together_and_never_below_their_price() -> None:
    cap = Cap(epsilon=10.0, delta=DELTA)
    one, both = spent(cap, steps()), spent(cap, steps(), steps(1.5))
    assert one.epsilon < both.epsilon < 2 * one.epsilon
    assert both.epsilon >= epsilon([steps(), steps(1.5)], DELTA)
    assert both.delta == DELTA


def test_the_sum_adds_both_epsilon_and_delta() -> None:
    cap = Cap(epsilon=10.0, delta=2 * DELTA, rule="sum")
    found = spent(cap, steps(), steps(1.5))
    assert found.epsilon == pytest.approx(epsilon([steps()], DELTA) + epsilon([steps(1.5)], DELTA))
    assert found.delta == 2 * DELTA
    assert found.within
    assert not spent(cap, steps(), steps(), steps()).within, "its delta is spent"


def test_a_study_of_validation_patients_spends_nothing_of_the_others() -> None:
    cap = Cap(epsilon=1.0)
    assert spent(cap, GaussianHistogram(noise_multiplier=1.0, count=9)) == (0.0, 0.0, cap)


def test_without_protection_is_infinite_unless_the_policy_leaves_it_out() -> None:
    cap = Cap(epsilon=1.0)
    bare = [Commitment(DELTA, {Unprotected(population="train"): 1, steps(8.0): 1})]
    assert spending(bare, "train", cap).epsilon == math.inf
    assert not spending(bare, "train", cap).within
    assert spending(bare, "train", cap, protected=True).epsilon == spent(cap, steps(8.0)).epsilon


@settings(max_examples=40, deadline=None)
@given(
    noises=st.lists(st.floats(0.7, 20), min_size=1, max_size=4),
    rate=st.floats(0.01, 1.0),
    count=st.integers(1, 200),
    rule=st.sampled_from(["rdp", "sum"]),
)
def test_spending_only_grows_and_bounds_the_price(
    noises: list[float], rate: float, count: int, rule: str
) -> None:
    cap = Cap.model_validate({"epsilon": 5.0, "delta": DELTA, "rule": rule})
    events = [steps(noise, count, rate) for noise in noises]
    history = [spent(cap, *events[:n]).epsilon for n in range(len(events) + 1)]
    assert history == sorted(history)
    if rule == "rdp":
        assert history[-1] >= epsilon(events, DELTA) * (1 - 2e-3)
    else:
        assert history[-1] >= epsilon(events, len(events) * DELTA) * (1 - 2e-3)

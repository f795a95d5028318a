"""Bounds that hold, and are worth having, on mechanisms whose epsilon is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from common.privacy.events import PoissonGaussian
from common.privacy.pricing import epsilon
from simulations.attack.bounds import (
    Guesses,
    TradeOff,
    f_dp_bound,
    guess,
    steinke_bound,
    steinke_p_value,
)


def gaussian_event(noise: float, steps: int, rate: float = 1.0) -> PoissonGaussian:
    return PoissonGaussian(
        sample_rate=rate, noise_multiplier=noise, steps=steps, max_grad_norm=1.0, denominator=1.0
    )


def ideal_game(rng: np.random.Generator, m: int, mu: float) -> list[Guesses]:
    """Each canary is seen through N(0, 1) or N(mu, 1), independently of the others."""
    included = rng.random(m) < 0.5
    return guess(mu * included + rng.normal(size=m), included)


def test_guesses_take_the_extremes_and_count_what_is_right():
    scores = np.array([5.0, -3.0, 0.0, 4.0, -2.0, 1.0, 0.5, 0.1, 3.0, -4.0])
    included = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    assert guess(scores, included, cuts=(0.2, 0.6)) == [Guesses(10, 2, 2), Guesses(10, 6, 4)]


# -- Steinke, Nasr and Jagielski ----------------------------------------------------------------


def test_p_value_is_theorem_5_2_written_out():
    m, r, v, claimed, delta = 40, 20, 17, 1.0, 1e-3
    p = math.e**claimed / (1 + math.e**claimed)
    pmf = [math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(r + 1)]
    worst = max(sum(pmf[v - i : v]) / i for i in range(1, v + 1))
    wanted = sum(pmf[v:]) + 2 * m * delta * worst
    assert steinke_p_value(Guesses(m, r, v), claimed, delta) == pytest.approx(wanted, rel=1e-9)


def test_perfect_guesses_give_the_closed_form():
    m, error = 1000, 0.05
    accuracy = error ** (1 / m)  # of m guesses, all right
    bound = steinke_bound([Guesses(m, m, m)], 0.0, error)
    assert bound.epsilon == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=0.01)
    assert steinke_bound([Guesses(m, 500, 250)], 1e-5, error).epsilon == 0


def test_steinke_bound_errs_no_more_often_than_it_says_and_is_tight_on_randomised_response():
    rng, truth, m, error = np.random.default_rng(0), 1.0, 2000, 0.2
    right = rng.binomial(m, 1 / (1 + math.exp(-truth)), size=400)
    bound_of = {
        v: steinke_bound([Guesses(m, m, v)], 0.0, error).epsilon for v in set(right.tolist())
    }
    bounds = [bound_of[v] for v in right.tolist()]
    wrong = sum(b > truth for b in bounds)
    assert wrong <= 400 * error + 4 * math.sqrt(400 * error * (1 - error))
    assert wrong > 20  # as it must be: this mechanism is the worst case
    assert np.mean(bounds) > 0.9


def test_more_numbers_of_guesses_cost_a_share_of_the_error():
    one = Guesses(1000, 200, 160)
    alone = steinke_bound([one], 1e-5, 0.05).epsilon
    with_others = steinke_bound([one, Guesses(1000, 100, 50)], 1e-5, 0.05)
    assert with_others.guesses == one
    assert with_others.epsilon < alone
    assert with_others.epsilon == steinke_bound([one], 1e-5, 0.025).epsilon


# -- Mahloujifar, Melis and Chaudhuri -----------------------------------------------------------


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_trade_off_of_a_gaussian_lies_below_the_exact_curve_and_close(mu):
    curve = TradeOff.gaussian(mu)
    y = np.linspace(0.001, 0.999, 500)
    exact = stats.norm.cdf(stats.norm.ppf(y) - mu)
    ours = np.array([curve.phi(float(v)) for v in y])
    assert (ours <= exact + 1e-9).all()
    assert (exact - ours).max() < 2e-3


def test_trade_off_of_unsampled_dp_sgd_is_the_gaussians():
    noise, steps = 6.0, 16
    curve, exact = TradeOff.of(gaussian_event(noise, steps)), TradeOff.gaussian(4 / noise)
    for y in (0.01, 0.1, 0.5, 0.9):
        assert curve.phi(y) == pytest.approx(exact.phi(y), abs=3e-3)
        assert curve.phi(y) <= stats.norm.cdf(stats.norm.ppf(y) - 4 / noise) + 1e-9


def test_one_canary_is_guessed_right_with_the_accuracy_of_the_best_test():
    """Of N(0, 1) against N(mu, 1), each with probability 1/2, that is Phi(mu / 2)."""
    mu = 1.2
    best = float(stats.norm.cdf(mu / 2))
    assert not TradeOff.gaussian(mu).refuted(Guesses(1, 1, 1), best - 2e-3)
    assert TradeOff.gaussian(mu).refuted(Guesses(1, 1, 1), best + 2e-3)


def test_true_curve_is_refuted_no_more_often_than_the_error():
    rng, mu, error = np.random.default_rng(1), 1.0, 0.2
    truth, half = TradeOff.gaussian(mu), TradeOff.gaussian(mu / 2)
    games = [ideal_game(rng, 1000, mu)[2] for _ in range(300)]
    assert sum(truth.refuted(g, error) for g in games) <= 300 * error
    assert sum(half.refuted(g, error) for g in games) >= 297


def test_both_bounds_lie_below_the_truth_and_where_they_were_measured_before():
    """Ideal canaries, m = 1000, of 100 unsampled steps with noise 6: epsilon 8.00; an independent
    implementation bounded it by 3.0 and 4.6 on average."""
    rng, event = np.random.default_rng(2), gaussian_event(6.0, 100)
    games = [ideal_game(rng, 1000, 10 / 6) for _ in range(12)]
    steinke = [steinke_bound(g, 1e-5, 0.05).epsilon for g in games]
    f_dp = [f_dp_bound(g, event, 1e-5, 0.05).epsilon for g in games]
    assert epsilon([event], 1e-5) == pytest.approx(8.0, abs=0.02)
    assert max(steinke + f_dp) < 8.0
    assert np.mean(steinke) == pytest.approx(3.0, abs=0.4)
    assert np.mean(f_dp) == pytest.approx(4.6, abs=0.6)


def test_guesses_at_random_bound_nothing():
    event = gaussian_event(5.0, 20, rate=0.5)
    guesses = [Guesses(2000, r, r // 2) for r in (100, 400, 1600)]
    assert f_dp_bound(guesses, event, 1e-5, 0.05).epsilon < 0.2
    assert steinke_bound(guesses, 1e-5, 0.05).epsilon == 0

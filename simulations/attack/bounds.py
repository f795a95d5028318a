"""Lower bounds on epsilon from guesses about many canaries in one run.

The game: each of m canaries is in the data with probability 1/2, independently; whoever sees the
releases guesses for r of them, chosen as they like, whether they are in. v guesses are right. Too
many right guesses for a mechanism of some epsilon refute that epsilon.

Two refutations, neither of which assumes anything about the attack:

* **Steinke, Nasr and Jagielski 2023** ("Privacy auditing with one (1) training run", theorem 5.2):
  under (epsilon, delta), v is dominated by B ~ Binomial(r, e^eps / (1 + e^eps)) up to

      Pr[V >= v] <= Pr[B >= v] + 2 m delta · max_{1 <= i <= v} Pr[v - i <= B < v] / i.

* **Mahloujifar, Melis and Chaudhuri 2024** ("Auditing f-differential privacy in one run"): under
  the mechanism's own trade-off curve f. With p_i = Pr[exactly i right], flipping one canary's bit
  turns "right, and i right in all" into "wrong, and i - 1 right in all". Averaged over the canaries
  (f is convex), for every i

      R_i <= 1 - f(H_{i-1}),   R_i = Σ_{l >= i} (l/m) p_l,   H_i = Σ_{l >= i} ((r - l)/m) p_l,

  while R_0 + H_0 = r/m. From Pr[V >= v] = tau, so R_v >= tau·v/m, the least masses that satisfy
  this are found downwards, p_i = max(0, phi(R_{i+1}) - H_{i+1}) · m / (r - i) with phi the inverse
  of 1 - f. If they exceed r/m in sum, then Pr[V >= v] < tau. It is tighter, as it knows that a
  Gaussian gives away little with certainty.

How many guesses are best is not known beforehand. Every number tried, under either bound, gets its
equal part of the error: a Bonferroni correction.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.privacy.events import PoissonGaussian
from common.privacy.pricing import epsilon

CUTS = (0.05, 0.1, 0.2, 0.4, 0.8)  # numbers of guesses tried, as fractions of m
_LARGEST = 20.0  # epsilon beyond which no bound looks
_INTERVAL = 5e-3  # of the discretised privacy loss; rounded so that bounds can only fall


@dataclass(frozen=True)
class Guesses:
    """One way to have guessed.

    Attributes:
        canaries: m.
        made: r, guesses made; the rest was passed over.
        right: v.
    """

    canaries: int
    made: int
    right: int


@dataclass(frozen=True)
class Bound:
    """Epsilon is at least `epsilon`, but for the error that the bound was given."""

    epsilon: float
    guesses: Guesses


def guess(
    scores: NDArray[np.float64], included: NDArray[np.bool_], cuts: Sequence[float] = CUTS
) -> list[Guesses]:
    """For each cut, guesses "in" for the highest scores and "out" for as many of the lowest."""
    order = np.argsort(scores)
    made = []
    for cut in cuts:
        half = max(1, round(cut * len(scores) / 2))
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        made.append(Guesses(len(scores), 2 * half, right))
    return made


def steinke_p_value(guesses: Guesses, claimed: float, delta: float) -> float:
    """Upper bound of the chance of so many right guesses under (claimed, delta)."""
    of_right = stats.binom(guesses.made, 1 / (1 + np.exp(-claimed)))
    at_least = float(of_right.sf(guesses.right - 1))
    below = np.cumsum(of_right.pmf(np.arange(guesses.right)[::-1]))
    worst = float((below / np.arange(1, guesses.right + 1)).max(initial=0.0))
    return min(1.0, at_least + 2 * guesses.canaries * delta * worst)


def steinke_bound(guesses: Sequence[Guesses], delta: float, error: float) -> Bound:
    """The best bound of all, at `error` for them together."""
    each = error / len(guesses)

    def bound(of: Guesses) -> Bound:
        return Bound(_last_refuted(lambda e: steinke_p_value(of, e, delta) <= each), of)

    return max((bound(of) for of in guesses), key=lambda b: b.epsilon)


class TradeOff:
    """Lower bound of a mechanism's trade-off curve f: the least type-II error of a test of one
    patient's presence, at each type-I error.

    f is the envelope of the (epsilon, delta) that the mechanism satisfies in both directions of
    add/remove (Dong, Roth and Su 2022, proposition 2.12); a subset of them bounds it from below.

    Args:
        epsilons: At least 0, rising.
        deltas: Of each.
    """

    def __init__(self, epsilons: NDArray[np.float64], deltas: NDArray[np.float64]) -> None:
        grow, shrink = np.exp(epsilons), np.exp(-epsilons)
        # phi(y) = min x with 1 - f(x) >= y is the largest of the lines slope · y + offset.
        slopes = np.concatenate([shrink[::-1], grow])
        offsets = np.concatenate([-(shrink * deltas)[::-1], 1 - deltas - grow])
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings = np.diff(offsets) / -np.diff(slopes)
        kept = np.isfinite(crossings)
        self._lines = list(zip(slopes[np.r_[True, kept]], offsets[np.r_[True, kept]], strict=True))
        self._crossings = np.maximum.accumulate(crossings[kept]).tolist()

    @classmethod
    def gaussian(cls, mu: float) -> TradeOff:
        """Of N(0, 1) against N(mu, 1) (Balle and Wang 2018, theorem 8)."""
        epsilons = np.linspace(0, _LARGEST, 2001)
        first = stats.norm.cdf(mu / 2 - epsilons / mu)
        return cls(epsilons, first - np.exp(epsilons + stats.norm.logcdf(-mu / 2 - epsilons / mu)))

    @classmethod
    def of(cls, event: PoissonGaussian) -> TradeOff:
        """Of DP-SGD, by its privacy loss distribution, rounded pessimistically."""
        return cls(*_profile(event.sample_rate, event.noise_multiplier, event.steps))

    def phi(self, y: float) -> float:
        """Least type-I error at which the power may be y."""
        slope, offset = self._lines[bisect_right(self._crossings, y)]
        return max(0.0, slope * y + offset)

    def refuted(self, guesses: Guesses, error: float) -> bool:
        """Whether so many right guesses have a chance below `error` under this curve."""
        m, r, v = guesses.canaries, guesses.made, guesses.right
        right, wrong = error * v / m, error * (r - v) / m  # R_v and H_v
        for i in range(v - 1, -1, -1):
            lacking = self.phi(right) - wrong
            if lacking > 0:
                wrong += lacking
                right += lacking * i / (r - i)
            if right + wrong > r / m:
                return True
        return False


def f_dp_bound(
    guesses: Sequence[Guesses], event: PoissonGaussian, delta: float, error: float
) -> Bound:
    """The best bound of all, at `error` for them together: the epsilon of the least noise that, at
    the event's sample rate and steps, is refuted. Looked for between an eighth and eight times of
    the event's noise, to 1 %; 0 if nothing there is refuted."""
    each = error / len(guesses)

    def with_noise(noise: float) -> PoissonGaussian:
        return event.model_copy(update={"noise_multiplier": round(noise, 4)})

    def refuted(noise: float) -> Guesses | None:
        curve = TradeOff.of(with_noise(noise))
        return next((of for of in guesses if curve.refuted(of, each)), None)

    low, high = event.noise_multiplier / 8, event.noise_multiplier * 8
    best = refuted(high)
    if best is None:
        return Bound(0.0, guesses[0])
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        if (found := refuted(middle)) is None:
            low = middle
        else:
            high, best = middle, found
    return Bound(epsilon([with_noise(high)], delta), best)


def _last_refuted(refuted: Callable[[float], bool]) -> float:
    """Largest epsilon that is refuted, to 0.005; 0 if none is."""
    low, high = 0.0, _LARGEST
    if not refuted(low):
        return 0.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def _profile(
    sample_rate: float, noise_multiplier: float, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(epsilon, delta(epsilon)) of the mechanism, the worse of add and remove."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    one = pld.from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=_INTERVAL,
    )
    epsilons = np.linspace(0, _LARGEST, 801)
    deltas = one.self_compose(steps).get_delta_for_epsilon(epsilons.tolist())
    return epsilons, np.clip(np.asarray(deltas, dtype=float), 0, 1)

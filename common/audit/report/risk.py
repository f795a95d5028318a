"""What epsilon and delta mean for a patient: how well anyone can guess that they took part.

The guesser knows everything that left the hospital and everything else in the world but whether one
given patient was there, which a fair coin decided. For (epsilon, delta)-DP the guess is right with
probability at most (e^epsilon + delta) / (1 + e^epsilon), and true-positive less false-positive
rate is at most (e^epsilon - 1 + 2 delta) / (e^epsilon + 1) (Kairouz, Oh and Viswanath 2015;
Humphries et al. 2023).

The bound holds at every delta at which the releases have an epsilon. The best over several deltas
is sharper: at epsilon 0 it is the total variation distance itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.privacy.events import ReleaseEvent
from common.privacy.pricing import LARGE, epsilon

_DELTAS = (1e-3, 0.02, 0.07, 0.13, 0.2, 0.3, 0.45, 0.65, 0.9)


@dataclass(frozen=True)
class Risk:
    """Of one population, after some releases.

    Attributes:
        advantage: Bound on true-positive less false-positive rate, from epsilon and delta alone.
        accuracy: Bound on the probability of a right guess; 0.5 is a coin's.
        sharper: Bound on the same probability from the releases themselves; None where only a cap
            is known.
    """

    epsilon: float
    delta: float
    advantage: float
    accuracy: float
    sharper: float | None


def risk_of(some: Mapping[ReleaseEvent, int], delta: float) -> Risk:
    """The risk from releases of one population."""
    found = epsilon(some, delta)
    best = advantage(found, delta)
    if 0 < found <= LARGE:
        best = min(best, *(advantage(epsilon(some, d), d) for d in _DELTAS))
    return Risk(found, delta, advantage(found, delta), accuracy(found, delta), (1 + best) / 2)


def risk_at(epsilon: float, delta: float) -> Risk:
    """The risk where only the bound is known."""
    return Risk(epsilon, delta, advantage(epsilon, delta), accuracy(epsilon, delta), None)


def advantage(epsilon: float, delta: float) -> float:
    """Largest true-positive less false-positive rate of any guesser, in [0, 1]."""
    if epsilon == 0 and delta == 0:
        return 0.0
    return min(1.0, math.tanh(epsilon / 2) + 2 * delta / (1 + math.exp(min(epsilon, 700.0))))


def accuracy(epsilon: float, delta: float) -> float:
    """Largest probability of a right guess at even odds, in [0.5, 1]."""
    return (1 + advantage(epsilon, delta)) / 2

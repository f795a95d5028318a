"""Price releases: from events to epsilon, and from a target epsilon to the noise it takes.

Prices are privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022) composed by
dp_accounting for add/remove adjacency, rounded pessimistically: a true upper bound. An independent
accountant (RDP, Mironov 2017) cross-checks; it over-reports by 8-12 % for DP-SGD. Gaussian DP's
central limit approximation *under*-reports (6.09 where 6.59 is true for sigma 1, q .032, 1000
steps) and is refused.

The events of one call must have been fixed before the first of them ran: PLD composes preset
mechanisms. Events of different populations concern disjoint patients; price each apart
(`epsilon_by_population`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from common.errors import PrivacyError
from common.privacy.events import (
    GaussianHistogram,
    NoisyCount,
    PoissonGaussian,
    ReleaseEvent,
    Unprotected,
)

Accountant = Literal["pld", "rdp"]

_LOSS_INTERVAL = 1e-3  # of the discretised PLD: 0.02 % above the price at 1e-4, 5-10 times faster
_GRID = 1e-4  # noise multipliers are calibrated to, rounded up
_LARGEST = 10**10  # grid points: a multiplier of a million

# What a price depends on: (sample rate, noise multiplier, compositions).
_Mechanism = tuple[float, float, int]


def epsilon(events: Iterable[ReleaseEvent], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at `delta` of all events together, as if they concerned the same patients.

    Args:
        events: Releases, in any order. Equal mechanisms are merged before they are composed.
        delta: Probability in (0, 1); below 1 / patients to mean anything.
        accountant: "pld" (the price) or "rdp" (the cross-check, never lower in earnest).

    Returns:
        Epsilon >= 0; infinity once anything was released unprotected.

    Raises:
        PrivacyError: delta outside (0, 1), an event or an accountant not known here.
    """
    _check_delta(delta)
    if accountant not in ("pld", "rdp"):
        why = ": Gaussian DP under-reports epsilon" if str(accountant).lower() == "gdp" else ""
        raise PrivacyError(
            f"accountant {accountant!r} is refused{why}", cure="use 'pld' or, to compare, 'rdp'"
        )
    compositions: dict[tuple[float, float], int] = defaultdict(int)
    unprotected = False
    for event in events:
        if isinstance(event, Unprotected):
            unprotected = True
        elif isinstance(event, PoissonGaussian):
            compositions[event.sample_rate, event.noise_multiplier] += event.steps
        elif isinstance(event, GaussianHistogram | NoisyCount):
            compositions[1.0, event.noise_multiplier] += event.count
        else:
            raise PrivacyError(
                f"no price is known for a release of type {type(event).__name__}",
                cure="describe the release by an event of common.privacy.events",
            )
    if unprotected:
        return math.inf
    mechanisms = tuple(sorted((q, z, n) for (q, z), n in compositions.items() if n))
    return _price(mechanisms, delta, accountant) if mechanisms else 0.0


def epsilon_rdp(events: Iterable[ReleaseEvent], delta: float) -> float:
    """`epsilon` by the independent accountant: an upper bound that shares no code with PLD."""
    return epsilon(events, delta, "rdp")


def epsilon_by_population(events: Iterable[ReleaseEvent], delta: float) -> dict[str, float]:
    """Epsilon of each population that any event touched. They are disjoint: a patient's epsilon is
    that of their own population, and the site's the larger of them."""
    parted: dict[str, list[ReleaseEvent]] = defaultdict(list)
    for event in events:
        parted[event.population].append(event)
    return {population: epsilon(some, delta) for population, some in sorted(parted.items())}


def calibrate_noise_multiplier(
    target_epsilon: float, delta: float, sample_rate: float, steps: int
) -> float:
    """Least noise multiplier, to 4 decimals, whose `steps` DP-SGD steps price at <= the target.

    Calibrate over the declared rounds plus spare ones: a lost round is charged too.

    Raises:
        PrivacyError: target_epsilon <= 0, delta or sample_rate out of range, steps < 1, or a
            target that no reasonable noise reaches.
    """
    _check_delta(delta)
    _check(0 < target_epsilon < math.inf, "epsilon", target_epsilon, "a finite number above 0")
    _check(0 < sample_rate <= 1, "sample_rate", sample_rate, "a probability in (0, 1]")
    _check(steps >= 1, "steps", steps, "at least 1")
    return _calibrate(float(target_epsilon), float(delta), float(sample_rate), int(steps))


def calibrate_gaussian(target_epsilon: float, delta: float, releases: int) -> float:
    """Least noise multiplier, to 4 decimals, at which `releases` unsampled Gaussian releases of the
    same patients price at <= the target. Errors as in `calibrate_noise_multiplier`."""
    return calibrate_noise_multiplier(target_epsilon, delta, 1.0, releases)


@lru_cache(maxsize=4096)
def _price(mechanisms: tuple[_Mechanism, ...], delta: float, accountant: Accountant) -> float:
    # Imported late: it brings scipy.stats, seconds that relay and help pages need not wait for.
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    add_remove = NeighboringRelation.ADD_OR_REMOVE_ONE
    if accountant == "rdp":
        ledger = RdpAccountant(neighboring_relation=add_remove)
    else:
        ledger = PLDAccountant(add_remove, value_discretization_interval=_LOSS_INTERVAL)
    for sample_rate, noise_multiplier, count in mechanisms:
        one: dp_event.DpEvent = dp_event.GaussianDpEvent(noise_multiplier)
        if sample_rate < 1:
            one = dp_event.PoissonSampledDpEvent(sample_rate, one)
        ledger.compose(one, count)
    return max(0.0, float(ledger.get_epsilon(delta)))


@lru_cache(maxsize=4096)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int) -> float:
    def fits(points: int) -> bool:
        return _price(((sample_rate, round(points * _GRID, 4), steps),), delta, "pld") <= target

    enough = round(1 / _GRID)
    while fits(enough) and enough > 1:  # down by halves: tiny multipliers are slow to price
        enough //= 2
    too_little, enough = enough, 2 * enough
    while not fits(enough):
        too_little, enough = enough, 2 * enough
        if enough > _LARGEST:
            raise PrivacyError(
                f"epsilon {target} at delta {delta} is out of reach of {steps} steps",
                cure="raise epsilon, or lower the steps or the sample rate",
            )
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if fits(middle):
            enough = middle
        else:
            too_little = middle
    return round(enough * _GRID, 4)


def _check_delta(delta: float) -> None:
    _check(0 < delta < 1, "delta", delta, "a probability in (0, 1), below 1 / patients")


def _check(holds: bool, name: str, value: float, cure: str) -> None:
    if not holds:
        raise PrivacyError(f"{name} = {value} means no privacy", cure=f"{name} must be {cure}")

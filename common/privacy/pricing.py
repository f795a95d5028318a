"""Price releases: from events to epsilon, and from a target epsilon to the noise it takes.

Prices are privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022) composed by
dp_accounting for add/remove adjacency, rounded pessimistically: a true upper bound. Two others
cross-check (`cross_check`): Renyi DP (Mironov 2017; another method of the same package), which
over-reports by 8-12 % for DP-SGD and so bounds from above, and privacy random variables (PRV; Gopi,
Lee and Wutschitz 2021), of another package, which bound the true value from both sides. Gaussian
DP's central limit approximation *under*-reports (6.09 where 6.59 is true for sigma 1, q .032, 1000
steps) and is refused.

The events of one call must have been fixed before the first of them ran: PLD composes preset
mechanisms. Events of different populations concern disjoint patients; price each apart
(`epsilon_by_population`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from common.errors import PrivacyError
from common.privacy.events import (
    GaussianHistogram,
    NoisyCount,
    PoissonGaussian,
    ReleaseEvent,
    Unprotected,
)

Accountant = Literal["pld", "rdp"]
Events = Iterable[ReleaseEvent] | Mapping[ReleaseEvent, int]
"""Releases, in any order; a mapping says how often each was made."""

LARGE = 500.0
"""Epsilon above which PLD's grid would take minutes and gigabytes, and no figure means anything:
Renyi DP's bound, which is never below, is the price there."""

_COMPOSITIONS = 10**6
"""In all, above which PLD's rounding of each would swell the grid: RDP's bound there as well."""

_LOSS_INTERVAL = 1e-3  # of the discretised PLD: 0.02 % above the price at 1e-4, 5-10 times faster
_GRID = 1e-4  # noise multipliers are calibrated to, rounded up
_LARGEST = 10**10  # grid points: a multiplier of a million
_PRV_ERROR = 0.01  # of the interval that PRV proves, in epsilon; a five hundredth of large ones
_ROUNDING = 1e-3  # by which PLD's own discretisation may lie above

# What a price depends on: (sample rate, noise multiplier, compositions).
_Mechanism = tuple[float, float, int]


def epsilon(events: Events, delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at `delta` of all events together, as if they concerned the same patients.

    Args:
        events: Equal mechanisms are merged before they are composed.
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
    mechanisms = _mechanisms(events)
    if mechanisms is None:
        return math.inf
    if not mechanisms:
        return 0.0
    try:
        if accountant == "pld" and _is_large(mechanisms, delta):
            accountant = "rdp"
        return _price(mechanisms, delta, accountant)
    except ArithmeticError:  # noise so small that nothing can be computed from it
        return math.inf


def epsilon_rdp(events: Events, delta: float) -> float:
    """`epsilon` by Renyi DP: an upper bound by another method."""
    return epsilon(events, delta, "rdp")


def epsilon_by_population(events: Events, delta: float) -> dict[str, float]:
    """Epsilon of each population that any event touched. They are disjoint: a patient's epsilon is
    that of their own population, and the site's the larger of them."""
    parted: dict[str, dict[ReleaseEvent, int]] = defaultdict(lambda: defaultdict(int))
    for event, count in _counted(events):
        parted[event.population][event] += count
    return {population: epsilon(some, delta) for population, some in sorted(parted.items())}


def epsilon_at_order(events: Events, delta: float, order: int) -> float:
    """Epsilon at `delta` that follows from the events' Renyi divergence at one fixed order
    (Canonne, Kamath and Steinke 2020, proposition 12): what a Renyi filter compares with its cap.

    Raises:
        PrivacyError: delta outside (0, 1), an order below 2, or an event not known here.
    """
    _check_delta(delta)
    _check(order >= 2, "order", order, "an integer of at least 2")
    mechanisms = _mechanisms(events)
    if mechanisms is None:
        return math.inf
    if not mechanisms:
        return 0.0
    try:
        return _at_order(mechanisms, delta, order)
    except ArithmeticError:
        return math.inf


class CrossCheck(NamedTuple):
    """One price by three accountants.

    Attributes:
        pld: The price.
        rdp: By Renyi DP; never below the price.
        prv_lower, prv_upper: Between them lies the true value, by PRV; 0 and infinity where PRV
            was not asked: above `LARGE`, and where it would take minutes.
    """

    pld: float
    rdp: float
    prv_lower: float
    prv_upper: float

    @property
    def agree(self) -> bool:
        """Whether the price lies in PRV's interval (±0.01, or ±0.2 % of a large epsilon, and 0.1 %
        for PLD's own rounding) and not above Renyi DP's."""
        if math.isinf(self.pld):
            return math.isinf(self.rdp)
        return (
            self.prv_lower <= self.pld <= self.prv_upper * (1 + _ROUNDING)
            and self.pld <= self.rdp * (1 + _ROUNDING) + _PRV_ERROR
        )


def cross_check(events: Events, delta: float) -> CrossCheck:
    """The price of `epsilon` beside those of the independent accountants. Takes seconds.

    Raises:
        PrivacyError: As `epsilon`.
    """
    events = dict(_merged(events))
    pld, rdp = epsilon(events, delta), epsilon(events, delta, "rdp")
    mechanisms = _mechanisms(events)
    if mechanisms is None or pld > LARGE or not all(_fits_prv(q, n) for q, _, n in mechanisms):
        return CrossCheck(pld, rdp, 0.0, math.inf)
    if not mechanisms:
        return CrossCheck(0.0, 0.0, 0.0, 0.0)
    return CrossCheck(pld, rdp, *_prv(mechanisms, delta, max(_PRV_ERROR, pld / 500)))


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


def _counted(events: Events) -> Iterable[tuple[ReleaseEvent, int]]:
    if isinstance(events, Mapping):
        return events.items()
    return ((event, 1) for event in events)


def _merged(events: Events) -> dict[ReleaseEvent, int]:
    merged: dict[ReleaseEvent, int] = defaultdict(int)
    for event, count in _counted(events):
        merged[event] += count
    return merged


def _mechanisms(events: Events) -> tuple[_Mechanism, ...] | None:
    """Equal mechanisms merged; None if anything was released without protection."""
    compositions: dict[tuple[float, float], int] = defaultdict(int)
    unprotected = False
    for event, count in _counted(events):
        if isinstance(event, Unprotected):
            unprotected = unprotected or count > 0
        elif isinstance(event, PoissonGaussian):
            compositions[event.sample_rate, event.noise_multiplier] += count * event.steps
        elif isinstance(event, GaussianHistogram | NoisyCount):
            compositions[1.0, event.noise_multiplier] += count * event.count
        else:
            raise PrivacyError(
                f"no price is known for a release of type {type(event).__name__}",
                cure="describe the release by an event of common.privacy.events",
            )
    if unprotected:
        return None
    return tuple(sorted((q, z, n) for (q, z), n in compositions.items() if n))


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


def _at_order(mechanisms: tuple[_Mechanism, ...], delta: float, order: int) -> float:
    from dp_accounting.rdp import compute_epsilon

    divergence = sum(count * _divergence(q, z, order) for q, z, count in mechanisms)
    return float(compute_epsilon([order], [divergence], delta)[0])


def _fits_prv(sample_rate: float, count: int) -> bool:
    return count <= 10**5 and sample_rate >= 1e-5


def _is_large(mechanisms: tuple[_Mechanism, ...], delta: float) -> bool:
    if sum(count for _, _, count in mechanisms) > _COMPOSITIONS:
        return True
    return all(_at_order(mechanisms, delta, order) > LARGE for order in (2, 4, 16, 64))


@lru_cache(maxsize=4096)
def _divergence(sample_rate: float, noise_multiplier: float, order: int) -> float:
    """Renyi divergence of one step at `order`, whichever of the neighbours is larger (Mironov,
    Talwar and Zhang 2019 for the sampled Gaussian)."""
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
    one: dp_event.DpEvent = dp_event.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        one = dp_event.PoissonSampledDpEvent(sample_rate, one)
    accountant.compose(one)
    return float(accountant.rdp[0])


@lru_cache(maxsize=256)
def _prv(mechanisms: tuple[_Mechanism, ...], delta: float, error: float) -> tuple[float, float]:
    from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant

    variables = [
        PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=z)
        if q < 1
        else GaussianMechanism(z)
        for q, z, _ in mechanisms
    ]
    counts = [count for _, _, count in mechanisms]
    accountant = PRVAccountant(
        prvs=variables, max_self_compositions=counts, eps_error=error, delta_error=delta / 1000
    )
    lower, _, upper = accountant.compute_epsilon(delta, counts)
    return max(0.0, float(lower)), max(0.0, float(upper))


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

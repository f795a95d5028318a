"""What a hospital's patients may spend in all their life, over studies chosen one after another.

PLD composes mechanisms that were fixed beforehand: it prices one study. Which study a hospital
admits next may depend on what earlier ones released, and there PLD has no proof (Rogers et al.
2016). Two rules have one, also where studies run at the same time (Haney et al. 2023, concurrent
composition with adaptively chosen parameters):

* `rdp`: a Renyi filter at one order, fixed in the policy. While the sum of RDP_order over all that
  was ever reserved stays below B, everything together is (order, B)-RDP, however the mechanisms
  were chosen (Feldman and Zrnic 2021, theorem on the fully adaptive Renyi filter; Lecuyer 2021),
  hence (epsilon, delta)-DP (Canonne, Kamath and Steinke 2020, proposition 12). It holds release by
  release: what a revoked study did not release is free again.
* `sum`: the sum of the (epsilon, delta) of the studies, each priced whole by PLD before it begins
  (basic composition is a valid filter: Rogers, Roth, Ullman and Vadhan 2016). A study that is
  revoked stays counted whole: when it stopped may depend on what it said, and its PLD at such a
  moment is no price that was fixed beforehand.

A filter over-reports: a cap equal to one study's PLD price does not admit it whole (an RDP cap at
such an epsilon admitted about 335 of 400 steps). Leave headroom. And it holds for a cap that was
fixed beforehand: one that is raised in the light of results bounds nothing but the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from common.privacy.events import Population, ReleaseEvent, Unprotected
from common.privacy.pricing import epsilon, epsilon_at_order

_ORDERS = 512


class Cap(BaseModel):
    """A lifetime budget of one population.

    Attributes:
        epsilon, delta: What all studies together may spend.
        rule: `rdp` or `sum`; see the module's text.
        order: Of the Renyi filter; by default the one at which Gaussian noise spends least of
            epsilon and delta. Fixed once patients have spent: another order is another filter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epsilon: float = Field(ge=1e-3, le=1e6)
    delta: float = Field(default=1e-5, ge=1e-100, lt=1)
    rule: Literal["rdp", "sum"] = "rdp"
    order: int = Field(
        default_factory=lambda cap: _best_order(cap["epsilon"], cap["delta"]), ge=2, le=_ORDERS
    )


def _best_order(epsilon: float, delta: float) -> int:
    """The order that minimises order·r + log(1/delta)/(order - 1) where the minimum is epsilon."""
    log_delta = math.log(1 / delta)
    root = math.sqrt(log_delta + epsilon) - math.sqrt(log_delta)
    return min(_ORDERS, max(2, round(1 + math.sqrt(log_delta) / root)))


class Lifetime(BaseModel):
    """The caps of both populations, which are disjoint patients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Cap
    validation: Cap

    def of(self, population: Population) -> Cap:
        """The cap of a population."""
        return self.train if population == "train" else self.validation


class Commitment(NamedTuple):
    """Releases that one study made or may still make, with their delta."""

    delta: float
    events: Mapping[ReleaseEvent, int]


class Spending(NamedTuple):
    """A population's lifetime spending under its cap's rule, beside the cap's epsilon and delta."""

    epsilon: float
    delta: float
    cap: Cap

    @property
    def within(self) -> bool:
        """Whether the cap holds."""
        return self.epsilon <= self.cap.epsilon and self.delta <= self.cap.delta * (1 + 1e-9)

    @property
    def remaining(self) -> float:
        """Epsilon that is left, at least 0."""
        return max(0.0, self.cap.epsilon - self.epsilon)


def spending(
    commitments: Iterable[Commitment], population: Population, cap: Cap, *, protected: bool = False
) -> Spending:
    """What the commitments spend of a population's cap.

    Args:
        protected: Leave releases without privacy out, where the policy says that it accepts them;
            otherwise one of them is infinite spending.
    """
    shares = [
        Commitment(
            c.delta,
            {
                event: count
                for event, count in c.events.items()
                if event.population == population
                and count
                and not (protected and isinstance(event, Unprotected))
            },
        )
        for c in commitments
    ]
    shares = [share for share in shares if share.events]
    if any(isinstance(event, Unprotected) for share in shares for event in share.events):
        return Spending(math.inf, 1.0, cap)
    if cap.rule == "sum":
        spent = sum(epsilon(share.events, share.delta) for share in shares)
        return Spending(spent, sum(share.delta for share in shares), cap)
    together: dict[ReleaseEvent, int] = {}
    for share in shares:
        for event, count in share.events.items():
            together[event] = together.get(event, 0) + count
    at_order = epsilon_at_order(together, cap.delta, cap.order)
    return Spending(at_order, cap.delta if together else 0.0, cap)

"""FedAvg and FedAdam on plain arrays: sums in float64, results in the adapter's own type.

The weights are the study's declared ones, renormalised over the sites that answered. Which sites
answered is public (the coordinator sees it); their true numbers of patients are not, and are never
used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from common.messages import Arrays
from common.study import Federation


def weighted_mean(answers: Sequence[tuple[float, Arrays]]) -> Arrays:
    """`sum(w_i x_i) / sum(w_i)`, added up in the order given, accumulated in float64.

    Args:
        answers: Weight and arrays of each site, in roster order, so that the rounding does not
            depend on who answered first. All hold the same names and shapes.
    """
    total = sum(weight for weight, _ in answers)
    mean: Arrays = {}
    for name, first in answers[0][1].items():
        accumulated = np.zeros(first.shape, dtype=np.float64)
        for weight, arrays in answers:
            accumulated += (weight / total) * arrays[name].astype(np.float64)
        mean[name] = accumulated
    return mean


class ServerOptimizer(Protocol):
    """Turns the average of a round into the next adapter."""

    def step(self, current: Arrays, mean: Arrays) -> Arrays:
        """Next adapter, in the types of `current`; `mean` is float64."""

    def state(self) -> Arrays:
        """What a checkpoint keeps so that a resumed run is the same run, bit for bit."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""


class FedAvg:
    """`x + lr (mean - x)`; with lr = 1 the mean itself (McMahan et al. 2017)."""

    def __init__(self, learning_rate: float = 1.0) -> None:
        self.learning_rate = learning_rate

    def step(self, current: Arrays, mean: Arrays) -> Arrays:
        if self.learning_rate == 1.0:
            return {name: mean[name].astype(x.dtype) for name, x in current.items()}
        return {
            name: (x + self.learning_rate * (mean[name] - x.astype(np.float64))).astype(x.dtype)
            for name, x in current.items()
        }

    def state(self) -> Arrays:
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        del state


class FedAdam:
    """Adam on the averaged change (Reddi et al. 2021, algorithm 2): no bias correction,
    `x + lr m / (sqrt(v) + tau)`."""

    def __init__(
        self, learning_rate: float, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.learning_rate, self.beta1, self.beta2, self.tau = learning_rate, beta1, beta2, tau
        self._moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def step(self, current: Arrays, mean: Arrays) -> Arrays:
        following: Arrays = {}
        for name, x in current.items():
            wide = x.astype(np.float64)
            change = mean[name] - wide
            m, v = self._moments.get(name, (np.zeros_like(wide), np.zeros_like(wide)))
            m = self.beta1 * m + (1 - self.beta1) * change
            v = self.beta2 * v + (1 - self.beta2) * change**2
            self._moments[name] = (m, v)
            moved = wide + self.learning_rate * m / (np.sqrt(v) + self.tau)
            following[name] = moved.astype(x.dtype)
        return following

    def state(self) -> Arrays:
        return {
            f"{moment}:{name}": array
            for name, pair in self._moments.items()
            for moment, array in zip("mv", pair, strict=True)
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        names = {key.partition(":")[2] for key in state}
        self._moments = {name: (state[f"m:{name}"], state[f"v:{name}"]) for name in names}


class TailAverage:
    """Mean of the adapters after the last rounds (Polyak and Juditsky 1992).

    Under noise each round's adapter scatters around where training stands; their mean does not.

    Args:
        rounds: Rounds of the study.
        fraction: Of the last rounds to average; the last round always counts.
    """

    def __init__(self, rounds: int, fraction: float) -> None:
        self._first = min(rounds, 1 + int(rounds * (1 - fraction)))
        self._sums: Arrays = {}
        self._count = 0

    def add(self, completed: int, adapter: Arrays) -> None:
        """Takes in the adapter after the round number `completed`, from 1."""
        if completed < self._first:
            return
        for name, x in adapter.items():
            self._sums[name] = self._sums.get(name, 0.0) + x.astype(np.float64)
        self._count += 1

    def mean(self, adapter: Arrays) -> Arrays:
        """The average so far in the types of `adapter`, which stands in before the tail begins."""
        if not self._count:
            return adapter
        return {
            name: (self._sums[name] / self._count).astype(x.dtype) for name, x in adapter.items()
        }

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        return {"count": np.array(self._count), **{f"sum:{n}": x for n, x in self._sums.items()}}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""
        self._count = int(state["count"])
        self._sums = {key[4:]: x for key, x in state.items() if key.startswith("sum:")}


def server_optimizer(federation: Federation) -> ServerOptimizer:
    """The optimizer that a study names."""
    if federation.server_optimizer == "fedadam":
        return FedAdam(federation.server_learning_rate)
    return FedAvg(federation.server_learning_rate)

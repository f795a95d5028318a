"""The canary game: how well can whoever sees every released sum tell who was in the data?

2,000 patients made to be found are each included with probability 1/2. The engine trains. At every
release the adversary, who knows the weights, the study and every canary's records, computes each
canary's clipped gradient c and takes the inner product <released sum, c>: its likelihood ratio for
"entered this step" is known up to the other patients. A canary's score is the log-likelihood ratio
of "in the data" over all steps. Nothing else of the engine is used: neither participation nor the
sum before the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.site.encoders.dataset import Dataset
from client.site.model.fusion.base import RiskModel
from client.site.model.losses import row_loss
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.plan import DPExecutionPlan
from client.site.training.sampler import PatientSampler
from common.study import Study
from simulations.attack.engine import RECORDS, SITES, Engine, Parts
from simulations.attack.patients import canaries, joined, ordinary

_PASS = 250  # canaries of one scoring pass


@dataclass(frozen=True)
class Game:
    """How a game ended.

    Attributes:
        scores: [m], higher for "in the data".
        included: [m] bool, the coins.
    """

    scores: NDArray[np.float64]
    included: NDArray[np.bool_]

    @property
    def auc(self) -> float:
        """Chance that a canary that is in scores above one that is not (ties have measure 0)."""
        ranks = np.argsort(np.argsort(self.scores)) + 1
        n_in, n_out = int(self.included.sum()), int((~self.included).sum())
        return float((ranks[self.included].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def play(
    study: Study,
    count: int,
    seed: int,
    parts: Parts | None = None,
    on_round: Callable[[int, int], None] = lambda done, of: None,
) -> Game:
    """Trains through all rounds of the study on half of `count` canaries and 100 other patients.

    Args:
        seed: Of the canaries and of the coins.
        parts: The engine; as shipped by default.
        on_round: Called after each round with its number and how many there are.
    """
    all_canaries = canaries(count, RECORDS, seed)
    included = np.random.default_rng(seed).random(count) < 0.5
    present = all_canaries.subset(np.flatnonzero(included))
    engine = Engine(study, SITES[0], joined(ordinary(100, seed), present), parts)
    adversary = Adversary(engine.model, study, engine.plan, all_canaries)
    try:
        for number in range(1, study.federation.rounds + 1):
            engine.round(number, adversary.see)
            on_round(number, study.federation.rounds)
    finally:
        adversary.close()
    return Game(adversary.scores, included)


class Adversary:
    """Scores canaries from released sums.

    Its clipper is the product's own, also where the engine's is broken: it is the adversary's tool.

    Args:
        model: The one that is trained; everybody receives its weights.
        plan: Public.
        suspects: The canaries, each with at most k records, so that all of them are used.
    """

    def __init__(
        self, model: RiskModel, study: Study, plan: DPExecutionPlan, suspects: Dataset
    ) -> None:
        self.scores = np.zeros(suspects.n_patients)
        self._model, self._plan, self._suspects = model, plan, suspects
        self._row_loss = row_loss(study)
        self._clipper = PatientClipper(model, plan.max_grad_norm, plan.records_per_patient)
        self._batches = list(
            PatientSampler(suspects.rows_of_patient, 1.0, plan.records_per_patient, Entropy()).pack(
                suspects.rows_of_patient, _PASS, pad=True
            )
        )

    def close(self) -> None:
        """Takes the adversary's hooks off the model."""
        self._clipper.close()

    def see(self, model: RiskModel, released: dict[nn.Parameter, Tensor]) -> None:
        """Takes one release into account, the model still being that of the step."""
        inner, squared = self._inner_products(released)
        q, std = self._plan.sample_rate, self._plan.noise_std
        if_entered = (inner - squared / 2) / std**2
        self.scores += np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, np.log(q) + if_entered)

    def _inner_products(
        self, released: dict[nn.Parameter, Tensor]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """<released, c> and an upper bound of ‖c‖² for each canary's clipped gradient c. Per layer
        Σ_t g_t·(R x_t), so that no gradient is ever materialised."""
        products, squares = [], []
        for batch in self._batches:
            weights = batch.weights.flatten().float()
            rows = batch.gather(self._suspects, torch.device("cpu"))
            with self._clipper.capture():
                loss = (self._row_loss(self._model, *rows) * weights).sum()
            patients = len(batch.valid)
            flows = self._clipper.backward(loss, patients * self._clipper.rows_per_patient)
            factors = self._clipper.clip_factors(flows, batch.valid)
            inner = torch.zeros(patients, dtype=torch.float64)
            squared = torch.zeros(patients, dtype=torch.float64)
            for layer, flow in zip(self._clipper.layers, flows, strict=True):
                x, g = layer.tokens(*flow, patients)
                of_layer = _applied(x, released, layer.module)
                inner += (of_layer * g).sum((1, 2))
                squared += layer.bound(x, g)[0]
            products.append((inner * factors)[batch.valid])
            squares.append((squared * factors.square())[batch.valid])
        return torch.cat(products).numpy(), torch.cat(squares).numpy()


def _applied(x: Tensor, released: dict[nn.Parameter, Tensor], module: nn.Linear) -> Tensor:
    """R x + r, with the released sums of a linear layer in the place of its parameters."""
    weight, bias = (released[cast(nn.Parameter, p)] for p in (module.weight, module.bias))
    return functional.linear(x, weight, bias)

"""The engine under attack: a hospital's training round as it is shipped, with windows in it.

Everything that protects patients is the product's own: `TrainingRound` of the daemon chooses plan,
entropy and micro-batch and builds the trainer; sampler, clipper and optimiser are its classes. The
windows are subclasses that call their base and note what passed: who was drawn, the clipped sum,
the released sum. Only the language model is replaced, by a stand-in of a few thousand weights: what
is proven of a layer does not depend on what the model says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.site.daemon import work
from client.site.daemon.bench import Resident
from client.site.encoders.dataset import Dataset
from client.site.encoders.run import Populations
from client.site.model.fusion.base import Prediction, RiskModel
from client.site.model.system import adapter_state
from client.site.training import trainer
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.optimizer import NoisedSumOptimizer
from client.site.training.plan import DPExecutionPlan
from client.site.training.sampler import PatientSampler
from common.study import Federation, Privacy, Site, Source, Study, Task, Training, resolve
from simulations.attack.patients import SOURCES, TASKS

SITES = ("here", "there")
RECORDS = 4  # k, the records used of a patient
_HIDDEN = 32


def audit_study(epsilon: float, patients_declared: int, seed: int = 0) -> Study:
    """A study whose training costs `epsilon`: 5 rounds of 4 steps that take half of the patients.

    Of one price, a canary game sees more in 20 steps at this rate than in fewer or at a lower one.

    Raises:
        PrivacyError: The target cannot be met.
    """
    return resolve(
        Study(
            name="attack",
            seed=seed,
            sources={
                s: Source(modality="embedding", encoder="precomputed", dim=d)
                for s, (_, d) in SOURCES.items()
            },
            tasks={f"risk{k}": Task() for k in range(TASKS)},
            training=Training(optimizer="sgd", learning_rate=1e-2, steps_per_round=4),
            privacy=Privacy(
                epsilon=epsilon,
                sample_rate=0.5,
                records_per_patient=RECORDS,
                max_grad_norm=0.01,
                spare_rounds=0,
            ),
            federation=Federation(
                rounds=5,
                sites={name: Site(patients_declared=patients_declared) for name in SITES},
            ),
        )
    )


class StandIn(RiskModel):
    """Projectors and one more trainable layer before frozen output rows; SiLU, masked mean."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projectors = nn.ModuleDict(
                {s: nn.Linear(d, _HIDDEN) for s, (_, d) in SOURCES.items()}
            )
            self.mix = nn.Linear(_HIDDEN, _HIDDEN)
            self.register_buffer("rows", torch.randn(TASKS, _HIDDEN) / _HIDDEN**0.5)

    def predict(self, inputs: Any, present: Any) -> Prediction:
        tokens = torch.cat([p(inputs[s]) * present[s][..., None] for s, p in self._named()], 1)
        mask = torch.cat([present[s] for s, _ in self._named()], 1)[..., None]
        hidden = tokens + self.mix(functional.silu(tokens))
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return Prediction(pooled @ cast(Tensor, self.rows).T)

    def _named(self) -> list[tuple[str, nn.Module]]:
        return list(self.projectors.items())


def of_seed(study: Study, site: str, use: str, number: int) -> Entropy:
    """Entropy that is a function of run, site and round: what only mode `none` may use."""
    return Entropy.seeded(f"{study.seed}|{site}|{use}|{number}")


@dataclass(frozen=True)
class Parts:
    """What an engine is made of; the defaults are what is shipped.

    Attributes:
        entropy: (study, site, use, number) -> Entropy of a round; None leaves it to the daemon.
    """

    sampler: type[PatientSampler] = PatientSampler
    clipper: type[PatientClipper] = PatientClipper
    optimizer: type[NoisedSumOptimizer] = NoisedSumOptimizer
    entropy: Callable[[Study, str, str, int], Entropy] | None = None


@dataclass(frozen=True)
class Step:
    """What the windows saw of one step.

    Attributes:
        entered: [patients] bool, who was drawn.
        clipped: [D] float64, the sum before the noise.
        released: [D] float64, the sum that the optimiser was given.
    """

    site: str
    execution: int
    round: int
    entered: NDArray[np.bool_]
    clipped: Tensor
    released: Tensor


# (model before the step, released sum of each trainable parameter)
OnRelease = Callable[[RiskModel, dict[nn.Parameter, Tensor]], None]


class Engine:
    """One execution of a study's run at one site.

    Global generators are seeded with the run's seed, as a careless run would do: an engine that
    draws from them repeats itself.

    Args:
        study: Resolved.
        site: Of its roster.
        patients: The training population.
        parts: Of what to build the engine.
        execution: Number that tells two executions of the same run apart; nothing depends on it.
    """

    def __init__(
        self,
        study: Study,
        site: str,
        patients: Dataset,
        parts: Parts | None = None,
        execution: int = 0,
    ) -> None:
        torch.manual_seed(study.seed)
        np.random.seed(study.seed % 2**32)
        self.model = StandIn(study.seed)
        self.patients = patients
        self._study, self._site, self._execution = study, site, execution
        self._parts = parts or Parts()
        self._owner = np.zeros(patients.n_records, dtype=np.int64)
        for patient, rows in enumerate(patients.rows_of_patient):
            self._owner[rows] = patient

    @property
    def plan(self) -> DPExecutionPlan:
        """What a round obeys, by its own word."""
        return cast(DPExecutionPlan, work.plan_of(self._study, self._site))

    def round(self, number: int, on_release: OnRelease | None = None) -> list[Step]:
        """Runs one training round from the model's weights, and returns what was seen.

        Args:
            number: Of the round, from 1.
            on_release: Called at each release, before the optimiser moves.
        """
        steps: list[Step] = []
        draws: list[list[NDArray[np.int64]]] = []

        def seen(clipped: Tensor, released: dict[nn.Parameter, Tensor]) -> None:
            entered = np.zeros(self.patients.n_patients, dtype=bool)
            entered[[self._owner[rows[0]] for rows in draws.pop()]] = True
            after = _flat(released)
            steps.append(Step(self._site, self._execution, number, entered, clipped, after))
            if on_release:
                on_release(self.model, released)

        with ExitStack() as patches:
            for name, part in self._with_windows(draws, seen).items():
                patches.enter_context(mock.patch.object(trainer, name, part))
            if self._parts.entropy:
                patches.enter_context(mock.patch.object(work, "_entropy", self._parts.entropy))
            training = work.TrainingRound(*self._surroundings(), number)
            try:
                training.run()
            finally:
                training.close()
        return steps

    def _with_windows(
        self,
        draws: list[list[NDArray[np.int64]]],
        seen: Callable[[Tensor, dict[nn.Parameter, Tensor]], None],
    ) -> dict[str, type]:
        sampler: Any = self._parts.sampler
        optimizer: Any = self._parts.optimizer
        clippers: list[PatientClipper] = []

        class Sampler(sampler):
            def draw(self) -> list[NDArray[np.int64]]:
                draws[:] = [super().draw()]
                return draws[0]

        class Optimizer(optimizer):
            def __init__(self, base: Any, plan: Any, clipper: PatientClipper, entropy: Any) -> None:
                super().__init__(base, plan, clipper, entropy)
                clippers[:] = [clipper]

            def add_noise(self) -> None:
                sums = clippers[0].sums
                clipped = _flat(sums)
                super().add_noise()
                # Not `p.summed_grad`, from which it should come: this is what moves the weights.
                seen(clipped, {p: cast(Tensor, p.grad).double() for p in sums})

        return {
            "PatientSampler": Sampler,
            "PatientClipper": self._parts.clipper,
            "NoisedSumOptimizer": Optimizer,
        }

    def _surroundings(self) -> tuple[Any, Any, Resident]:
        """Hospital, study with its patients, and model: as much of each as a round asks for."""
        hospital = SimpleNamespace(
            name=self._site,
            log=logging.getLogger(__name__),
            status=SimpleNamespace(step=0),
            show=lambda **what: None,
            check_stopping=lambda: None,
        )
        populations = Populations(train=self.patients, validation=self.patients.subset([]))
        prepared = SimpleNamespace(study=self._study, populations=populations)
        return hospital, prepared, Resident(self.model, adapter_state(self.model), {})


def _flat(sums: dict[nn.Parameter, Tensor]) -> Tensor:
    """A copy of all sums as one float64 vector."""
    return torch.cat([value.flatten() for value in sums.values()])

"""Train an adapter on one site's patients: the loop that both modes of privacy share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.invariance import BatchDependent, row_deviation
from client.site.training.layers import covered_modules
from client.site.training.optimizer import NoisedSumOptimizer, base_optimizer
from client.site.training.plan import (
    DPExecutionPlan,
    OptimizerConfig,
    PerformanceFlags,
    Plan,
)
from client.site.training.sampler import MicroBatch, PatientSampler
from common.errors import PrivacyError

# (model, inputs, present, labels) -> [rows], each row's loss a function of that row alone
RowLoss = Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class StepStats:
    """What a run did. All of it is public: it follows from the plan.

    Attributes:
        steps: Steps taken in this run.
        steps_total: Steps taken by this trainer so far.
    """

    steps: int
    steps_total: int


class Trainer:
    """Trains the trainable parameters of `model` in place, under a plan.

    A private step: sample patients, then records; run fixed-shape micro-batches; clip each
    patient's gradient to a proven bound; add noise to the sum once; divide by the public
    denominator; let the optimiser move. The true batch size stays in here.

    A trainer lives for a study: parameters may be overwritten between runs (a new round), the
    optimiser's state goes on. The caller charges the ledger *before* `run`.

    Args:
        model: Frozen but for the adapter; on its device, in the mode it shall train in.
        row_loss: Loss of each row; rows must not meet in it.
        dataset: The training population.
        plan: What to obey.
        optimizer_config: How to move.
        entropy: Fresh `Entropy()`; `Entropy.seeded` is for tests and for plans without privacy.
        flags: Performance only.

    Raises:
        PrivacyError: The model, its loss or its kernels break an assumption of the plan. Checked
            here on random rows, before any patient's data is read.
    """

    def __init__(
        self,
        model: nn.Module,
        row_loss: RowLoss,
        dataset: Dataset,
        plan: Plan,
        optimizer_config: OptimizerConfig,
        entropy: Entropy,
        flags: PerformanceFlags | None = None,
    ) -> None:
        self.plan = plan
        self.steps_total = 0
        self._model = model
        self._row_loss = row_loss
        self._dataset = dataset
        self._flags = flags or PerformanceFlags()
        halvings: Callable[[str], int] = getattr(model, "halvings", lambda layer: 0)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(own.values())
        self._shares = [2.0 ** -halvings(name) for name in own]
        if not self._parameters:
            raise PrivacyError("the model has no trainable parameter", cure="unfreeze the adapter")
        self._device = self._parameters[0].device
        self._sampler = PatientSampler(
            dataset.rows_of_patient, plan.sample_rate, plan.records_per_patient, entropy
        )
        base = base_optimizer(optimizer_config, self._parameters)
        self._clipper: PatientClipper | None = None
        self._optimizer: torch.optim.Optimizer = base
        if isinstance(plan, DPExecutionPlan):
            torch.set_float32_matmul_precision("highest")  # TF32 rounds by shape
            self._clipper = PatientClipper(model, plan.max_grad_norm, plan.records_per_patient)
            self._optimizer = NoisedSumOptimizer(base, plan, self._clipper, entropy)
            try:
                self._prove(plan, self._clipper)
            except BaseException:
                self.close()  # a refused trainer leaves no hook on a model that others share
                raise

    def run(self, steps: int, on_step: Callable[[int], None] = lambda step: None) -> StepStats:
        """Take `steps` steps.

        Args:
            steps: Number of them.
            on_step: Called after each with its number, from 1.

        Raises:
            PrivacyError: More steps than the plan has left, or a model changed since the start.
        """
        if self.steps_total + steps > self.plan.steps:
            raise PrivacyError(
                f"{steps} more steps after {self.steps_total} exceed the plan's {self.plan.steps}",
                cure="plan (and price) more steps",
            )
        if self._clipper is not None and covered_modules(self._model) != [
            (layer.name, layer.module) for layer in self._clipper.layers
        ]:
            raise PrivacyError(
                "the trainable layers are not those that were checked at the start",
                cure="build a new trainer after changing what is trainable",
            )
        for step in range(1, steps + 1):
            self._step()
            self.steps_total += 1
            on_step(step)
        counted = getattr(self._optimizer, "steps_counted", self.steps_total)
        if counted != self.steps_total:
            raise PrivacyError(
                f"{counted} noised steps where {self.steps_total} were taken",
                cure="report this: nothing of this run may be released",
            )
        return StepStats(steps=steps, steps_total=self.steps_total)

    def close(self) -> None:
        """Takes the trainer's hooks off the model, which others may train next."""
        if self._clipper is not None:
            self._clipper.close()

    def _step(self) -> None:
        chosen = self._sampler.draw()
        private = self._clipper is not None
        self._optimizer.zero_grad()
        for batch in self._sampler.pack(chosen, self._flags.micro_batch, pad=private):
            self._accumulate(batch)
        if not private:
            for parameter, share in zip(self._parameters, self._shares, strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                # Twice, as under privacy: before clipping, and on the way to the parameter.
                parameter.grad.mul_(share * share / self.plan.denominator)
        self._optimizer.step()

    def _accumulate(self, batch: MicroBatch) -> None:
        rows = batch.gather(self._dataset, self._device)
        weights = batch.weights.flatten().to(self._device)
        if self._clipper is None:
            self._weighted_loss(*rows, weights).backward()
            return
        with self._clipper.capture():
            loss = self._weighted_loss(*rows, weights)
        self._clipper.add(loss, batch.valid)

    def _weighted_loss(
        self,
        inputs: dict[str, Tensor],
        present: dict[str, Tensor],
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._flags.autocast):
            losses = self._row_loss(self._model, inputs, present, labels)
        if losses.shape != weights.shape:
            raise PrivacyError(
                f"row_loss gave shape {tuple(losses.shape)} for {len(weights)} rows",
                cure="return one loss per row; averaging over rows is the trainer's",
            )
        return (losses * weights.to(losses.dtype)).sum()

    def _prove(self, plan: DPExecutionPlan, clipper: PatientClipper) -> None:
        """The plan's two slacks against this model, this site and these kernels."""
        patients, micro_batch = self._dataset.n_patients, self._flags.micro_batch
        deviation = row_deviation(
            self._model, clipper, self._weighted_loss, self._dataset, micro_batch, self._device
        )
        rounding = clipper.rounding_slack(patients, micro_batch)
        if rounding > plan.slack:
            raise PrivacyError(
                f"float64 sums over this site may round by {rounding:.1e}·C, above the plan's "
                f"slack {plan.slack:.1e}",
                cure="declare a larger slack in the plan",
            )
        # Measured on a few patients: doubled, and charged for a batch that is hardly ever exceeded,
        # of the patients there are: `patients_declared` is only a lower bound of them.
        batch = plan.sample_rate * patients
        others = batch + 8 * math.sqrt(batch) + 8
        needed = 2 * deviation * others
        if needed > plan.batch_slack:
            raise BatchDependent(
                f"a patient's gradient depends on its neighbours in the micro-batch, together by "
                f"{needed:.1e}·C, above the plan's batch_slack {plan.batch_slack:.1e}",
                cure="use float32, or micro_batch = 1: a patient alone in its pass has none",
            )

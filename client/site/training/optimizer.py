"""The step: noise on the clipped sum, the public denominator, any torch optimiser."""

from __future__ import annotations

import torch
from opacus.accountants import RDPAccountant
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.plan import DPExecutionPlan, OptimizerConfig


def base_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The torch optimiser that a config names."""
    if config.name == "sgd":
        return SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


class NoisedSumOptimizer(DPOptimizerFastGradientClipping):
    """Opacus' optimiser on float64 sums and private entropy.

    Opacus keeps the order of the step, its tripwire against noising one sum twice, the scaling, and
    an accountant hook, which here counts steps as a cross-check on the ledger. Replaced are the
    accumulation (`p.grad` would round the sum to float32 before the noise) and the noise (torch's
    generator, at the parameters' precision).

    Args:
        optimizer: Base optimiser over the trainable parameters.
        plan: Gives the noise, the grid and the denominator.
        clipper: Its sums, filled between `zero_grad` and `step`, are what is noised.
        entropy: Draws from `entropy.noise`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        plan: DPExecutionPlan,
        clipper: PatientClipper,
        entropy: Entropy,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.sensitivity,
            expected_batch_size=plan.denominator,
        )
        self._plan = plan
        self._clipper = clipper
        self._entropy = entropy
        self._shares = clipper.shares
        self._accountant = RDPAccountant()
        self.attach_step_hook(self._accountant.get_optimizer_hook_fn(plan.sample_rate))

    @property
    def steps_counted(self) -> int:
        """Noised steps, by Opacus' accountant."""
        return sum(count for _, _, count in self._accountant.history)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the last step. Without this a second `step` is refused: its noise on the same sum
        would be a second release of it."""
        self._clipper.begin()
        for p, clipped_sum in self._clipper.sums.items():
            p.summed_grad = clipped_sum  # type: ignore[attr-defined]
            vars(clipped_sum).pop("_processed", None)

    def accumulate(self) -> None:
        """Nothing: the clipper has accumulated already."""

    def add_noise(self) -> None:
        """Turn each clipped sum, in place, into the released one, and `p.grad` into its float32."""
        for p in self.params:
            _check_processed_flag(p.summed_grad)
        total = self._clipper.total
        self._entropy.noise.add_gaussians_(total, self._plan.noise_std)
        total.mul_(1 / self._plan.grid).round_().mul_(self._plan.grid)  # powers of two: exact
        for p in self.params:
            _mark_as_processed(p.summed_grad)
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(p.summed_grad).mul_(self._shares[p])

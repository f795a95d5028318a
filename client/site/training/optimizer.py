"""The step: noise on the clipped sum, the public denominator, any torch optimiser."""

from __future__ import annotations

import torch
from opacus.accountants import RDPAccountant
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from client.site.training.clipping import PatientClipper
from client.site.training.entropy import BLOCK, Entropy
from client.site.training.plan import DPExecutionPlan, OptimizerConfig
from common.errors import PrivacyError


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

    Opacus keeps the order of the step, its tripwire against noising one sum twice, and
    an accountant hook, which here counts steps as a cross-check on the ledger. Replaced are the
    accumulation (`p.grad` would round the sum to float32 before the noise), the noise (torch's
    generator, at the parameters' precision), and calls per parameter by calls per step.

    Args:
        optimizer: Base optimiser over the trainable parameters.
        plan: Gives the noise, the grid and the denominator.
        clipper: Its sums, filled between `zero_grad` and `step`, are what is noised.
        entropy: Draws from `entropy.noise`.

    Raises:
        PrivacyError: Trainable parameters of several precisions.
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
        shares = clipper.shares
        self._shares = list(shares.values()) if set(shares.values()) != {1.0} else []
        # One vector for all gradients, in the order of the sums.
        sums = clipper.sums
        if len({p.dtype for p in sums}) > 1:
            raise PrivacyError(
                "the trainable parameters are of several precisions",
                cure="keep all of them in float32",
            )
        self._gradient = torch.empty_like(clipper.total, dtype=next(iter(sums)).dtype)
        parts = self._gradient.split([p.numel() for p in sums])
        self._gradients = {p: part.view_as(p) for p, part in zip(sums, parts, strict=True)}
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
        for p, gradient in self._gradients.items():
            _mark_as_processed(p.summed_grad)  # type: ignore[attr-defined]
            p.grad = gradient
        grid, total = self._plan.grid, self._clipper.total
        for part, rounded in zip(total.split(BLOCK), self._gradient.split(BLOCK), strict=True):
            # All passes over a part while it is in the cache.
            self._entropy.noise.add_gaussians_(part, self._plan.noise_std)
            part.mul_(1 / grid).round_().mul_(grid)  # powers of two: exact
            rounded.copy_(part)
        if self._shares:
            torch._foreach_mul_(list(self._gradients.values()), self._shares)

    def scale_grad(self) -> None:
        """Divide by the public denominator, all parameters at once."""
        self._gradient.div_(self.expected_batch_size)

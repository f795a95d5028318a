"""What a site's training must obey. One frozen plan yields the sampler, the clipping, the noise
and the event that prices them, so that they cannot disagree; what may be tuned freely is a type
apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.errors import PrivacyError
from common.privacy.events import PoissonGaussian, Unprotected


@dataclass(frozen=True)
class PerformanceFlags:
    """Switches that do not affect privacy: what they change in the numerics is checked, or charged
    to the plan's slack, before the first step.

    Attributes:
        micro_batch: Patients per forward pass. A private step runs passes of exactly this shape,
            padded, so half a pass is wasted per step on average: well below the expected batch.
        autocast: Forward in bfloat16 (the frozen model's; clipping and noise stay float64).
    """

    micro_batch: int = 32
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise PrivacyError(
                f"micro_batch = {self.micro_batch}", cure="micro_batch must be at least 1"
            )


@dataclass(frozen=True)
class _Schedule:
    """What private and plain training share; every number is public.

    Attributes:
        sample_rate: q, a patient's probability to enter a step.
        records_per_patient: k, the records of a sampled patient that are used (their average).
        steps: Steps that may be taken under this plan.
        patients_declared: The site's size as declared, a constant of the study, not a count.
    """

    sample_rate: float
    records_per_patient: int
    steps: int
    patients_declared: int

    def __post_init__(self) -> None:
        _check(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "in (0, 1]")
        _check(self.records_per_patient >= 1, "records_per_patient", self.records_per_patient)
        _check(self.steps >= 1, "steps", self.steps)
        _check(self.patients_declared >= 1, "patients_declared", self.patients_declared)

    @property
    def denominator(self) -> float:
        """Divides the sum of a step: the expected, never the true, batch size."""
        return self.sample_rate * self.patients_declared


@dataclass(frozen=True)
class DPExecutionPlan(_Schedule):
    """Patient-level DP-SGD: Poisson-sampled patients, clipped sums, Gaussian noise.

    Removing one patient moves a step's clipped sum by at most
    `sensitivity = max_grad_norm · (1 + slack + batch_slack)` in L2 norm, as computed, in finite
    arithmetic; the noise has standard deviation `noise_multiplier · sensitivity`.

    Attributes:
        max_grad_norm: C, the bound on each patient's clipped gradient.
        noise_multiplier: Noise over sensitivity; what `event` prices.
        slack: Allowance, in units of C, for the rounding of the float64 sum. The engine proves at
            start that its own bound for this model and site is below (see `clipping`).
        batch_slack: Allowance, in units of C, for what leaving moves in *other* patients' gradients
            through kernels whose results depend on a row's neighbours or position. 0 demands that
            they do not, bit for bit; above 0 the sensitivity is measured, not proven: where 7e-7·C
            was measured at an ordinary adapter, an adversarial one moved a neighbour by 1.0·C.

    Misuse to avoid: values computed from the site's data (its true patient count as
    `patients_declared`, say) leak outside the price.
    """

    max_grad_norm: float
    noise_multiplier: float
    slack: float = 2.0**-16
    batch_slack: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_grad_norm", "noise_multiplier"):
            value = getattr(self, name)
            _check(0 < value < math.inf, name, value, "finite and above 0")
        # Far from where its square, or the float32 gradient, would under- or overflow.
        _check(1e-30 < self.noise_std < 1e30, "noise", self.noise_std, "between 1e-30 and 1e30")
        for name in ("slack", "batch_slack"):
            value = getattr(self, name)
            _check(0 <= value < 1, name, value, "in [0, 1)")

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm * (1 + self.slack + self.batch_slack)

    @property
    def noise_std(self) -> float:
        return self.noise_multiplier * self.sensitivity

    @property
    def grid(self) -> float:
        """Released sums are multiples of this power of two, a millionth of the noise: the low bits,
        in which float arithmetic could betray the sum (Mironov 2012), are gone."""
        return 2.0 ** (math.floor(math.log2(self.noise_std)) - 20)

    def charge(self, steps: int) -> PoissonGaussian:
        """The event that prices `steps` of this plan's steps."""
        return PoissonGaussian(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
            max_grad_norm=self.max_grad_norm,
            denominator=self.denominator,
        )

    @property
    def event(self) -> PoissonGaussian:
        """The event that prices the whole plan."""
        return self.charge(self.steps)


@dataclass(frozen=True)
class NonPrivatePlan(_Schedule):
    """The same steps without clipping and noise, for baselines. Prices at infinity."""

    def charge(self, steps: int) -> Unprotected:
        return Unprotected(population="train")

    @property
    def event(self) -> Unprotected:
        return self.charge(self.steps)


Plan = DPExecutionPlan | NonPrivatePlan


@dataclass(frozen=True)
class OptimizerConfig:
    """How the (noised) mean gradient moves the adapter: post-processing, free to choose.

    Attributes:
        name: "sgd" or "adam".
        learning_rate: Step size.
        momentum: Of SGD.
        betas: Of Adam.
        weight_decay: Decoupled from the gradient (Loshchilov and Hutter 2019).
    """

    name: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam"):
            raise PrivacyError(f"optimizer {self.name!r} is unknown", cure="use 'sgd' or 'adam'")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")


def _check(holds: bool, name: str, value: float, cure: str = "at least 1") -> None:
    if not holds:
        raise PrivacyError(f"{name} = {value} is no valid plan", cure=f"{name} must be {cure}")

"""Planted bugs: mistakes that DP training code has been seen to make. They live here and nowhere
else, each in the place of one part of the shipped engine, to show that the audit can fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy, Keystream
from client.site.training.optimizer import NoisedSumOptimizer
from client.site.training.plan import DPExecutionPlan
from client.site.training.sampler import PatientSampler
from common.study import Study, unknown
from simulations.attack.engine import Parts, of_seed


@dataclass(frozen=True)
class Bug:
    """A mistake.

    Attributes:
        says: What is wrong.
        parts: The engine that has it.
        found_by: The check that is named for it; others may find it too.
    """

    says: str
    parts: Parts
    found_by: str


# -- clipping -----------------------------------------------------------------------------------


class StayLevelClipper(PatientClipper):
    """Clips each record by itself: a patient of k records moves the sum by k·C."""

    def add(self, loss: Tensor, valid: Tensor) -> None:
        k, self.rows_per_patient = self.rows_per_patient, 1
        super().add(loss, valid.repeat_interleave(k))
        self.rows_per_patient = k


class _Float32Clipper(PatientClipper):
    """Per-patient norms without a bound on their rounding."""

    def squared_norm(self, x: Tensor, g: Tensor) -> Tensor:
        """[P], of float32 tokens [P, n, d] of a linear layer with bias."""
        raise NotImplementedError

    def clip_factors(self, flows: list[tuple[Tensor, Tensor]], valid: Tensor) -> Tensor:
        squared = torch.zeros(len(valid))
        for layer, flow in zip(self.layers, flows, strict=True):
            x, g = (tokens.float() for tokens in layer.tokens(*flow, len(valid)))
            squared += self.squared_norm(x, g)
        factors = (self.max_grad_norm / squared.clamp(min=0).sqrt()).clamp(max=1)
        return torch.where(valid & torch.isfinite(squared), factors, 0.0).double()


class GramClipper(_Float32Clipper):
    """Norms by Gram matrices, as most ghost clipping computes them: they cancel where a patient's
    records do."""

    def squared_norm(self, x: Tensor, g: Tensor) -> Tensor:
        return ((x @ x.mT + 1) * (g @ g.mT)).sum((1, 2))


class MaterialisedClipper(_Float32Clipper):
    """Norms of materialised gradients, without Gram matrices but in float32 all the same."""

    def squared_norm(self, x: Tensor, g: Tensor) -> Tensor:
        return (g.mT @ x).square().sum((1, 2)) + g.sum(1).square().sum(1)


# -- noise --------------------------------------------------------------------------------------


class ThirdOfTheNoise(NoisedSumOptimizer):
    """Takes the noise of a plan whose multiplier is a third."""

    def __init__(self, base: Any, plan: DPExecutionPlan, clipper: Any, entropy: Any) -> None:
        less = replace(plan, noise_multiplier=plan.noise_multiplier / 3)
        super().__init__(base, less, clipper, entropy)


class SilentWhenEmpty(NoisedSumOptimizer):
    """Adds no noise where nobody was drawn: the release says so."""

    def add_noise(self) -> None:
        if any(bool(s.any()) for s in self._clipper.sums.values()):
            super().add_noise()
            return
        for p in self.params:
            p.grad = torch.zeros_like(p)


class RepeatedNoise(NoisedSumOptimizer):
    """Restarts the noise generator at every step: differences of steps are free of noise."""

    def __init__(self, base: Any, plan: DPExecutionPlan, clipper: Any, entropy: Any) -> None:
        super().__init__(base, plan, clipper, entropy)
        self._key = entropy.patients.uniforms(4).tobytes()

    def add_noise(self) -> None:
        self._entropy.noise = Keystream(self._key)
        super().add_noise()


class GlobalGenerators(Keystream):
    """torch's and numpy's generators, which a run seeds: every site draws the same."""

    def uniforms(self, count: int) -> np.ndarray:
        return np.random.random(count)

    def add_gaussians_(self, out: Tensor, std: float) -> None:
        out += std * torch.randn(out.shape, dtype=out.dtype)


def noise_of_run(study: Study, site: str, use: str, number: int) -> Entropy:
    """Noise from the run's seed."""
    entropy = Entropy()
    entropy.noise = GlobalGenerators(bytes(32))
    return entropy


# -- participation ------------------------------------------------------------------------------


class DoubledRate(PatientSampler):
    """Samples at 2q, at most 1."""

    def __init__(self, rows: Sequence[Any], rate: float, records: int, entropy: Entropy) -> None:
        super().__init__(rows, min(1.0, 2 * rate), records, entropy)


class ReusedBatch(PatientSampler):
    """Takes every draw twice in a row."""

    _last: list[np.ndarray] | None = None

    def draw(self) -> list[np.ndarray]:
        if self._last is None:
            self._last = super().draw()
            return self._last
        again, self._last = self._last, None
        return again


class FixedSize(PatientSampler):
    """Takes the expected number of patients in every step, without replacement."""

    def draw(self) -> list[np.ndarray]:
        patients = len(self._rows)
        order = np.argsort(self._entropy.patients.uniforms(patients))
        some = order[: round(self._rate * patients)]
        return [self._rows[p][: self._most] for p in sorted(some)]


def sampler_of_run(study: Study, site: str, use: str, number: int) -> Entropy:
    """Participation from the run's seed."""
    entropy = Entropy()
    entropy.patients = GlobalGenerators(bytes(32))
    return entropy


BUGS: Mapping[str, Bug] = {
    "stay_level_clipping": Bug(
        "each record is clipped, not each patient",
        Parts(clipper=StayLevelClipper),
        "leave_one_out",
    ),
    "noise_third": Bug(
        "a third of the noise is added", Parts(optimizer=ThirdOfTheNoise), "noise_chi2"
    ),
    "sampler_2q": Bug("patients enter twice as often", Parts(sampler=DoubledRate), "sampler_rate"),
    "noise_seeded_from_run": Bug(
        "noise comes from a generator that the run seeds",
        Parts(entropy=noise_of_run),
        "noise_across_sites",
    ),
    "sampler_seeded_from_run": Bug(
        "participation comes from a generator that the run seeds",
        Parts(entropy=sampler_of_run),
        "participation_across_sites",
    ),
    "seed_hash_run_site": Bug(
        "all randomness is a hash of run, site and round",
        Parts(entropy=of_seed),
        "noise_across_runs",
    ),
    "reused_batch": Bug(
        "every draw serves two steps", Parts(sampler=ReusedBatch), "participation_autocorrelation"
    ),
    "gram_cancellation": Bug(
        "norms come from float32 Gram matrices", Parts(clipper=GramClipper), "leave_one_out"
    ),
    "fp32_norms": Bug(
        "norms come from float32 gradients", Parts(clipper=MaterialisedClipper), "leave_one_out"
    ),
    "silent_when_empty": Bug(
        "an empty draw gets no noise", Parts(optimizer=SilentWhenEmpty), "noise_chi2"
    ),
    "repeated_noise": Bug(
        "every step of a round gets the same noise",
        Parts(optimizer=RepeatedNoise),
        "noise_autocorrelation",
    ),
    "fixed_size_batches": Bug(
        "batches have a fixed size", Parts(sampler=FixedSize), "batch_size_spread"
    ),
}


def planted(name: str | None) -> Parts:
    """The parts of an engine with this bug, or of the shipped one.

    Raises:
        StudyError: No bug has this name.
    """
    if name is None:
        return Parts()
    if name not in BUGS:
        raise unknown("bug", name, BUGS)
    return BUGS[name].parts

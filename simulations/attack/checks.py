"""The exact checks: what the engine promises of one step, held against what the windows saw.

Each returns a `Finding`. A statistical check fails a correct engine with probability below
`FALSE_ALARM`, corrected for how many pairs or steps it looked at; `leave_one_out` never does: its
threshold is the sensitivity that is charged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from client.site.encoders.dataset import Dataset
from client.site.training.plan import DPExecutionPlan
from common.study import Site, Study
from simulations.attack.engine import RECORDS, SITES, Engine, Parts, Step
from simulations.attack.patients import canaries, cancelling, ordinary

FALSE_ALARM = 1e-6
PATIENTS = 128  # of a campaign's site
_PASS = 8  # patients of a pass in `leave_one_out`, so that those who remain move to other passes
_ROUNDS = (1, 2)
_EXECUTIONS = (0, 1)
_STRENGTHS = (1e6, 1e9)  # of the weights behind the projectors, in an adversarial adapter
# Of the two records whose gradients cancel; float32 has 7 digits.
_DIFFERENCES = [10.0**-e for e in (1, 3, 4, 4.5, 5, 5.5, 6, 6.5)]


class Finding(BaseModel):
    """What a check found.

    Attributes:
        statistic, threshold: The check passed if the one is at most the other.
        p_value: Of the statistic for a correct engine; None where the check is no test.
        detail: What the statistic is, for a reader.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    passed: bool
    statistic: float
    threshold: float
    p_value: float | None
    detail: str


@dataclass(frozen=True)
class Campaign:
    """Rounds of the same run, at two sites, executed twice, all from the same seed.

    Attributes:
        plan: What every step claims to obey.
        steps: Of the sites of 128 patients, in the order in which they were taken.
        empty: Of a site that has no patient to draw.
    """

    plan: DPExecutionPlan
    steps: tuple[Step, ...]
    empty: tuple[Step, ...]

    @cached_property
    def noise_correlations(self) -> NDArray[np.float64]:
        """[steps, steps]; nan where nothing was added."""
        noise = torch.stack([step.released - step.clipped for step in self.steps])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.corrcoef(noise.numpy())

    @cached_property
    def participation(self) -> NDArray[np.bool_]:
        """[steps, patients]."""
        return np.stack([step.entered for step in self.steps])


def campaign(study: Study, seed: int, parts: Parts | None = None) -> Campaign:
    """Runs two rounds at each of two sites, twice, and one at a site without patients.

    Args:
        study: Resolved.
        seed: Of the patients.
        parts: The engine; as shipped by default.
    """
    steps: list[Step] = []
    for execution in _EXECUTIONS:
        for number, site in enumerate(SITES):
            engine = Engine(study, site, ordinary(PATIENTS, seed + number), parts, execution)
            for round_ in _ROUNDS:
                steps += engine.round(round_)
    nobody = Engine(study, SITES[0], ordinary(1, seed).subset([]), parts)
    return Campaign(nobody.plan, tuple(steps), tuple(nobody.round(1)))


# -- sensitivity --------------------------------------------------------------------------------


def leave_one_out(study: Study, seed: int, parts: Parts | None = None) -> Finding:
    """No patient moves the clipped sum by more than the sensitivity, whatever the adapter.

    Every patient enters; each leaves once. Ordinary patients and canaries under the study's first
    adapter; patients whose records cancel under adapters that a hostile coordinator would send:
    projectors of zero, so that every record gets the same logits, before weights up to 10^9.
    """
    everybody = study.model_copy(
        update={
            "privacy": study.privacy.model_copy(update={"sample_rate": 1.0}),
            "training": study.training.model_copy(update={"steps_per_round": 1}),
            "federation": study.federation.model_copy(
                update={"sites": {name: Site(patients_declared=_PASS) for name in SITES}}
            ),
        }
    )
    pairs = cancelling(_DIFFERENCES, seed)
    moved = {
        "ordinary patients": _most_moved(everybody, ordinary(6, seed, RECORDS), parts),
        "canaries": _most_moved(everybody, canaries(4, RECORDS, seed), parts),
    }
    for strength in _STRENGTHS:

        def send(engine: Engine, strength: float = strength) -> None:
            _send_hostile(engine, strength, seed)

        moved[f"cancelling records, weights {strength:.0e}"] = _most_moved(
            everybody, pairs, parts, send
        )
    worst = max(moved, key=lambda name: moved[name])
    plan = Engine(everybody, SITES[0], pairs, parts).plan
    limit = plan.sensitivity / plan.max_grad_norm
    return Finding(
        check="leave_one_out",
        passed=moved[worst] <= limit,
        statistic=moved[worst],
        threshold=limit,
        p_value=None,
        detail=f"‖S(D) − S(D∖p)‖ / C is at most {moved[worst]:.6g}, for {worst}",
    )


def _most_moved(
    study: Study,
    patients: Dataset,
    parts: Parts | None,
    send: Callable[[Engine], None] = lambda engine: None,
) -> float:
    """Largest ‖S(D) − S(D∖p)‖ / C of the patients' first step; `send` puts an adapter in."""

    def total(some: Dataset) -> torch.Tensor:
        engine = Engine(study, SITES[0], some, parts)
        send(engine)
        return engine.round(1)[0].clipped

    with_all, members = total(patients), range(patients.n_patients)
    moved = [
        float((with_all - total(patients.subset([p for p in members if p != leaver]))).norm())
        for leaver in members
    ]
    return max(moved) / study.privacy.max_grad_norm


def _send_hostile(engine: Engine, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()  # every record gets logits of 0
        weight = engine.model.mix.weight  # all features equal: rounding errors agree
        weight.copy_(strength * torch.randn(len(weight), 1, generator=generator))


# -- noise --------------------------------------------------------------------------------------


def noise_chi2(campaign: Campaign) -> Finding:
    """What is added has the variance that is priced, in every step, also after an empty draw."""
    steps = [*campaign.steps, *campaign.empty]
    squares = (
        np.array([float((step.released - step.clipped).square().sum()) for step in steps])
        / campaign.plan.noise_std**2
    )
    size = steps[0].clipped.numel()
    pooled = _two_sided(stats.chi2(size * len(steps)), float(squares.sum()))
    single = [_two_sided(stats.chi2(size), float(of_step)) for of_step in squares]
    worst = int(np.argmin(single))
    return _judged(
        "noise_chi2",
        2 * min(pooled, single[worst] * len(steps)),
        f"noise variance / claimed: {squares.mean() / size:.5f}, in the worst of {len(steps)} "
        f"steps {squares[worst] / size:.4f}",
    )


def noise_autocorrelation(campaign: Campaign) -> Finding:
    """Noise of different steps and rounds of one execution at one site is uncorrelated."""
    return _noise("noise_autocorrelation", campaign, _same_execution)


def noise_across_runs(campaign: Campaign) -> Finding:
    """Noise of two executions of the same run at the same site is uncorrelated."""
    return _noise("noise_across_runs", campaign, _same_site)


def noise_across_sites(campaign: Campaign) -> Finding:
    """Noise of two sites of one run is uncorrelated."""
    return _noise("noise_across_sites", campaign, _other_site)


def _noise(name: str, campaign: Campaign, kind: Callable[[Step, Step], bool]) -> Finding:
    """Of independent Gaussians, a correlation is Student's t in disguise: exact, for every pair."""
    pairs = list(_pairs(campaign.steps, kind))
    seen = np.abs([campaign.noise_correlations[a, b] for a, b in pairs])
    worst = float(np.nan_to_num(seen, nan=1.0).max())
    freedom = campaign.steps[0].clipped.numel() - 2
    t = worst * np.sqrt(freedom / max(1 - worst**2, 1e-15))
    p_value = 2 * float(stats.t.sf(t, freedom)) * len(pairs)
    return _judged(name, p_value, f"largest |correlation| of {len(pairs)} pairs: {worst:.4f}")


# -- participation ------------------------------------------------------------------------------


def sampler_rate(campaign: Campaign) -> Finding:
    """Patients enter steps at the rate that is priced: exact binomial test."""
    entered = campaign.participation
    count, trials, q = int(entered.sum()), entered.size, campaign.plan.sample_rate
    return _judged(
        "sampler_rate",
        float(stats.binomtest(count, trials, q).pvalue),
        f"{count} of {trials} patient-steps, a rate of {count / trials:.4f}; claimed {q}",
    )


def batch_size_spread(campaign: Campaign) -> Finding:
    """The number of patients in a step varies as Poisson sampling says: batches of fixed size do
    not earn its price."""
    sizes, q = campaign.participation.sum(1), campaign.plan.sample_rate
    variance = PATIENTS * q * (1 - q)
    total = float(np.square(sizes - sizes.mean()).sum() / variance)
    return _judged(
        "batch_size_spread",
        _two_sided(stats.chi2(len(sizes) - 1), total),
        f"variance of batch sizes / binomial: {total / (len(sizes) - 1):.3f}",
    )


def participation_autocorrelation(campaign: Campaign) -> Finding:
    """Who enters a step says nothing of who enters another, in the same or in the next round."""
    return _overlap("participation_autocorrelation", campaign, _same_execution)


def participation_across_runs(campaign: Campaign) -> Finding:
    """Nor does it say who enters when the same run is executed again."""
    return _overlap("participation_across_runs", campaign, _same_site)


def participation_across_sites(campaign: Campaign) -> Finding:
    """Nor who enters at another site."""
    return _overlap("participation_across_sites", campaign, _other_site)


def _overlap(name: str, campaign: Campaign, kind: Callable[[Step, Step], bool]) -> Finding:
    """Of two independent draws of a and b patients, whatever the rate, the overlap is
    hypergeometric: Fisher's exact test, for every pair."""
    entered = campaign.participation
    overlaps, sizes = entered.astype(int) @ entered.astype(int).T, entered.sum(1)
    first, second = np.array(list(_pairs(campaign.steps, kind))).T
    seen = overlaps[first, second]
    under = stats.hypergeom(PATIENTS, sizes[first], sizes[second])
    p_values = np.minimum(1, 2 * np.minimum(under.cdf(seen), under.sf(seen - 1)))
    worst = int(np.argmin(p_values))
    expected = sizes[first[worst]] * sizes[second[worst]] / PATIENTS
    return _judged(
        name,
        float(p_values[worst]) * len(seen),
        f"most unlikely overlap of {len(seen)} pairs: {seen[worst]}; expected {expected:.1f}",
    )


# -- what the checks share ----------------------------------------------------------------------


def _same_execution(a: Step, b: Step) -> bool:
    return a.site == b.site and a.execution == b.execution


def _same_site(a: Step, b: Step) -> bool:
    return a.site == b.site and a.execution != b.execution


def _other_site(a: Step, b: Step) -> bool:
    return a.site != b.site


def _pairs(
    steps: tuple[Step, ...], kind: Callable[[Step, Step], bool]
) -> Iterator[tuple[int, int]]:
    return ((a, b) for a, b in combinations(range(len(steps)), 2) if kind(steps[a], steps[b]))


def _two_sided(under: stats.distributions.rv_frozen, seen: float) -> float:
    return min(1.0, 2 * min(float(under.cdf(seen)), float(under.sf(seen))))


def _judged(name: str, p_value: float, detail: str) -> Finding:
    """A test's finding; statistic and threshold are -log10 of p-value and false alarm rate."""
    p_value = min(1.0, max(p_value, 1e-300))
    return Finding(
        check=name,
        passed=p_value >= FALSE_ALARM,
        statistic=-np.log10(p_value),
        threshold=-np.log10(FALSE_ALARM),
        p_value=p_value,
        detail=detail,
    )


CAMPAIGN_CHECKS: Mapping[str, Callable[[Campaign], Finding]] = {
    check.__name__: check
    for check in (
        noise_chi2,
        noise_autocorrelation,
        noise_across_runs,
        noise_across_sites,
        sampler_rate,
        batch_size_spread,
        participation_autocorrelation,
        participation_across_runs,
        participation_across_sites,
    )
}
"""Checks of what one campaign recorded."""

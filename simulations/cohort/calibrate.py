"""Finds the fixed constants `latent.CALIBRATION`: ``python -m simulations.cohort.calibrate``.

It looks at the disease model alone: at no image, no laboratory value and no trained model. It was
run once; what it printed stands in `latent`.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from simulations.cohort import latent
from simulations.cohort.latent import CALIBRATION, FINDINGS, PREVALENCE, TASKS
from simulations.cohort.profiles import PROFILES

CEILING = 0.915
"""AUROC of the true risk that the scales aim at."""


def fit(patients: int = 10_000, rounds: int = 4) -> dict[str, tuple[float, float]]:
    """Intercept and scale per task, over the first four hospitals with `patients` each.

    Findings are solved for on one population. Hazards decide who is still there to be looked at,
    so each round draws anew and corrects by what was missed.
    """
    for _ in range(rounds):
        risk, state, age = _population(patients)
        for column, task in enumerate(TASKS):
            intercept, scale = CALIBRATION[task]
            if task in FINDINGS:
                intercept, scale = _solve(latent.direction(task, state, age), PREVALENCE[task])
            else:
                target, now = PREVALENCE[task], risk[:, column].mean()
                intercept += np.log(target / (1 - target)) - np.log(now / (1 - now))
                scale *= 1 + 2 * (CEILING - expected_auroc(risk[:, column]))
            CALIBRATION[task] = (round(float(intercept), 3), round(float(scale), 3))
    return dict(CALIBRATION)


def expected_auroc(risk: np.ndarray) -> float:
    """AUROC that the risk itself reaches on labels drawn from it, in expectation."""
    ranked = np.sort(risk)
    below = np.cumsum(1 - ranked) - (1 - ranked)  # negatives to be expected below each record
    itself = (risk * (1 - risk)).sum()
    return float((ranked * below).sum() / (risk.sum() * (1 - risk).sum() - itself))


def _population(patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True risks, states and ages at all X-ray studies of the first four hospitals."""
    parts = []
    for index, profile in enumerate(list(PROFILES.values())[:4]):
        drawn = latent.simulate(profile, patients, np.random.default_rng([2026, index]))
        stay, hours = drawn.studies.stay, drawn.studies.hours
        years = drawn.age[drawn.stays.patient[stay]]
        parts.append((drawn.studies.risk, drawn.stays.at(stay, hours), years))
    risk, state, age = (np.concatenate(part) for part in zip(*parts, strict=True))
    return risk, state, age


def _solve(along: np.ndarray, prevalence: float) -> tuple[float, float]:
    """Intercept and scale of a logit along `along` that reach the prevalence and `CEILING`."""

    def risk(intercept: float, scale: float) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-intercept - scale * along)))

    def intercept(scale: float) -> float:
        return float(brentq(lambda b: risk(b, scale).mean() - prevalence, -30, 30))

    scale = brentq(lambda s: expected_auroc(risk(intercept(s), s)) - CEILING, 0.5, 6)
    return intercept(scale), float(scale)


if __name__ == "__main__":
    for name, (intercept, scale) in fit().items():
        print(f'    "{name}": ({intercept}, {scale}),')

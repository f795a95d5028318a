"""The disease model: latent axes of a patient, the true risks that follow, and what happens.

Every patient has eleven latent axes (standard normal but for the hospital's case mix). Each is the
sum of a part that lasts for life, one that holds for a stay, and one that drifts from half-day to
half-day. The twelve tasks of UNI-MLM are draws from risks that are functions of the axes and age:
findings of an X-ray by a logistic model of the state at that moment, death and discharge as
competing hazards. So the best possible score is known (`Studies.risk`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulations.cohort.profiles import Profile

Floats = NDArray[np.float64]

# axis: variance of the part of a lifetime, of a stay, of the moment; they sum to 1
_VARIANCES = {
    "heart": (0.75, 0.15, 0.10),  # enlargement and failure
    "fluid": (0.35, 0.40, 0.25),  # overload
    "infection": (0.25, 0.50, 0.25),  # of the lung
    "collapse": (0.25, 0.50, 0.25),  # loss of lung volume
    "leak": (0.25, 0.55, 0.20),  # air in the pleura
    "trauma": (0.30, 0.65, 0.05),  # of bone
    "neoplasm": (0.80, 0.15, 0.05),
    "mediastinum": (0.65, 0.25, 0.10),  # aorta, bleeding
    "kidney": (0.60, 0.30, 0.10),
    "shock": (0.20, 0.50, 0.30),
    "frailty": (0.85, 0.10, 0.05),
}
AXES = tuple(_VARIANCES)

FINDINGS: dict[str, dict[str, float]] = {
    "fracture": {"trauma": 1.0, "frailty": 0.5, "neoplasm": 0.3, "age": 0.4},
    "lung_lesion": {"neoplasm": 1.0, "frailty": 0.4, "infection": 0.3, "age": 0.5},
    "enlarged_cardiomediastinum": {"mediastinum": 1.0, "heart": 0.7, "shock": 0.4, "age": 0.3},
    "consolidation": {"infection": 1.0, "collapse": 0.5, "shock": 0.5},
    "pneumonia": {"infection": 1.0, "frailty": 0.5, "shock": 0.5, "fluid": -0.3},
    "atelectasis": {"collapse": 1.0, "fluid": 0.4, "trauma": 0.4, "frailty": 0.5},
    "lung_opacity": {"infection": 0.8, "fluid": 0.7, "collapse": 0.6, "neoplasm": 0.3},
    "pneumothorax": {"leak": 1.0, "trauma": 0.6, "frailty": -0.3},
    "edema": {"fluid": 1.0, "heart": 0.6, "kidney": 0.6},
    "cardiomegaly": {"heart": 1.0, "fluid": 0.4, "kidney": 0.5, "age": 0.4},
}
"""Weights of axes and standardised age in the logit of each CheXpert finding, before scaling."""
_DEATH = {"shock": 1.0, "frailty": 0.6, "age": 0.5, "kidney": 0.4, "infection": 0.3, "heart": 0.3}
_DISCHARGE = {
    "shock": -0.8,
    "frailty": -0.5,
    "infection": -0.5,
    "collapse": -0.3,
    "fluid": -0.4,
    "leak": -0.3,
    "kidney": -0.3,
    "age": -0.2,
}
TASKS = (*FINDINGS, "length_of_stay", "mortality_48h")

PREVALENCE = {
    "fracture": 1527 / 1612,
    "lung_lesion": 1511 / 1611,
    "enlarged_cardiomediastinum": 4783 / 6614,
    "consolidation": 8046 / 9747,
    "pneumonia": 8145 / 14684,
    "atelectasis": 29466 / 30274,
    "lung_opacity": 28433 / 29540,
    "pneumothorax": 6365 / 34171,
    "edema": 19217 / 30713,
    "cardiomegaly": 27760 / 34832,
    "length_of_stay": 8488 / 90811,
    "mortality_48h": 2230 / 90811,
}
"""Share of true among known labels: Table I of UNI-MLM."""

# task: intercept and scale. Logit of a finding; natural log of a hazard per hour of the other two.
# Found by `calibrate.fit()` for the prevalences above; fixed since.
CALIBRATION: dict[str, tuple[float, float]] = {
    "fracture": (4.691, 2.302),
    "lung_lesion": (4.478, 2.266),
    "enlarged_cardiomediastinum": (1.909, 2.741),
    "consolidation": (2.87, 2.671),
    "pneumonia": (0.334, 2.966),
    "atelectasis": (5.394, 2.189),
    "lung_opacity": (5.0, 2.216),
    "pneumothorax": (-2.87, 2.506),
    "edema": (1.011, 2.882),
    "cardiomegaly": (2.705, 2.623),
    "length_of_stay": (-6.541, 2.209),
    "mortality_48h": (-9.568, 2.258),
}

KNOWN = 0.4
"""Share of findings that are known. Table I has 2 to 38 %: too few negatives at this size."""
UNCERTAIN = 0.15
"""Share of the other findings that are marked uncertain (-1.0) instead of left blank."""

STEP_HOURS = 12.0
_STEPS = 64
_LONGEST_HOURS = 720.0
"""Nobody stays longer than 30 days; images end early enough for no risk to reach that far."""
_LAST_IMAGE_HOURS = _LONGEST_HOURS - 60.0
_SETTLING_HOURS = 110.0
"""The hazard of discharge grows with the square of time; at this hour it is exp(`score`)."""
_WINDOW_HOURS = 48.0
MOST_STAYS = 5


@dataclass(frozen=True)
class Stays:
    """Hospital admissions, in order of patient and time. All arrays have one entry per stay.

    Attributes:
        patient: Number of the patient.
        visit: 0 for a patient's first stay.
        gap_hours: Hours since the end of the stay before; 0 for the first.
        hours: Length of the stay.
        died: Whether it ended with death.
        state: Axes ``[stay, step, axis]``, one step per `STEP_HOURS`.
    """

    patient: NDArray[np.int64]
    visit: NDArray[np.int64]
    gap_hours: Floats
    hours: Floats
    died: NDArray[np.bool_]
    state: Floats

    def at(self, stay: NDArray[np.int64], hours: Floats) -> Floats:
        """Axes ``[N, axis]`` of stays at hours since admission; before it, as on admission."""
        step = np.clip(hours // STEP_HOURS, 0, self.state.shape[1] - 1).astype(int)
        return np.asarray(self.state[stay, step])


@dataclass(frozen=True)
class Studies:
    """X-ray studies, in order of stay and time.

    Attributes:
        stay: Number of the stay.
        hours: Since admission.
        risk: True probability of each task ``[study, task]``, given the latent state. For death and
            discharge the state of the next 48 hours counts.
        label: 1 true, 0 false, -1 uncertain, NaN blank ``[study, finding]``.
    """

    stay: NDArray[np.int64]
    hours: Floats
    risk: Floats
    label: Floats


@dataclass(frozen=True)
class Population:
    """The patients of one hospital, their stays, and the studies within these."""

    age: Floats
    male: NDArray[np.bool_]
    stays: Stays
    studies: Studies


def simulate(profile: Profile, patients: int, rng: np.random.Generator) -> Population:
    """Draws a hospital's patients and all that befalls them."""
    age = np.clip(rng.normal(profile.age, 15, size=patients), 18, 91)
    male = rng.random(patients) < 0.55
    mix = np.array([profile.mix.get(axis, 0.0) for axis in AXES])
    life = mix + _deviations(0) * rng.normal(size=(patients, len(AXES)))
    stays, cumulative = _stays(life, age, rng)
    return Population(age, male, stays, _studies(stays, cumulative, age, profile, rng))


def score(task: str, state: Floats, age: Floats) -> Floats:
    """Logit (findings) or log hazard per hour of a task: state ``[..., axis]``, age ``[...]``."""
    intercept, scale = CALIBRATION[task]
    return intercept + scale * direction(task, state, age)


def direction(task: str, state: Floats, age: Floats) -> Floats:
    """The task's weighted sum of axes and age, with variance 1 over standard normal axes."""
    weights = FINDINGS.get(task) or (_DEATH if task == "mortality_48h" else _DISCHARGE)
    columns = np.array([weights.get(axis, 0.0) for axis in AXES])
    total = np.einsum("...a,a->...", state, columns) + weights.get("age", 0.0) * (age - 64) / 15
    return np.asarray(total / np.sqrt(sum(w**2 for w in weights.values())))


def _deviations(part: int) -> Floats:
    return np.sqrt([variances[part] for variances in _VARIANCES.values()])


def _stays(life: Floats, age: Floats, rng: np.random.Generator) -> tuple[Stays, Floats]:
    """Stay after stay of all patients at once; with the cumulative incidence of each stay."""
    parts = []
    patient, gap = np.arange(len(age)), np.zeros(len(age))
    for visit in range(MOST_STAYS):
        base = life[patient] + _deviations(1) * rng.normal(size=(len(patient), len(AXES)))
        state = base[:, None] + _deviations(2) * _drift(len(patient), rng)
        cumulative = _incidence(state, age[patient])
        hours, died = _end(cumulative, rng)
        parts.append((patient, np.full(len(patient), visit), gap, hours, died, state, cumulative))

        burden = life[patient] @ np.array([{"frailty": 0.8, "heart": 0.5}.get(a, 0) for a in AXES])
        soon = rng.random(len(patient)) < _sigmoid(-1.9 + burden)
        later = rng.random(len(patient)) < 0.16
        again = ~died & (soon | later)
        days = np.where(soon, rng.uniform(1, 29, len(soon)), 31 + rng.exponential(250, len(soon)))
        patient, gap = patient[again], 24 * days[again]
    order = np.lexsort(
        [np.concatenate([p[1] for p in parts]), np.concatenate([p[0] for p in parts])]
    )
    columns = [np.concatenate(column)[order] for column in zip(*parts, strict=True)]
    return Stays(*columns[:-1]), columns[-1]


def _drift(stays: int, rng: np.random.Generator) -> Floats:
    """Stationary autoregression ``[stay, step, axis]`` with variance 1 and memory of 2.5 days."""
    keep = np.exp(-STEP_HOURS / 60)
    drift = rng.normal(size=(stays, _STEPS, len(AXES)))
    for step in range(1, _STEPS):
        drift[:, step] = keep * drift[:, step - 1] + np.sqrt(1 - keep**2) * drift[:, step]
    return drift


def _incidence(state: Floats, age: Floats) -> Floats:
    """Of each stay at each step's start ``[stay, step + 1, 3]``: the cumulative hazard, and the
    probability to have died and to have been discharged by then."""
    hours = STEP_HOURS * (np.arange(_STEPS) + 0.5)
    settled = np.square(hours / _SETTLING_HOURS)
    death = np.exp(score("mortality_48h", state, age[:, None]))
    leave = np.exp(score("length_of_stay", state, age[:, None])) * settled
    total = death + leave
    hazard = np.pad(np.cumsum(total * STEP_HOURS, axis=1), ((0, 0), (1, 0)))
    ending = -np.diff(np.exp(-hazard), axis=1)
    causes = [np.cumsum(ending * cause / total, axis=1) for cause in (death, leave)]
    return np.stack([hazard, *(np.pad(c, ((0, 0), (1, 0))) for c in causes)], axis=2)


def _between(cumulative: Floats, stay: NDArray[np.int64], hours: Floats) -> Floats:
    """Survival, death and discharge ``[N, 3]`` by any hour; hazards are constant within a step."""
    step = np.minimum(hours // STEP_HOURS, _STEPS - 1).astype(int)
    low, high = cumulative[stay, step], cumulative[stay, step + 1]
    share = hours / STEP_HOURS - step
    hazard = low[:, 0] + share * (high[:, 0] - low[:, 0])
    before, now, after = np.exp(-low[:, 0]), np.exp(-hazard), np.exp(-high[:, 0])
    ended = (before - now) / np.maximum(before - after, 1e-300)
    causes = low[:, 1:] + ended[:, None] * (high[:, 1:] - low[:, 1:])
    return np.concatenate([now[:, None], causes], axis=1)


def _end(cumulative: Floats, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """When each stay ends, and whether with death."""
    hazard = cumulative[:, :, 0]
    drawn = rng.exponential(size=len(hazard))
    step = np.minimum((hazard[:, 1:] < drawn[:, None]).sum(axis=1), _STEPS - 1)
    every = np.arange(len(hazard))
    low, high = cumulative[every, step], cumulative[every, step + 1]
    share = np.minimum((drawn - low[:, 0]) / (high[:, 0] - low[:, 0]), 1.0)
    hours = STEP_HOURS * (step + share)
    deaths, leaves = (high - low)[:, 1], (high - low)[:, 2]
    died = rng.random(len(hazard)) * (deaths + leaves) < deaths
    return np.minimum(hours, _LONGEST_HOURS), died & (hours < _LONGEST_HOURS)


def _studies(
    stays: Stays, cumulative: Floats, age: Floats, profile: Profile, rng: np.random.Generator
) -> Studies:
    """Images are planned without a look at the end of the stay; what lies after it never was."""
    count = rng.choice(5, p=[0.0, 0.4, 0.27, 0.19, 0.14], size=len(stays.hours))
    count[rng.random(len(count)) >= profile.images] = 0
    first = rng.uniform(4, 24, size=len(count))
    gaps = 6 + rng.exponential(36, size=(len(count), 4))
    gaps[:, 0] = first
    planned = np.cumsum(gaps, axis=1)
    taken = (np.arange(4) < count[:, None]) & (
        planned < np.minimum(stays.hours, _LAST_IMAGE_HOURS)[:, None] - 0.1
    )
    stay, number = np.nonzero(taken)
    hours = np.floor(planned[stay, number] * 3600) / 3600  # a study has a time in seconds

    state, years = stays.at(stay, hours), age[stays.patient[stay]]
    findings = [_sigmoid(score(finding, state, years)) for finding in FINDINGS]
    alive, *before = _between(cumulative, stay, hours).T
    _, *after = _between(cumulative, stay, hours + _WINDOW_HOURS).T
    died, left = ((b - a) / alive for a, b in zip(before, after, strict=True))
    risk = np.stack([*findings, left, died], axis=1)

    shape = (len(stay), len(FINDINGS))
    truth = (rng.random(shape) < risk[:, : len(FINDINGS)]).astype(float)
    unknown = np.where(rng.random(shape) < UNCERTAIN, -1.0, np.nan)
    return Studies(stay, hours, risk, np.where(rng.random(shape) < KNOWN, truth, unknown))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))

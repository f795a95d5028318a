"""Who is who and when: identifiers, shifted dates and ICU stays of a hospital's patients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from simulations.cohort.latent import Floats, Population
from simulations.cohort.series import VENTILATION, happens

Numbers = NDArray[np.int64]
Times = NDArray[Any]  # datetime64
IDENTIFIERS = 100_000
"""Of each kind that one hospital may give; the next hospital's begin after them."""


@dataclass(frozen=True)
class Calendar:
    """Identifiers and dates of a hospital's patients (P), stays (S), ICU stays (U), studies (R).

    Attributes:
        subject, hadm, study: Identifiers ``[P]``, ``[S]``, ``[R]``.
        admit, discharge: ``[S]``.
        icu: Number of the hospital stay of each ICU stay ``[U]``, with its `icu_id`.
        icu_in, icu_out: Hours since admission ``[U]``.
        taken: Time of each study ``[R]``.
        ventilated: Whether a stay has invasive ventilation ``[S]``.
    """

    subject: Numbers
    hadm: Numbers
    study: Numbers
    admit: Times
    discharge: Times
    icu: Numbers
    icu_id: Numbers
    icu_in: Floats
    icu_out: Floats
    taken: Times
    ventilated: NDArray[np.bool_]

    @property
    def icu_times(self) -> tuple[Times, Times]:
        """Beginning and end of each ICU stay."""
        start = self.admit[self.icu]
        into = start + duration(self.icu_in)
        out = start + duration(self.icu_out)
        return to_minute(into), to_minute(out)


def calendar(population: Population, index: int, rng: np.random.Generator) -> Calendar:
    """Gives identifiers (disjoint between hospitals) and shifted dates."""
    stays, studies = population.stays, population.studies
    patients, admissions = len(population.age), len(stays.hours)

    milliseconds = rng.integers(0, 1000, size=len(studies.stay)).astype("timedelta64[ms]")

    def draw(base: int, count: int) -> Numbers:
        return (
            base + IDENTIFIERS * index + np.sort(rng.choice(IDENTIFIERS, size=count, replace=False))
        )

    years = rng.integers(2110, 2190, size=patients)
    start = (years - 1970).astype("datetime64[Y]").astype("datetime64[s]")
    start = start + duration(
        24 * rng.integers(0, 300, size=patients) + rng.uniform(0, 24, patients)
    )
    admit = np.empty(admissions, dtype="datetime64[s]")
    for visit in range(int(stays.visit.max()) + 1):  # each begins some time after the one before
        now = np.flatnonzero(stays.visit == visit)
        before = admit[now - 1] + duration(stays.hours[now - 1])
        admit[now] = start[stays.patient[now]] if visit == 0 else before
        admit[now] = to_minute(admit[now] + duration(stays.gap_hours[now]))
    discharge = to_minute(admit + duration(stays.hours))

    on_icu = rng.random(admissions) < np.where(stays.visit == 0, 0.92, 0.8)
    start_hours = np.minimum(rng.uniform(0.3, 5, admissions), 0.3 * stays.hours)
    share = rng.beta(3, 2, size=admissions)
    to_the_end = stays.died & (rng.random(admissions) < 0.8)
    end_hours = np.where(to_the_end, stays.hours, start_hours + share * (stays.hours - start_hours))
    twice = on_icu & (end_hours - start_hours > 72) & (rng.random(admissions) < 0.1)
    pause = start_hours + 0.5 * (end_hours - start_hours)
    icu = np.concatenate([np.flatnonzero(on_icu), np.flatnonzero(twice)])
    icu_in = np.concatenate([start_hours[on_icu], pause[twice] + 12])
    icu_out = np.concatenate([np.where(twice, pause, end_hours)[on_icu], end_hours[twice]])
    order = np.lexsort([icu_in, icu])

    return Calendar(
        subject=draw(10_000_000, patients),
        hadm=rng.permutation(draw(20_000_000, admissions)),
        study=rng.permutation(draw(50_000_000, len(studies.stay))),
        admit=admit,
        discharge=discharge,
        icu=icu[order],
        icu_id=rng.permutation(draw(30_000_000, len(icu))),
        icu_in=icu_in[order],
        icu_out=icu_out[order],
        taken=admit[studies.stay] + duration(studies.hours) + milliseconds,
        ventilated=happens(VENTILATION, stays.state[:, 0], rng),
    )


def duration(hours: Floats | Numbers) -> NDArray[np.timedelta64]:
    """Hours as a time span, to the second."""
    return np.round(np.asarray(hours) * 3600).astype("timedelta64[s]")


def to_minute(times: Times) -> Times:
    """Times without their seconds, as most of MIMIC's are."""
    return times.astype("datetime64[m]").astype("datetime64[s]")


def timestamps(times: Times) -> pl.Series:
    """Times as a column; NaT is null."""
    return pl.Series(times.astype("datetime64[ms]"))

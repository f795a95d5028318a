"""What only a made-up hospital has: the true risks, and the best score that they allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from simulations.cohort.dates import Calendar, duration, timestamps
from simulations.cohort.latent import TASKS, Floats, Population

_DIGITS = 6


def truth(population: Population, dates: Calendar) -> pl.DataFrame:
    """One row per X-ray study: subject_id, hadm_id, study_id, time, and ``risk_<task>``, the true
    probability given the latent state."""
    stays, studies = population.stays, population.studies
    risk = np.round(studies.risk, _DIGITS)
    return pl.DataFrame(
        {
            "subject_id": dates.subject[stays.patient[studies.stay]],
            "hadm_id": dates.hadm[studies.stay],
            "study_id": dates.study,
            "time": timestamps(dates.taken),
            **{f"risk_{task}": risk[:, column] for column, task in enumerate(TASKS)},
        }
    ).sort("subject_id", "time")


def ceiling(population: Population, dates: Calendar) -> dict[str, Any]:
    """What the true risk scores on the labels as drawn: no model does better but by luck.

    Counted are the studies of admissions with an ICU stay, and of those the known labels.

    Returns:
        ``macro_auroc`` over tasks with both classes, and for each of ``tasks`` ``auroc``, ``n`` and
        ``true``.
    """
    stays, studies = population.stays, population.studies
    soon = dates.discharge[studies.stay] - dates.taken <= duration(np.array(48))
    died = stays.died[studies.stay]
    label = np.column_stack([studies.label, soon & ~died, soon & died])
    counted = np.isin(studies.stay, dates.icu)
    risk = np.round(studies.risk, _DIGITS)
    scores = {}
    for column, task in enumerate(TASKS):
        known = counted & (label[:, column] >= 0)
        true = label[known, column] == 1
        area = auroc(risk[known, column], true)
        scores[task] = {"auroc": area, "n": int(known.sum()), "true": int(true.sum())}
    areas = [score["auroc"] for score in scores.values() if score["auroc"] is not None]
    macro = round(float(np.mean(areas)), 4) if areas else None
    return {"macro_auroc": macro, "tasks": scores}


def auroc(score: Floats, true: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve (ties count half), 4 digits; nothing if there is but one class."""
    positive, negative = int(true.sum()), int((~true).sum())
    if not positive or not negative:
        return None
    above = rankdata(score)[true].sum() - positive * (positive + 1) / 2
    return round(float(above / (positive * negative)), 4)

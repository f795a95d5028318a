"""The tables of MIMIC-CXR-JPG, and what each image is to show."""

from __future__ import annotations

import numpy as np
import polars as pl

from simulations.cohort.dates import Calendar, timestamps
from simulations.cohort.latent import AXES, FINDINGS, Population
from simulations.cohort.layout import table
from simulations.cohort.phantom import SIGNS, Chest
from simulations.cohort.profiles import Profile

VIEW = 0.88
"""Correlation between an axis and the sign of it that an X-ray shows."""
_MEANING = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def metadata(
    population: Population, dates: Calendar, profile: Profile, rng: np.random.Generator
) -> tuple[pl.DataFrame, list[Chest]]:
    """The metadata table, and row by row the chest that its image shows.

    A study has a frontal image, and of patients who can stand often a lateral one.
    """
    stays, studies = population.stays, population.studies
    count, patient = len(studies.stay), stays.patient[studies.stay]
    state = stays.at(studies.stay, studies.hours)[:, [AXES.index(sign) for sign in SIGNS]]
    signs = VIEW * state + np.sqrt(1 - VIEW**2) * rng.normal(size=state.shape)
    build = rng.normal(size=(len(population.age), 4))[patient]
    tube = dates.ventilated[studies.stay]
    portable = rng.random(count) < np.where(tube, 0.97, profile.portable)
    twice = ~portable & (rng.random(count) < 0.5)
    study = np.sort(np.concatenate([np.arange(count), np.flatnonzero(twice)]))
    second = np.append(False, study[1:] == study[:-1])[: len(study)]
    view = np.where(second, "LATERAL", np.where(portable[study], "AP", "PA"))
    words = rng.integers(0, 2**32, size=(len(study), 5)).tolist()
    exam = np.where(portable, "CHEST (PORTABLE AP)", "CHEST (PA AND LAT)")[study]
    when = timestamps(dates.taken[study])
    frame = table(
        "cxr/mimic-cxr-2.0.0-metadata",
        dicom_id=pl.Series(
            ["-".join(f"{word:08x}" for word in five) for five in words], dtype=pl.String
        ),
        subject_id=dates.subject[patient][study],
        study_id=dates.study[study],
        PerformedProcedureStepDescription=exam,
        ViewPosition=view,
        Rows=np.full(len(study), profile.pixels[0]),
        Columns=np.full(len(study), profile.pixels[1]),
        StudyDate=when.dt.strftime("%Y%m%d"),
        StudyTime=when.dt.strftime("%H%M%S%.3f"),
        ProcedureCodeSequence_CodeMeaning=exam,
        ViewCodeSequence_CodeMeaning=pl.Series(
            [_MEANING[name] for name in view.tolist()], dtype=pl.String
        ),
        PatientOrientationCodeSequence_CodeMeaning=np.full(len(study), "Erect"),
    )
    return frame, [Chest(signs[s], build[s], bool(tube[s])) for s in study.tolist()]


def chexpert(population: Population, dates: Calendar) -> pl.DataFrame:
    """The ten findings as drawn; the other four columns follow from them and the ventilator."""
    studies = population.studies
    label = dict(zip(FINDINGS, studies.label.T, strict=True))
    tube = dates.ventilated[studies.stay]
    found = np.isin(studies.label, [1, -1]).any(axis=1) | tube
    columns = {finding.replace("_", " ").title(): drawn for finding, drawn in label.items()}
    return (
        table(
            "cxr/mimic-cxr-2.0.0-chexpert",
            subject_id=dates.subject[population.stays.patient[studies.stay]],
            study_id=dates.study,
            **columns,
            **{
                "No Finding": np.where(found, np.nan, 1.0),
                "Pleural Effusion": np.where(label["edema"] == 1, label["atelectasis"], np.nan),
                "Pleural Other": np.full(len(tube), np.nan),
                "Support Devices": np.where(tube, 1.0, np.nan),
            },
        )
        .fill_nan(None)
        .sort("subject_id", "study_id")
    )

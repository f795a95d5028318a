"""A small synthetic cohort, written as shards: every kind of input, no real person.

Each patient has a latent severity and a latent lung and kidney involvement; they drive vital signs,
laboratory values, words in notes, opacities in tiny chest-like pictures, and three outcomes. It
exercises the whole path and its result says nothing about medicine. Hospitals differ in case mix,
in level of measurement and in which inputs are missing.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from client.site.shard.shard import write_shard

NAMES = (
    "riverside",
    "northgate",
    "lakeview",
    "st-clara",
    "hillcrest",
    "eastmoor",
    "westbrook",
    "oakfield",
    "harbour",
    "summit",
)
PATIENTS = 250
TASKS = ("mortality", "pneumonia", "kidney_injury")

_SERIES = {  # name: (source, base, effect of severity, of lung, of kidney, noise)
    "heart_rate": ("chart", 82.0, 9.0, 2.0, 0.0, 8.0),
    "mbp_noninvasive": ("chart", 82.0, -7.0, 0.0, -2.0, 8.0),
    "respiratory_rate": ("chart", 17.0, 2.0, 3.0, 0.0, 2.5),
    "spo2": ("chart", 97.0, -0.5, -2.0, 0.0, 1.0),
    "temperature": ("chart", 37.0, 0.1, 0.4, 0.0, 0.4),
    "creatinine": ("lab", 1.1, 0.1, 0.0, 0.6, 0.2),
    "urea_nitrogen": ("lab", 20.0, 2.0, 0.0, 9.0, 4.0),
    "lactate": ("lab", 1.6, 0.7, 0.1, 0.1, 0.4),
    "white_blood_cells": ("lab", 9.5, 1.0, 2.5, 0.0, 2.0),
    "hemoglobin": ("lab", 11.0, -0.5, 0.0, -0.5, 1.2),
}
_RANGE = {"spo2": (60.0, 100.0), "creatinine": (0.3, 15.0), "lactate": (0.3, 20.0)}
_WORDS = {
    "severity": ("hypotensive, vasopressors started", "haemodynamically stable"),
    "lung": ("productive cough, crackles at the base, consolidation suspected", "lungs clear"),
    "kidney": ("oliguria, rising creatinine", "good urine output"),
}


def write_cohort(
    folder: Path, hospitals: int, *, patients: int = PATIENTS, seed: int = 0
) -> dict[str, Path]:
    """Writes `hospitals` shards under `folder` and returns them by name.

    The same arguments write the same bytes of data; a shard already there is kept.

    Args:
        hospitals: At least 1; names beyond the tenth are numbered.
        patients: Per hospital; about one in five has several stays.
    """
    written = {}
    for index in range(hospitals):
        name = NAMES[index] if index < len(NAMES) else f"hospital-{index + 1:02d}"
        path = folder / name
        if not (path / "shard.toml").exists():
            _write_hospital(path, name, patients, np.random.default_rng([seed, index]))
        written[name] = path
    return written


def _write_hospital(path: Path, name: str, patients: int, rng: np.random.Generator) -> None:
    mix = rng.normal(0, 0.3, size=3)  # case mix of severity, lung, kidney
    shift = {series: rng.normal(0, 0.3) * spec[-1] for series, spec in _SERIES.items()}
    has_images, has_notes = rng.uniform(0.4, 0.9), rng.uniform(0.6, 1.0)
    records, events, notes, images = [], [], [], []
    files: dict[str, bytes] = {}
    for number in range(patients):
        patient = f"{name}-p{number:04d}"
        base = rng.normal(size=3) + mix
        age, sex = float(np.clip(rng.normal(64, 15), 18, 95)), "FM"[int(rng.integers(2))]
        for visit in range(1 + int(rng.random() < 0.2) + int(rng.random() < 0.05)):
            stay = f"{patient}-s{visit}"
            state = base + 0.4 * rng.normal(size=3)
            severity, lung, kidney = state
            risk = {
                "mortality": 1.3 * severity + 0.5 * lung + 0.02 * (age - 64) - 1.6,
                "pneumonia": 2.0 * lung - 1.2,
                "kidney_injury": 1.8 * kidney + 0.3 * severity - 1.4,
            }
            known = rng.random(len(TASKS)) < 0.95
            labels = {
                f"y_{task}": bool(rng.random() < 1 / (1 + np.exp(-risk[task]))) if seen else None
                for task, seen in zip(TASKS, known, strict=True)
            }
            records.append(
                {
                    "record_id": f"{stay}-r",
                    "patient_id": patient,
                    "stay_id": stay,
                    "cutoff_hours": 24.0,
                    "age": round(age, 1),
                    "sex": sex,
                    **labels,
                }
            )
            events += _events(stay, state, shift, rng)
            if rng.random() < has_notes:
                notes.append(_note(stay, state, rng))
            if rng.random() < has_images:
                place = f"images/{stay}.jpg"
                files[place] = _picture(lung, rng)
                images.append(
                    {
                        "stay_id": stay,
                        "hours": round(float(rng.uniform(0, 20)), 2),
                        "path": place,
                        "view": "AP",
                    }
                )
    write_shard(
        path,
        meta={
            "name": f"Synthetic hospital {name}",
            "hospital": name,
            "dataset": "Fedward synthetic cohort",
            "licence": "CC0-1.0",
            "attribution": "made by simulations/cohort/synthetic.py",
        },
        records=pl.DataFrame(records, infer_schema_length=None),
        events=pl.DataFrame(events),
        notes=pl.DataFrame(notes),
        images=pl.DataFrame(images),
        files=files,
    )


def _events(
    stay: str, state: np.ndarray, shift: dict[str, float], rng: np.random.Generator
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for series, (source, base, *effects, noise) in _SERIES.items():
        if rng.random() < 0.12:
            continue
        count = int(rng.integers(2, 6 if source == "chart" else 4))
        hours = np.unique(np.round(rng.uniform(0, 24, size=count), 3))
        level = base + shift[series] + float(np.dot(effects, state))
        values = level + noise * rng.normal(size=len(hours))
        low, high = _RANGE.get(series, (0.1, 300.0))
        rows += [
            {
                "stay_id": stay,
                "hours": float(h),
                "source": source,
                "series": series,
                "value": round(float(np.clip(v, low, high)), 3),
            }
            for h, v in zip(hours, values, strict=True)
        ]
    if rng.random() < 1 / (1 + np.exp(-(state[0] - 1))):
        rows.append(
            {
                "stay_id": stay,
                "hours": round(float(rng.uniform(0, 24)), 3),
                "source": "procedure",
                "series": "mechanical_ventilation",
                "value": 1.0,
            }
        )
    return rows


def _note(stay: str, state: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    parts = [
        there if value + 0.5 * rng.normal() > 0.5 else absent
        for value, (there, absent) in zip(state, _WORDS.values(), strict=True)
    ]
    rng.shuffle(parts)
    return {
        "stay_id": stay,
        "hours": round(float(rng.uniform(0, 22)), 2),
        "category": "nursing",
        "text": f"Assessment: {'; '.join(parts)}.",
    }


def _picture(lung: float, rng: np.random.Generator, size: int = 64) -> bytes:
    """Two dark lung fields in a bright chest, with an opacity that grows with `lung`; JPEG."""
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.full((size, size), 0.75)
    for centre in (0.3, 0.7):
        picture -= 0.5 * (((x - centre) / 0.16) ** 2 + ((y - 0.5) / 0.32) ** 2 < 1)
    side, height = rng.choice([0.3, 0.7]), rng.uniform(0.45, 0.7)
    spot = np.exp(-(((x - side) / 0.1) ** 2 + ((y - height) / 0.12) ** 2))
    picture += 0.5 * spot / (1 + np.exp(-2 * (lung - 0.5)))
    picture += 0.03 * rng.normal(size=picture.shape)
    buffer = io.BytesIO()
    pixels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels, mode="L").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

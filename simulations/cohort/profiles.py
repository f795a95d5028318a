"""The hospitals of the synthetic cohort: who comes to them, how they measure, what they lack.

Written by hand, so that the first four are as different as four hospitals are, and so that their
case mixes cancel: the whole keeps the published prevalences, no single hospital does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Style = Literal["prose", "telegraphic", "abbreviated"]


@dataclass(frozen=True)
class Profile:
    """What makes a hospital differ from the others.

    Attributes:
        age: Mean age of its patients in years.
        mix: Shift of the patients' latent axes, in standard deviations.
        style: How its notes are written.
        notes, procedures, labs, charts, images: Share of stays that have any; a hospital with no
            notes at all exports no `note` folder.
        pixels: Height and width of its X-ray images.
        gamma, contrast, noise: Of its scanner; 1, 1 and 0.03 are a good one.
        portable: Share of images taken at the bedside (AP).
        celsius: Share of temperatures charted in Celsius.
    """

    age: float = 64.0
    mix: dict[str, float] = field(default_factory=dict)
    style: Style = "prose"
    notes: float = 0.9
    procedures: float = 0.9
    labs: float = 0.97
    charts: float = 0.97
    images: float = 0.95
    pixels: tuple[int, int] = (256, 256)
    gamma: float = 1.0
    contrast: float = 1.0
    noise: float = 0.03
    portable: float = 0.7
    celsius: float = 0.1


PROFILES: dict[str, Profile] = {
    # The four of the demo. Their mixes cancel on every axis.
    "riverside": Profile(  # teaching hospital: everything is there
        age=63,
        mix={"infection": 0.25, "neoplasm": 0.3, "trauma": -0.1, "heart": -0.1, "frailty": -0.15},
    ),
    "northgate": Profile(  # trauma centre: young patients, hardly a procedure recorded
        age=56,
        mix={"trauma": 0.5, "leak": 0.3, "heart": -0.3, "frailty": -0.2, "neoplasm": -0.2},
        style="telegraphic",
        procedures=0.06,
        pixels=(288, 240),
        gamma=1.25,
        noise=0.045,
        portable=0.9,
    ),
    "lakeview": Profile(  # community hospital: old patients, a dull scanner, no note module
        age=71,
        mix={"frailty": 0.4, "fluid": 0.2, "infection": 0.1, "trauma": -0.2, "leak": -0.2},
        notes=0.0,
        pixels=(224, 256),
        gamma=0.85,
        contrast=0.75,
        noise=0.05,
        portable=0.6,
        celsius=0.8,
    ),
    "st-clara": Profile(  # heart centre: gaps in laboratory and images
        age=66,
        mix={
            "heart": 0.4,
            "mediastinum": 0.2,
            "infection": -0.35,
            "fluid": -0.2,
            "trauma": -0.2,
            "leak": -0.1,
            "neoplasm": -0.1,
            "frailty": -0.05,
            "shock": 0.0,
        },
        style="abbreviated",
        labs=0.6,
        images=0.7,
        pixels=(256, 288),
        contrast=0.9,
        noise=0.02,
        portable=0.5,
    ),
    # Six more; their mixes cancel among themselves.
    "hillcrest": Profile(age=68, mix={"kidney": 0.3, "leak": -0.2}, style="telegraphic", labs=0.85),
    "eastmoor": Profile(
        age=59, mix={"infection": 0.3, "kidney": -0.2}, notes=0.5, gamma=1.15, pixels=(240, 240)
    ),
    "westbrook": Profile(
        age=65, mix={"shock": 0.25, "fluid": 0.2}, style="abbreviated", charts=0.8, noise=0.04
    ),
    "oakfield": Profile(
        age=70, mix={"frailty": 0.2, "infection": -0.3, "shock": -0.25}, notes=0.7, contrast=0.85
    ),
    "harbour": Profile(
        age=61, mix={"leak": 0.2, "fluid": -0.2, "kidney": -0.1}, procedures=0.4, gamma=0.9
    ),
    "summit": Profile(
        age=64, mix={"frailty": -0.2}, style="telegraphic", images=0.8, pixels=(272, 256)
    ),
}


def hospital(index: int) -> tuple[str, Profile]:
    """Name and profile of hospital number `index`, from 0; beyond the tenth, profiles recur."""
    names = list(PROFILES)
    name = names[index] if index < len(names) else f"hospital-{index + 1:02d}"
    return name, PROFILES[names[index % len(names)]]

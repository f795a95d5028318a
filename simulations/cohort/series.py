"""What is measured and done: MIMIC-IV's items, and how each depends on the latent axes.

A reading is ``base + scale * z`` (or ``base * exp(scale * z)``), where z mixes the axes it reflects
(`VIEW`), a peculiarity of the stay that means nothing, an error of the reading, and a shift of the
hospital. No reading shows an axis well and each kind of reading shows others: that is what makes
sources complement each other. The numbers are in `items.csv` and `procedures.csv`, written by hand.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.cohort.latent import AXES, Floats

VIEW = {"chart": 0.8, "lab": 0.56}
"""How strongly readings of a source follow the axes; the two below are what hides it."""
_PECULIAR, _ERROR = 0.65, 0.4
_URGE = 1.7
"""Change of a procedure's logit by one standard deviation of what it answers."""


@dataclass(frozen=True)
class Item:
    """A row of ``d_items`` or ``d_labitems``, and how its readings come about.

    Attributes:
        source: ``chart`` or ``lab``.
        group: Items of one group are measured at the same moments.
        log: Whether `scale` is in natural log units.
        limits: Smallest and largest value that is ever written.
        reference: Limits of the laboratory's reference range.
        axes: Weights of the axes that it reflects; none for an item that tells nothing.
    """

    source: str
    itemid: int
    label: str
    unit: str
    category: str
    group: str
    base: float
    scale: float
    log: bool
    limits: tuple[float, float]
    digits: int
    reference: tuple[float, float] | None
    axes: dict[str, float]


@dataclass(frozen=True)
class Procedure:
    """A row of ``d_items``, and whom it is done to.

    Attributes:
        order: Name of the order's category.
        base: Logit of its happening to an average patient.
        minutes: Typical duration, or 0 for a single act.
        axes: Weights of the axes that call for it.
    """

    itemid: int
    label: str
    category: str
    order: str
    base: float
    minutes: float
    axes: dict[str, float]


def _rows(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _axes(text: str) -> dict[str, float]:
    pairs = (pair.split(":") for pair in text.split())
    return {axis: float(weight) for axis, weight in pairs}


ITEMS = tuple(
    Item(
        source=row["source"],
        itemid=int(row["itemid"]),
        label=row["label"],
        unit=row["unit"],
        category=row["category"],
        group=row["group"],
        base=float(row["base"]),
        scale=float(row["scale"]),
        log=row["log"] == "log",
        limits=(float(row["low"]), float(row["high"])),
        digits=int(row["digits"]),
        reference=(float(row["ref_low"]), float(row["ref_high"])) if row["ref_low"] else None,
        axes=_axes(row["axes"]),
    )
    for row in _rows("items.csv")
)
CHART = tuple(item for item in ITEMS if item.source == "chart")
"""Charted items; Fahrenheit rows, alarms and heart rhythm are added when they are written."""
LABS = tuple(item for item in ITEMS if item.source == "lab")
PROCEDURES = tuple(
    Procedure(
        itemid=int(row["itemid"]),
        label=row["label"],
        category=row["category"],
        order=row["order"],
        base=float(row["base"]),
        minutes=float(row["minutes"]),
        axes=_axes(row["axes"]),
    )
    for row in _rows("procedures.csv")
)
VENTILATION = next(p for p in PROCEDURES if p.label == "Invasive Ventilation")
PANELS = {
    "chemistry": 0.95,
    "minerals": 0.85,
    "blood": 0.92,
    "differential": 0.4,
    "vancomycin": 0.12,
    "inflammation": 0.2,
    "liver": 0.4,
    "clotting": 0.1,
    "heart": 0.3,
    "gas": 0.4,
    "coagulation": 0.5,
}
"""Share of blood draws in which a group of laboratory items is asked for."""


def loadings(axes: dict[str, float]) -> Floats:
    """The weights as a vector ``[axis]`` of length 1, or zeros."""
    vector = np.array([axes.get(axis, 0.0) for axis in AXES])
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))


def readings(
    item: Item,
    state: Floats,
    stay: NDArray[np.int64],
    peculiar: Floats,
    shift: float,
    rng: np.random.Generator,
) -> Floats:
    """Values of an item at N moments.

    Args:
        state: Axes at each moment ``[N, axis]``.
        stay: Number of the stay of each moment.
        peculiar: One standard normal number per stay.
        shift: Of the hospital, in units of `scale`.
    """
    z = VIEW[item.source] * (state @ loadings(item.axes)) + shift
    z = z + _PECULIAR * peculiar[stay] + _ERROR * rng.normal(size=len(stay))
    value = item.base * np.exp(item.scale * z) if item.log else item.base + item.scale * z
    return np.asarray(np.round(np.clip(value, *item.limits), item.digits))


def kin(item: Item) -> object:
    """Items of a group that reflect the same axes share a stay's peculiarity: three pressures of
    one cuff rise together."""
    return (item.group, *sorted(item.axes.items())) if item.axes else item.itemid


def happens(procedure: Procedure, state: Floats, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Whether the procedure is done to patients in these states ``[N, axis]``."""
    logit = procedure.base + _URGE * state @ loadings(procedure.axes)
    return np.asarray(rng.random(len(state)) < 1 / (1 + np.exp(-logit)))

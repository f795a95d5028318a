"""Chest X-ray phantoms: smooth shapes that the latent axes widen, brighten, shift and break.

Not a model of X-ray physics. A frontal view has a body, two lungs with ribs and vessels, spine,
heart, mediastinum, clavicles and diaphragm; each axis that is visible changes one of them. Shapes
are polynomials with soft edges, so that every machine draws the same pixels: exponentials and sines
of a million pixels may differ in the last digit.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]  # float32

SIGNS = ("heart", "fluid", "infection", "collapse", "leak", "trauma", "neoplasm", "mediastinum")
"""The axes that an X-ray shows, in the order of `Chest.signs`."""
_RIB_SPACING = 0.072
_DRAWN = 0.625
"""Shapes are drawn at this share of the image's size and enlarged: noise and JPEG take the rest."""


@dataclass(frozen=True)
class Scanner:
    """How a hospital's images look: see `profiles.Profile`."""

    pixels: tuple[int, int]
    gamma: float
    contrast: float
    noise: float


@dataclass(frozen=True)
class Chest:
    """What is drawn.

    Attributes:
        signs: How much of each of `SIGNS` is visible, about standard normal.
        build: Four standard normal numbers that stay with the patient: width of the chest, length
            of the lungs, body fat, and the side (its sign) on which focal signs lie.
        tube: Whether a breathing tube and a central line are seen.
    """

    signs: NDArray[np.float64]
    build: NDArray[np.float64]
    tube: bool


def jpeg(chest: Chest, view: str, scanner: Scanner, rng: np.random.Generator) -> bytes:
    """An 8-bit grey JPEG of the chest; `view` is ``PA``, ``AP`` or ``LATERAL``."""
    height, width = scanner.pixels
    y = np.linspace(0, 1, round(_DRAWN * height), dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, round(_DRAWN * width), dtype=np.float32)[None, :]
    # The patient never stands quite straight, nor twice at the same place.
    tilt, left, up = rng.normal(0, [0.015, 0.015, 0.008]).tolist()
    draw = _lateral if view == "LATERAL" else _frontal
    drawn = draw(x + left + tilt * (y - 0.5), y + up + 0.3 * tilt * x, chest, view, rng)
    large = Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC)
    picture = np.array(large)
    picture += scanner.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    picture = np.clip(0.5 + scanner.contrast * (picture - 0.5), 0, 1)
    # Gamma as a table of grey levels: a power of each pixel would depend on the machine.
    curve = np.round(255 * np.linspace(0, 1, 1024) ** scanner.gamma).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(curve[(picture * 1023).astype(np.int16)]).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _frontal(x: Pixels, y: Pixels, chest: Chest, view: str, rng: np.random.Generator) -> Pixels:
    # Python floats: a float64 of numpy would make every array float64.
    heart, fluid, infection, collapse, leak, trauma, neoplasm, mediastinum = chest.signs.tolist()
    wide, long, fat, sided = chest.build.tolist()
    side = 1.0 if sided > 0 else -1.0
    place = rng.uniform(-1, 1, size=8).tolist()

    half = 0.74 + 0.025 * wide  # half the width of the rib cage
    across = np.abs(x)
    inspired = 0.02 * long - (0.03 if view == "AP" else 0.0)
    ours = _step(side * x, 0.06)  # 1 on the side of the focal signs
    # Height of the diaphragm: a dome in each half; lost volume raises it on one side.
    dome = 0.79 + inspired + 0.5 * (across / half - 0.45) ** 2
    dome = dome - 0.018 * _step(-x, 0.02) - 0.045 * max(collapse + 0.8, 0) * ours

    shoulder = _ramp((y - 0.04) / 0.2)
    outline = 0.2 + (0.70 + 0.02 * fat) * shoulder - 0.06 * _ramp((y - 0.3) / 0.5)
    body = _step(outline - across, 0.03)
    cage = half * (1 - (1 - np.clip((y + 0.02) / 0.5, 0, 1)) ** 3)  # narrows towards the apex
    lung = (
        _step(cage - 0.03 - across, 0.03)
        * _step(across - 0.11 - 0.05 * _ramp((y - 0.35) / 0.4), 0.03)
        * _step(dome - y, 0.015)
        * _step(y - 0.085, 0.02)
    )
    tissue = 0.52 + 0.05 * fat + 0.10 * _ramp((y - 0.7) / 0.25)
    clear = 0.17 + 0.025 * fat

    # Air in the pleura: beyond the line there are no vessels, and less of everything.
    rim = 0.07 * (leak - 0.1)
    line = cage - 0.04 - rim * (1.2 - 0.5 * y)
    empty = _step(across - line, 0.012) * ours * lung * float(rim > 0.02)
    pleura = _bump((across - line) / 0.014) * ours * lung * float(rim > 0.02)

    vessels = _texture(x.shape[1], y.shape[0], 44, rng)
    central = np.clip(1.25 - across / 0.62, 0, 1) * np.clip(1.3 - 2.2 * np.abs(y - 0.5), 0, 1)
    density = clear + (0.10 + 0.03 * max(fluid, -1)) * vessels * (0.35 + central)
    density = density + 0.09 * central

    # Fluid: haze around the hila and towards the bases, blunt angles.
    haze = _amount(0.14 + 0.12 * fluid, 0, 0.5)
    density = density + haze * (0.45 + 0.75 * central + 0.35 * _ramp((y - 0.45) / 0.4))
    blunt = _ramp((y - 0.72 + 0.035 * max(fluid, 0)) / 0.1) * _ramp((across - 0.35) / 0.3)
    density = density + _amount(0.18 + 0.12 * fluid, 0, 0.5) * blunt

    # Infection: a patch in one lung, uneven like the texture.
    patchy = 0.7 + 0.6 * _texture(x.shape[1], y.shape[0], 16, rng)
    where = (0.42 + 0.08 * place[0], 0.53 + 0.13 * place[1])
    patch = _blob(side * x - where[0], y - where[1], 0.27 + 0.03 * place[2], 0.19)
    density = density + _amount(0.24 + 0.20 * infection, 0, 0.8) * patch * patchy

    # Collapse: bands above the diaphragm of both sides.
    above = dome - y - 0.035 - 0.02 * place[3] + 0.05 * x * side
    bands = _bump(above / 0.06) * (0.6 + 0.8 * vessels) + 0.5 * _bump((above - 0.1) / 0.03)
    density = density + _amount(0.2 + 0.16 * collapse, 0, 0.6) * bands

    # Neoplasm: round nodules, more and larger ones.
    size = 0.065 + 0.02 * _amount(neoplasm, -2, 3)
    for number in range(1 + int(neoplasm > 0) + int(neoplasm > 1)):
        at = (-side if number == 0 else side) * (0.36 + 0.13 * place[4 - number])
        spot = _blob(x - at, y - 0.35 - 0.12 * number - 0.07 * place[5 + number], size, 0.55 * size)
        density = density + _amount(0.26 + 0.2 * neoplasm, 0, 0.8) * np.sqrt(spot)

    density = 0.62 * (1 - np.square(np.clip(1 - density / 1.24, 0, 1)))  # saturates at 0.62
    density = density * (1 - 0.5 * empty) + 0.22 * pleura
    picture = body * (tissue + lung * (density - tissue))

    picture += _ribs(x, y, half, side, trauma, place) * (0.025 + 0.06 * lung) * body
    clavicle = _bump((y - 0.165 + 0.12 * across - 0.02 * place[6] * np.sign(x)) / 0.022)
    picture += 0.13 * clavicle * _step(across - 0.1, 0.04) * _step(0.72 - across, 0.05)

    # Heart and great vessels in front of it all; AP films enlarge them.
    enlarged = (1.08 if view == "AP" else 1.0) * max(1 + 0.15 * heart, 0.5)
    lean = x - 0.13 * enlarged - 0.55 * (y - 0.64)  # the apex points down and to the left
    shape = _blob(lean, y - 0.66, 0.37 * enlarged, 0.24, power=1)
    silhouette = _step(shape - 0.15, 0.12) * _step(dome + 0.05 - y, 0.03)
    band = 0.125 + 0.04 * mediastinum
    great = _step(band * (1.25 - 0.5 * y) - np.abs(x - 0.015), 0.03) * _step(0.75 - y, 0.1)
    knob = _blob(x - band - 0.03, y - 0.33, 0.07 + 0.022 * max(mediastinum, -1.5), 0.06)
    solid = np.maximum(np.maximum(silhouette, great), _step(knob - 0.3, 0.2)) * body
    picture += 0.85 * solid * (0.64 - np.minimum(picture, 0.64))
    disc = (y * 17) % 1
    picture += _bump(x / 0.085) * (0.06 + 0.05 * _bump((disc - 0.5) / 0.5)) * body
    picture -= 0.16 * _bump((x - 0.01) / 0.04) * _step(0.4 - y, 0.05) * body  # trachea
    if chest.tube:
        tip = 0.34 + 0.02 * place[7]
        picture += 0.24 * _bump((x - 0.008) / 0.016) * _step(tip - y, 0.008)
        course = 0.1 + 0.5 * (0.44 - y)
        picture += 0.2 * _bump((-x - course) / 0.014) * _step(0.5 - y, 0.02) * _step(y - 0.12, 0.02)
    return np.asarray(picture, dtype=np.float32)


def _ribs(
    x: Pixels, y: Pixels, half: float, side: float, trauma: float, place: list[float]
) -> Pixels:
    """Brightness of ribs in [0, 1.3]; trauma breaks some: a step, and a plate where it was set."""
    across = np.abs(x) / half
    course = y + 0.02 - 0.13 * across + 0.26 * across**2
    index = np.floor(course / _RIB_SPACING)
    broken = np.zeros(np.broadcast(x, y).shape, dtype=np.float32)
    for number in range(int(_amount(1.6 + 1.3 * trauma, 0, 4))):
        broken += index == 4 + number
    ours = broken * (side * x > 0)
    at = 0.62 + 0.08 * place[0]
    outer = ours * (across > at)
    shift = _RIB_SPACING * _amount(0.28 + 0.12 * trauma, 0.1, 0.6)
    phase = ((course + outer * shift) / _RIB_SPACING) % 1
    rib = _bump((phase - 0.5) / 0.3)
    plate = ours * _bump((across - at) / 0.07) * _bump((phase - 0.5) / 0.38)
    return np.asarray(rib + _amount(1.6 + 1.4 * trauma, 0, 5) * plate)


def _lateral(x: Pixels, y: Pixels, chest: Chest, view: str, rng: np.random.Generator) -> Pixels:
    """From the side: breastbone on the left, spine on the right; few of the signs show."""
    heart, fluid, infection, collapse, *_ = chest.signs.tolist()
    place = rng.uniform(-1, 1, size=2).tolist()
    wide, long, *_ = chest.build.tolist()
    depth = 0.6 + 0.03 * wide
    body = _step(depth + 0.12 * _ramp(y / 0.6) - np.abs(x), 0.05) * _ramp((y + 0.1) / 0.2)
    dome = 0.80 + 0.02 * long + 0.12 * x - 0.03 * max(collapse, 0)
    lung = _blob(x, y - 0.48, depth * 1.02, 0.46, power=1)
    lung = _step(lung - 0.1, 0.15) * _step(dome - y, 0.02)
    vessels = _texture(x.shape[1], y.shape[0], 40, rng)
    density = 0.2 + 0.1 * vessels + _amount(0.1 + 0.08 * fluid, 0, 0.4)
    patch = _blob(x - 0.2 - 0.1 * place[0], y - 0.55 - 0.1 * place[1], 0.22, 0.15)
    density = density + _amount(0.14 + 0.1 * infection, 0, 0.5) * patch
    picture = body * (0.55 + lung * (density - 0.55))
    shadow = _step(_blob(x + 0.2, y - 0.68, 0.33 * (1 + 0.12 * heart), 0.2, power=1) - 0.15, 0.1)
    picture += 0.25 * shadow * lung
    spine = _bump((x - 0.42 - 0.08 * (y - 0.5)) / 0.11)
    picture += spine * body * (0.13 + 0.1 * _bump(((y * 15) % 1 - 0.5) / 0.5))
    slope = (y - 0.25 * x + 0.3 * x * x) / 0.08
    picture += 0.06 * _bump((slope % 1 - 0.5) / 0.3) * lung
    return np.asarray(picture, dtype=np.float32)


def _amount(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _step(distance: Pixels, soft: float) -> Pixels:
    """0 outside, 1 inside of a border, smooth over `soft` on either side of it."""
    return _ramp((distance / soft + 1) / 2)


def _ramp(t: Pixels) -> Pixels:
    """Smooth rise from 0 at 0 to 1 at 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(t: Pixels) -> Pixels:
    """1 at 0, falling smoothly to 0 at -1 and 1."""
    return np.square(np.clip(1 - t * t, 0, None))


def _blob(x: Pixels, y: Pixels, width: float, height: float, power: int = 2) -> Pixels:
    """1 in the centre, 0 on an ellipse of these half-axes."""
    inside = np.clip(1 - np.square(x / width) - np.square(y / height), 0, None)
    return inside if power == 1 else np.square(inside)


def _texture(width: int, height: int, cells: int, rng: np.random.Generator) -> Pixels:
    """Smooth noise in [0, 1] with about `cells` grains across."""
    coarse = rng.integers(0, 256, size=(cells, cells), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / np.float32(255)

"""The page's pictures: facts in, one inline SVG out.

Text stays text. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and differ
in lightness, so that they survive a grey printer.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.audit.prices import Row
from common.audit.report.history import Life, Point
from common.audit.verify import NAMES
from common.privacy.events import Population

BLUE, SKY, ORANGE, VERMILION, GREEN = "#0072b2", "#9ecbe8", "#e69f00", "#d55e00", "#009e73"
INK, MUTED, LINE = "#1b2330", "#5b6675", "#dfe3e8"
_WIDE = 9.8
_NAME = 34
_STROKES = 200  # per study: more run together

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_styled = matplotlib.rc_context(_STYLE)


@_styled
def spending(curve: Mapping[Population, Sequence[Point]]) -> Markup:
    """Epsilon over time against the cap, one panel per population."""
    figure = Figure(figsize=(_WIDE, 4.6), layout="constrained")
    panels = figure.subplots(len(curve), 1, sharex=True)
    for axes, (population, points) in zip(panels, curve.items(), strict=True):
        axes.grid(visible=True, axis="y")
        axes.set_title(f"{NAMES[population]} patients")
        axes.set_ylabel("ε")
        at = [date2num(point.at) for point in points]
        spent = [_finite(point.spent) for point in points]
        committed = [_finite(point.committed) for point in points]
        cap = [_finite(point.cap) for point in points]
        if any(not math.isnan(c) for c in committed):
            label = "spent and set aside, by the policy's rule"
            axes.fill_between(at, committed, step="post", color=SKY, alpha=0.55, lw=0, label=label)
        axes.step(at, spent, where="post", color=BLUE, lw=1.8, label="spent, by PLD")
        axes.plot(at[-1:], spent[-1:], "o", color=BLUE, ms=4)
        if any(not math.isnan(c) for c in cap):
            axes.step(at, cap, where="post", color=VERMILION, lw=1.3, ls=(0, (5, 2)), label="cap")
        endless = next((p for p in points if math.isinf(p.spent)), None)
        if endless:
            axes.axvspan(date2num(endless.at), at[-1], color=VERMILION, alpha=0.15, lw=0)
            since, where = f"ε = ∞ since {endless.at:%Y-%m-%d}", axes.transAxes
            axes.text(0.995, 0.9, since, color=VERMILION, ha="right", transform=where)
        axes.set_ylim(0, 1.12 * _largest([*spent, *committed, *cap]))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    figure.align_ylabels(panels)
    _dates(panels[-1])
    _legend(panels[0], 3)
    return _svg(figure, "Epsilon over time, against the lifetime caps")


@_styled
def studies(rows: Sequence[Row]) -> Markup:
    """Epsilon of each study: spent, and set aside on top; one panel per population."""
    by = {p: [row for row in rows if row.population == p] for p in NAMES}
    most = max(len(some) for some in by.values())
    figure = Figure(figsize=(_WIDE, 0.8 + 0.36 * max(most, 1)), layout="constrained")
    panels = figure.subplots(1, 2)
    largest = _largest([_finite(row.reserved.pld) for row in rows])
    for axes, (population, some) in zip(panels, by.items(), strict=True):
        axes.grid(visible=True, axis="x")
        axes.set_title(f"{NAMES[population]} patients")
        for y, row in enumerate(some):
            spent, aside = row.spent.pld, row.reserved.pld
            if math.isinf(aside):
                axes.text(0, y, " ∞", va="center", color=VERMILION, fontweight="bold")
                continue
            axes.barh(y, spent, color=BLUE, height=0.6)
            axes.barh(y, aside - spent, left=spent, color=SKY, height=0.6)
            axes.text(aside + 0.015 * largest, y, f"{spent:.2f} of {aside:.2f}", va="center")
        axes.set_yticks(range(len(some)), [_short(row.name) for row in some])
        axes.set_ylim(max(most, 1) - 0.5, -0.5)
        axes.set_xlim(0, 1.45 * largest)
        axes.set_xlabel("ε, each study at its own δ")
        axes.tick_params(axis="y", labelcolor=INK)
        axes.spines["left"].set_visible(False)
    return _svg(figure, "Epsilon per study: spent, and set aside")


@_styled
def timeline(lives: Sequence[Life]) -> Markup:
    """When each study was approved, released and ended; one row per study."""
    figure = Figure(figsize=(_WIDE, 0.75 + 0.42 * len(lives)), layout="constrained")
    axes = figure.subplots()
    last = max(date for life in lives for date in (*life.approvals, *life.releases, *_ended(life)))
    for y, life in enumerate(lives):
        start, end = date2num(life.approvals[0]), date2num(life.end or last)
        axes.plot([start, end], [y, y], color=SKY, lw=9, solid_capstyle="butt", zorder=1)
        strokes = [date2num(r) for r in life.releases[:: 1 + len(life.releases) // _STROKES]]
        axes.plot(strokes, [y] * len(strokes), "|", ms=9, mew=1, color=BLUE, zorder=2)
        marks = [date2num(a) for a in life.approvals]
        axes.plot(marks, [y] * len(marks), "^", ms=7, color=GREEN, zorder=3, clip_on=False)
        if life.ending == "open":
            axes.plot(end, y, ">", ms=6, color=SKY, zorder=1, clip_on=False)
        else:
            mark, colour = ("X", VERMILION) if life.ending != "expired" else ("D", ORANGE)
            axes.plot(end, y, mark, ms=7, color=colour, zorder=3, clip_on=False)
    for mark, colour, name in (
        ("^", GREEN, "approved"),
        ("|", BLUE, "release"),
        ("X", VERMILION, "revoked or closed"),
        ("D", ORANGE, "expired"),
    ):
        axes.plot([], [], mark, ls="", color=colour, label=name)
    axes.set_yticks(range(len(lives)), [_short(life.name) for life in lives])
    axes.set_ylim(len(lives) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.02)
    _dates(axes)
    _legend(axes, 4)
    return _svg(figure, "Approvals, releases and ends of the studies")


def _ended(life: Life) -> tuple[Any, ...]:
    return (life.end,) if life.end else ()


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _largest(values: Sequence[float]) -> float:
    return max((v for v in values if not math.isnan(v)), default=1.0) or 1.0


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _dates(axes: Axes) -> None:
    locator = AutoDateLocator(minticks=3, maxticks=9)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element that scales with the page, without header and metadata."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        # A name in a script that the measuring font lacks: the page's font may have it.
        warnings.filterwarnings("ignore", message="Glyph")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))

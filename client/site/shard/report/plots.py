"""The report's pictures: facts in, one inline SVG out.

Text stays text: it takes the page's font and can be searched. Colours are Okabe and Ito's, which
colour-blind readers can tell apart, and differ in lightness, so that they survive a grey printer.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from client.site.shard.report.facts import OUTSIDE, Histogram, Range, Source, Task
from client.site.shard.report.leakage import SEPARATES, SeriesHint
from client.site.shard.report.pictures import Pictures
from client.site.shard.report.words import count

BLUE, SKY, GREY, ORANGE, VERMILION = "#0072b2", "#9ecbe8", "#c9ced6", "#e69f00", "#d55e00"
INK, MUTED, LINE = "#1b2330", "#5b6675", "#dfe3e8"
WIDTH, WIDE = 4.6, 9.8

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_styled = matplotlib.rc_context(_STYLE)
SOURCE_COLOURS = {
    "chart": BLUE,
    "lab": VERMILION,
    "procedure": "#009e73",
    "image": ORANGE,
    "note": "#7a4f8f",
    "embedding": "#56606e",
}


@_styled
def prevalence(tasks: Sequence[Task]) -> Markup:
    """Records per label, one bar per task."""
    figure, axes = _figure(WIDE, 0.55 + 0.34 * len(tasks))
    axes.grid(visible=False)
    names = [_short(task.name) for task in tasks]
    left = np.zeros(len(tasks))
    for label, colour in (("true", BLUE), ("false", SKY), ("unknown", GREY)):
        n = np.array([getattr(task, label) for task in tasks], dtype=float)
        share = n / np.array([task.known + task.unknown for task in tasks])
        axes.barh(names, share, left=left, color=colour, height=0.62, label=label)
        for y, (x, width, k) in enumerate(zip(left, share, n, strict=True)):
            if width > 0.06:
                dark = colour == BLUE
                axes.text(
                    x + width / 2,
                    y,
                    count(int(k)),
                    ha="center",
                    va="center",
                    color="white" if dark else INK,
                )
        left = left + share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    _legend(axes, 3)
    return _svg(figure, "Share of records with a true, false and unknown label, per task")


@_styled
def ages(histograms: Mapping[str, Histogram]) -> Markup:
    """Patients per five years of age, sexes on top of each other."""
    colours = {"female": BLUE, "male": SKY, "unknown": GREY}
    figure, axes = _figure(WIDTH, 1.9)
    bottom: np.ndarray | float = 0.0
    for sex, histogram in histograms.items():
        bottom = bottom + _bars(axes, histogram, colours[sex], sex, bottom)
    axes.set_xlim(*_occupied(histograms.values()))
    axes.set_xlabel("age in years")
    axes.set_ylabel("patients")
    _legend(axes, 3)
    return _svg(figure, "Patients by age and sex")


@_styled
def tally(counts: Mapping[int, int], x: str, y: str, title: str, most: int = 12) -> Markup:
    """How many have 1, 2, 3, ...; the last bar holds all from `most` on."""
    figure, axes = _figure(WIDTH, 1.9)
    shown = {n: counts.get(n, 0) for n in range(1, min(most, max(counts)) + 1)}
    beyond = sum(k for n, k in counts.items() if n > most)
    labels = [str(n) for n in shown]
    if beyond:
        shown[most] += beyond
        labels[-1] = f"{most}+"
    axes.bar(labels, list(shown.values()), color=BLUE, width=0.75)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _whole(axes)
    return _svg(figure, title)


@_styled
def bars(histogram: Histogram, x: str, y: str, title: str, *, log: bool = False) -> Markup:
    """A histogram; with `log` its edges are decimal logarithms."""
    figure, axes = _figure(WIDTH, 1.9)
    if log:
        edges = 10.0 ** np.array(histogram.edges)
        histogram = Histogram(tuple(edges), histogram.counts)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    _bars(axes, histogram, BLUE)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return _svg(figure, title)


@_styled
def timeline(sources: Sequence[Source]) -> Markup:
    """When inputs became available, around the last cutoff of their stay; a row per source."""
    figure = Figure(figsize=(WIDE, 0.6 + 0.52 * len(sources)), layout="constrained")
    rows = figure.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    for axes, source in zip(rows, sources, strict=True):
        axes.grid(visible=False)
        edges, counts = source.hours.edges, np.array(source.hours.counts, dtype=float)
        _bars(axes, source.hours, SOURCE_COLOURS[source.name])
        axes.axvspan(0, edges[-1], color=GREY, alpha=0.35, lw=0)
        axes.axvline(0, color=INK, lw=1)
        axes.set_yticks([])
        axes.set_ylim(0, 1.12 * max(counts.max(), 1))
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(source.name, rotation=0, ha="right", va="center", color=INK)
        axes.set_xlim(edges[0], edges[-1])
        axes.tick_params(axis="x", length=0 if axes is not rows[-1] else 3)
    rows[-1].set_xlabel("hours from the stay's last cutoff; grey: after it, never read")
    return _svg(figure, "When inputs became available, relative to the last cutoff")


@_styled
def grey_levels(pictures: Pictures) -> Markup:
    """Mean share of pixels per grey level."""
    figure, axes = _figure(WIDTH, 1.9)
    levels = np.array(pictures.grey)
    centres = (np.arange(len(levels)) + 0.5) / len(levels)
    axes.fill_between(centres, levels, color=SKY, lw=0)
    axes.plot(centres, levels, color=BLUE, lw=1.2)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xticks([0, 0.5, 1], ["black", "mid grey", "white"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylabel("pixels")
    return _svg(figure, "Grey levels, mean over files")


@_styled
def separation(hints: Sequence[SeriesHint], tasks: Sequence[str]) -> Markup:
    """AUROC of every single input, one row per task, with the line from which it is flagged."""
    figure, axes = _figure(WIDE, 0.65 + 0.34 * len(tasks))
    axes.grid(visible=False)
    kinds = (("last value", BLUE, "o"), ("presence", ORANGE, "|"), ("record", INK, "D"))
    for kind, colour, marker in kinds:
        of_kind = [hint for hint in hints if hint.kind == kind]
        axes.plot(
            [hint.auroc for hint in of_kind],
            [tasks.index(hint.task) for hint in of_kind],
            ls="",
            marker=marker,
            ms=7 if marker == "|" else 4.5,
            mew=1.4 if marker == "|" else 0,
            color=colour,
            alpha=0.75,
            label={"record": "age, cutoff, number of inputs"}.get(kind, kind),
        )
    axes.axvline(SEPARATES, color=VERMILION, lw=1.2, ls=(0, (4, 2)))
    axes.set_yticks(range(len(tasks)), [_short(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(0.495, 1.005)
    axes.set_xlabel(f"AUROC of one input alone; dashed: {SEPARATES}")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    _legend(axes, 3)
    return _svg(figure, "How well single inputs separate each label")


def strip(row: Range) -> Markup:
    """Percentiles of a series over its plausible limits, on one axis; small, for a table."""
    spec, values = row.spec, row.values
    corners = (spec.low, spec.high, values.low, values.high)
    floor = max(min(spec.low, spec.centre) / 1000, 1e-9)

    def axis(v: float) -> float:
        return math.log(max(v, floor)) if spec.log else v

    middle = (values.quarter, values.median, values.three_quarters)
    left, right = axis(min(corners)), axis(max(corners))
    low, high, first, q1, median, q3, last = (
        200 * (axis(v) - left) / (right - left)
        for v in (spec.low, spec.high, values.low, *middle, values.high)
    )
    colour = VERMILION if row.hint or row.outside >= OUTSIDE else BLUE
    return Markup(
        '<svg class="strip" viewBox="0 0 200 16" preserveAspectRatio="none" role="img"'
        ' aria-label="percentiles over plausible limits">'
        f'<rect x="{low:.1f}" y="0" width="{high - low:.1f}" height="16" fill="#dcebe0"/>'
        f'<rect x="{first:.1f}" y="7.3" width="{max(last - first, 1):.1f}" height="1.4"'
        f' fill="{MUTED}"/>'
        f'<rect x="{q1:.1f}" y="4" width="{max(q3 - q1, 1.5):.1f}" height="8" fill="{colour}"/>'
        f'<rect x="{median - 1:.1f}" y="2" width="2" height="12" fill="{INK}"/></svg>'
    )


def _short(name: str) -> str:
    words = name.replace("_", " ")
    return words if len(words) <= 32 else f"{words[:31]}…"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _bars(
    axes: Axes,
    histogram: Histogram,
    colour: str,
    label: str | None = None,
    bottom: np.ndarray | float = 0.0,
) -> np.ndarray:
    edges, counts = np.array(histogram.edges), np.array(histogram.counts)
    axes.stairs(counts + bottom, edges, baseline=bottom, fill=True, color=colour, label=label)
    # A second call may stand on the first: setting a limit has ended matplotlib's own scaling.
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * float(np.max(counts + bottom, initial=0))))
    _whole(axes)
    return counts


def _occupied(histograms: Iterable[Histogram]) -> tuple[float, float]:
    """Outer edges of the bins that hold anything."""
    cuts = [
        (histogram.edges[i], histogram.edges[i + 1])
        for histogram in histograms
        for i, n in enumerate(histogram.counts)
        if n
    ]
    return min(low for low, _ in cuts), max(high for _, high in cuts)


def _whole(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=columns,
        handlelength=1.0,
        handleheight=0.8,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element that scales with the page, without header and metadata."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # A name in a script that the measuring font lacks: the page's font may have it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    size = re.search(r'viewBox="0 0 ([\d.]+) ', text)
    assert size is not None
    head = f'<svg role="img" aria-label="{escape(title)}" style="max-width:{float(size[1]):.0f}pt"'
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt"', r"<svg \1", text, count=1)
    return Markup(text.replace("<svg", head, 1))

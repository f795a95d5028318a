"""Plots of a comparison, as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.errors import FedwardError
from simulations.comparison.suite import Suite
from simulations.comparison.tables import Result, by, privacy_name

_BARS = "bars: standard deviation over seeds; of a single seed, 95 % bootstrap interval"

Picture = Callable[[Path], None]
"""Draws into a file."""


def pictures(suite: Suite, results: Sequence[Result]) -> dict[str, Picture]:
    """Macro AUROC by privacy, ablations, sweeps, weights over training; what there is of them, by
    name and not drawn yet."""
    good = [r for r in results if "error" not in r and r["macro"]["auroc"] is not None]
    found: dict[str, Picture] = {}
    if plain := [r for r in good if not r["group"]]:
        found["main"] = partial(_bars, plain, "row", suite.name)
    for group in ("ablation", "single"):
        if own := [r for r in good if r["group"] == group]:
            whole = [r for r in good if not r["group"] and r["arm"] in {o["arm"] for o in own}]
            found[group] = partial(_bars, whole + own, "row", group)
    for name, sweep in suite.sweeps.items():
        if own := [r for r in good if r["group"] == name]:
            found[f"sweep-{name}"] = partial(_lines, own, sweep.key)
    if traced := [r for r in good if r.get("weights") and not r["group"]]:
        found["weights"] = partial(_weights, traced)
    return found


def plot_map(z_2Nd: np.ndarray, labels_N: np.ndarray, task: str, path: Path) -> None:
    """Both pathways' representations in the plane, by t-SNE: the paper's Figure 2.

    Raises:
        FedwardError: There are fewer than two records.
    """
    if len(labels_N) < 2:
        raise FedwardError(f"{len(labels_N)} held-out records have something for both pathways")
    from sklearn.manifold import TSNE

    both = z_2Nd.reshape(-1, z_2Nd.shape[-1])
    both = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, max(2.0, len(both) / 4))
    at = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(both)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    half = len(labels_N)
    for name, part in (("large pathway", at[:half]), ("small model", at[half:])):
        axes[0].scatter(part[:, 0], part[:, 1], s=8, label=name, alpha=0.7)
    for value, name in ((1, "true"), (0, "false")):
        some = np.tile(labels_N == value, 2)
        axes[1].scatter(at[some, 0], at[some, 1], s=8, label=f"{task}: {name}", alpha=0.7)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(fontsize=8)
    _save(figure, path)


def _bars(results: Sequence[Result], key: str, title: str, path: Path) -> None:
    """A dot per row, arrangement and privacy, with a bar (`_bar`)."""
    rows = list(by(results, key, "arrangement"))
    privacies = [p for (p,) in by(results, "privacy")]
    several = len({arrangement for _, arrangement in rows}) > 1
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    for offset, privacy in enumerate(privacies):
        places: list[float] = []
        means: list[float] = []
        spreads: list[tuple[float, float]] = []
        for place, some in enumerate(by(results, key, "arrangement").values()):
            values = _aurocs(r for r in some if r["privacy"] == privacy)
            if values:
                places.append(place + 0.18 * (offset - (len(privacies) - 1) / 2))
                means.append(float(np.mean(values)))
                spreads.append(_bar([r for r in some if r["privacy"] == privacy]))
        bars = np.transpose(spreads) if spreads else None
        axis.errorbar(
            means, places, xerr=bars, fmt="o", ms=5, capsize=2, label=privacy_name(privacy)
        )
    names = [f"{name}, {arrangement}" if several else str(name) for name, arrangement in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"macro AUROC of held-out patients\n({_BARS})", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title, fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="best")
    _save(figure, path)


def _lines(results: Sequence[Result], key: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (arm, privacy, arrangement), some in by(results, "arm", "privacy", "arrangement").items():
        points = [(value, cells) for (value,), cells in by(some, "value").items()]
        values: list[Any] = [value for value, _ in points]
        number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        at = values if number else list(range(len(values)))
        means = [float(np.mean(_aurocs(cells))) for _, cells in points]
        bars = np.transpose([_bar(cells) for _, cells in points])
        label = f"{arm}, {privacy_name(privacy)}, {arrangement}"
        axis.errorbar(at, means, yerr=bars, marker="o", ms=4, capsize=2, label=label)
        if not number:
            axis.set_xticks(at, [str(v) for v in values])
    axis.set_xlabel(key)
    axis.set_ylabel("macro AUROC")
    axis.set_title(_BARS, fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _weights(results: Sequence[Result], path: Path) -> None:
    """AdaCoMed's w_large over the rounds, first seed, a panel per row: mean, and the middle 90 % of
    records (the paper's Figure 6)."""
    panels = by(results, "row")
    columns = math.ceil(math.sqrt(len(panels)))
    lines = -(-len(panels) // columns)
    size = (3.2 * columns + 0.6, 2.6 * lines + 0.3)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ((row,), own) in zip(axes.flat, panels.items(), strict=False):
        runs = by(own, "privacy", "arrangement")
        for (privacy, arrangement), some in runs.items():
            points = some[0]["weights"]
            rounds = [p["round"] for p in points]
            label = f"{privacy_name(privacy)}, {arrangement}"
            (line,) = axis.plot(rounds, [p["mean"] for p in points], label=label)
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axis.fill_between(rounds, low, high, alpha=0.15, color=line.get_color())
        axis.set_title(row, fontsize=9)
        axis.tick_params(labelbottom=True)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        if len(runs) > 1:
            axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("round", fontsize=9)
    figure.supylabel("weight of the large pathway", fontsize=9)
    _save(figure, path)


def _bar(results: Sequence[Result]) -> tuple[float, float]:
    """Length of the bar below the mean, and above."""
    values = _aurocs(results)
    if len(values) > 1:
        sd = float(np.std(values, ddof=1))
        return sd, sd
    low, high = results[0]["interval"] or (values[0], values[0])
    return max(0.0, values[0] - low), max(0.0, high - values[0])


def _aurocs(results: Iterable[Result]) -> list[float]:
    return [float(r["macro"]["auroc"]) for r in results]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)

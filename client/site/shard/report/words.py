"""Numbers as the page writes them."""

from __future__ import annotations

import math

from client.site.shard.report.leakage import SMALL_CELL, WordHint

NOTHING = "–"


def count(n: int | None) -> str:
    return NOTHING if n is None else f"{n:,}"


def of(n: int, noun: str) -> str:
    """`1 patient`, `2 patients`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float | None) -> str:
    """Never 0 % for some, nor 100 % for not all."""
    if share is None:
        return NOTHING
    if 0 < share < 0.001:
        return "<0.1\N{NO-BREAK SPACE}%"
    if 0.999 < share < 1:
        return ">99.9\N{NO-BREAK SPACE}%"
    digits = 0 if share in (0, 1) else 1
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def value(number: float | None) -> str:
    """Three significant digits, thousands separated, no exponent for usual sizes."""
    if number is None or not math.isfinite(number):
        return NOTHING
    if number == 0 or 1e-4 <= abs(number) < 1000:
        return f"{number:.3g}".replace("-", "−")
    if 1000 <= abs(number) < 1e7:
        return f"{number:,.0f}".replace("-", "−")
    return f"{number:.1e}".replace("-", "−")


def cell(n: int, total: int) -> str:
    """A count of a cross-table of words and labels: neither it nor the rest is told below 5."""
    if n < SMALL_CELL:
        return f"<{SMALL_CELL} of {total:,}"
    if total - n < SMALL_CELL:
        return f"≥{total - SMALL_CELL + 1:,} of {total:,}"
    return f"{n:,} of {total:,}"


def word_auroc(hint: WordHint) -> str:
    """Two digits; one where two would give a small cell away."""
    cells = (
        hint.with_true,
        hint.with_false,
        hint.true - hint.with_true,
        hint.false - hint.with_false,
    )
    return f"{hint.auroc:.{1 if min(cells) < SMALL_CELL else 2}f}"

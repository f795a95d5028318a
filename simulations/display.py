"""What is happening, hospital by hospital, while a run works."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

_QUIET_SECONDS = 10.0
_OTHER_LINES = 10  # of a terminal, beside the hospitals
_AT_WORK = ("encoding", "training", "evaluating")


class Display:
    """A live table on a terminal; elsewhere a line when something changes, at most every 10 s.

    Args:
        rounds: Rounds of the study.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self.console, self.rounds = console, rounds
        self._live: Live | None = None
        self._heading = ""
        self._last: list[str] = []
        self._told = 0.0
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        self._table: Table | None = None

    def __enter__(self) -> Display:
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(
                console=self.console,
                refresh_per_second=8,
                transient=True,
                get_renderable=self._picture,
            )
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(None, None, None)
            self._live = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False)

    def heading(self, text: str) -> None:
        """What the run as a whole is doing."""
        if text != self._heading:
            self._heading = text
            if not self._live:
                self.say(text)

    def line(self, line: Mapping[str, Any]) -> None:
        """A finished round, as in rounds.jsonl."""
        missing = {**line.get("refused", {}), **line.get("lost", {})}
        without = "".join(f"; without {site} ({code})" for site, code in missing.items())
        if line["kind"] == "train":
            self.say(
                f"round {line['completed']}/{self.rounds}: {len(line['sites'])} sites, "
                f"{line['seconds']:.1f} s, ε {_worst(line['epsilon'])}{without}"
            )
        else:
            macro = (line.get("metrics") or {}).get("macro") or {}
            auroc = macro.get("auroc")
            shown = f"AUROC {auroc:.3f}" if auroc is not None else "too noisy to say"
            self.say(f"evaluation after round {line['round']}: {shown}{without}")

    def sites(self, status: Sequence[Mapping[str, Any]]) -> None:
        """The daemon's view of every hospital."""
        if self._live:
            self._table = self._hospitals(status)
            return
        doing = [
            f"{s.get('site')} {s.get('phase')} {_progress(s)}".rstrip()
            for s in status
            if s.get("phase") in _AT_WORK
        ]
        if doing and doing != self._last and time.monotonic() - self._told >= _QUIET_SECONDS:
            self._last, self._told = doing, time.monotonic()
            self.say("  " + ", ".join(doing))

    def _picture(self) -> Group:
        """Drawn several times a second, also while nothing is heard, so that the clock runs."""
        self._spinner.update(text=f"{self._heading}, {time.monotonic() - self._began:.0f} s so far")
        return Group(self._spinner, *([self._table] if self._table else []))

    def _hospitals(self, status: Sequence[Mapping[str, Any]]) -> Table:
        """One row per hospital; where they do not fit, those at work and how many others."""
        table = Table(box=SIMPLE)
        for name in ("hospital", "doing", "progress", "round", "ε train", "ε validation"):
            table.add_column(name, justify="right" if "ε" in name else "left", no_wrap=True)
        room = max(1, self.console.height - _OTHER_LINES)
        shown = list(status)
        if len(shown) > room:
            # Sorting is stable: hospitals keep their order, and idle ones do not jump.
            shown = sorted(shown, key=lambda site: site.get("phase") not in _AT_WORK)[:room]
        for site in shown:
            spent = site.get("epsilon") or {}
            table.add_row(
                str(site.get("site", "")),
                str(site.get("phase", "")),
                _progress(site),
                str(site.get("round") or ""),
                *(_epsilon(spent[p]) if p in spent else "" for p in ("train", "validation")),
            )
        if len(status) > len(shown):
            table.add_row(f"and {len(status) - len(shown)} more", style="dim")
        return table


def _progress(site: Mapping[str, Any]) -> str:
    if site.get("phase") == "encoding" and site.get("total"):
        return f"{100 * site.get('done', 0) // site['total']} %"
    if site.get("phase") == "training" and site.get("steps"):
        return f"step {site.get('step', 0)}/{site['steps']}"
    return ""


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _worst(epsilon: Mapping[str, Mapping[str, Any]]) -> str:
    values = [value for site in epsilon.values() for value in site.values()]
    if not values or None in values:
        return "∞" if values else "–"
    return f"{max(values):.2f}"

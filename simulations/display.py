"""What is happening, hospital by hospital, while a run works."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_QUIET_SECONDS = 10.0


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

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
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
            table = Table(title=self._heading, title_justify="left")
            for name in ("hospital", "doing", "progress", "round", "ε so far"):
                table.add_column(name)
            for site in status:
                table.add_row(
                    str(site.get("site", "")), str(site.get("phase", "")), _progress(site),
                    str(site.get("round") or ""), _epsilon(site.get("epsilon")),
                )
            self._live.update(table)
            return
        doing = [
            f"{s.get('site')} {s.get('phase')} {_progress(s)}".rstrip()
            for s in status
            if s.get("phase") not in (None, "idle", "ready")
        ]
        if doing and doing != self._last and time.monotonic() - self._told >= _QUIET_SECONDS:
            self._last, self._told = doing, time.monotonic()
            self.say("  " + ", ".join(doing))


def _progress(site: Mapping[str, Any]) -> str:
    if site.get("phase") == "encoding" and site.get("total"):
        return f"{100 * site.get('done', 0) // site['total']} %"
    if site.get("phase") == "training" and site.get("steps"):
        return f"step {site.get('step', 0)}/{site['steps']}"
    return ""


def _epsilon(epsilon: Any) -> str:
    if not isinstance(epsilon, Mapping):
        return ""
    parts = [f"{k} {v:.2f}" for k, v in epsilon.items() if isinstance(v, int | float)]
    return ", ".join(parts)


def _worst(epsilon: Mapping[str, Mapping[str, Any]]) -> str:
    values = [value for site in epsilon.values() for value in site.values()]
    if not values or None in values:
        return "∞" if values else "–"
    return f"{max(values):.2f}"

"""How often the attack finds each planted bug, and how often it leaves the shipped engine alone.

    python -m simulations.attack.power [--runs 300] [--games 100] [--engine NAME ...] [--json FILE]

Each run has other patients, coins, participation and noise. Of a bug in clipping, `leave_one_out`
is repeated; of another one a campaign with its nine checks; of the shipped engine both. The canary
game, which takes seconds, is repeated less often, for the shipped engine and the two bugs that it
must find. 300 runs without a miss are a power of at least 99 % with 95 % confidence (Clopper and
Pearson 1934).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from scipy import stats

from simulations.attack.audit import canary_game
from simulations.attack.bugs import BUGS, planted
from simulations.attack.checks import CAMPAIGN_CHECKS, Finding, campaign, leave_one_out
from simulations.attack.engine import audit_study

CANARIES = 2000
PLAYED = ("shipped", "noise_third", "stay_level_clipping")


class Power(BaseModel):
    """What repeated runs against one engine found.

    Attributes:
        named: The check named for the bug; "any check" for the shipped engine.
        refuted: Runs in which it refuted.
        all_refuted: Runs refuted, by check.
        least, median, most: Of the named check's statistic; None for "any check".
        seconds: Of processor time, a run.
    """

    engine: str
    named: str
    runs: int
    refuted: int
    all_refuted: dict[str, int]
    least: float | None
    median: float | None
    most: float | None
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of the probability to refute: bounds that hold with 95 % confidence each."""
        n, k = self.runs, self.refuted
        lower = 0.0 if k == 0 else float(stats.beta.ppf(0.05, k, n - k + 1))
        upper = 1.0 if k == n else float(stats.beta.ppf(0.95, k + 1, n - k))
        return lower, upper


def exact(engine: str, runs: int, on_run: Callable[[int], None] = lambda run: None) -> Power:
    """Repeats the exact checks against an engine ("shipped", or with a bug)."""
    study = audit_study(2.0, CANARIES // 2)
    named = BUGS[engine].found_by if engine in BUGS else "any check"
    parts = planted(engine if engine in BUGS else None)

    def once(seed: int) -> list[Finding]:
        findings = []
        if named in ("leave_one_out", "any check"):
            findings.append(leave_one_out(study, seed, parts))
        if named != "leave_one_out":
            recorded = campaign(study, seed, parts)
            findings += [check(recorded) for check in CAMPAIGN_CHECKS.values()]
        return findings

    return _repeat(engine, named, runs, once, on_run)


def games(engine: str, runs: int, on_run: Callable[[int], None] = lambda run: None) -> Power:
    """Repeats the canary game against an engine."""
    study, parts = audit_study(2.0, CANARIES // 2), planted(engine if engine in BUGS else None)

    def once(seed: int) -> list[Finding]:
        return [canary_game(study, CANARIES, seed, parts)]

    return _repeat(engine, "canary_game", runs, once, on_run)


def _repeat(
    engine: str,
    named: str,
    runs: int,
    once: Callable[[int], list[Finding]],
    on_run: Callable[[int], None],
) -> Power:
    counts: Counter[str] = Counter()
    refuted, statistic, began = 0, [], time.process_time()
    for run in range(runs):
        findings = once(run)
        failed = {f.check for f in findings if not f.passed}
        counts.update(failed)
        refuted += bool(failed) if named == "any check" else named in failed
        statistic += [f.statistic for f in findings if f.check == named]
        on_run(run + 1)
    return Power(
        engine=engine,
        named=named,
        runs=runs,
        refuted=refuted,
        all_refuted=dict(counts),
        least=min(statistic, default=None),
        median=statistics.median(statistic) if statistic else None,
        most=max(statistic, default=None),
        seconds=(time.process_time() - began) / runs,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; the JSON is written after each engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300, help="of the exact checks")
    parser.add_argument("--games", type=int, default=100, help="of the canary game")
    parser.add_argument("--engine", nargs="*", choices=["shipped", *BUGS], help="only these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, results = Console(), []
    engines = options.engine or ["shipped", *BUGS]
    work = [(exact, name, options.runs) for name in engines]
    work += [(games, name, options.games) for name in engines if name in PLAYED]
    with console.status("measuring") as status:
        for measure, name, runs in work:
            if not runs:
                continue

            def told(run: int, text: str = f"{name}: {{}}/{runs}") -> None:
                status.update(text.format(run))

            results.append(measure(name, runs, told))
            if options.json:
                options.json.write_text(json.dumps([r.model_dump() for r in results], indent=2))
    table = Table("engine", "check", "refuted", "95 % bounds", "all that refuted", "statistic", "s")
    for r in results:
        low, high = r.interval
        others = ", ".join(f"{name} {count}" for name, count in sorted(r.all_refuted.items()))
        table.add_row(
            r.engine,
            r.named,
            f"{r.refuted}/{r.runs}",
            f"{low:.1%}–{high:.1%}",
            others,
            " / ".join(f"{x:.4g}" for x in (r.least, r.median, r.most) if x is not None),
            f"{r.seconds:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()

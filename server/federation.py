"""The coordinator's round loop.

Order of a run: find the sites; have them prepare (long: they encode); take the initial adapter,
which is a function of the study; then rounds. A round asks every ready site to train from the
current adapter, waits for all of them within the deadline, needs a quorum, averages in roster
order, and is durable (checkpoint) before the next one begins. A round without quorum is lost: the
adapter stays, and a spare round takes its place. Evaluations are spread evenly over the rounds, the
last one after the last.

Everything in logs and files here is public: names of the study, codes, sizes, times, ε.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.messages import Arrays
from common.privacy.receipts import Receipt
from common.study import Study
from server.answers import Ready, Released, leave_out, most, read
from server.checkpoint import Checkpoint
from server.exchange import Exchange, FederationError, Outcome, Received
from server.metrics import measure, noise_deviation
from server.optimizer import TailAverage, server_optimizer, weighted_mean
from server.start import Start

log = logging.getLogger("fedward")

_RETURN_SECONDS = 60.0  # a SuperNode that was killed may not reconnect for so long


@dataclass
class Progress:
    """What a run has reached; all of it is in the checkpoint.

    Attributes:
        round: Last round asked, lost ones included; `completed` counts the aggregated ones.
        epsilon: By site, what its last answer stated: `{"train": ε, "validation": ε}`.
        steps: By site, DP-SGD steps that were answered for.
        evaluations: By release: round, sites that answered, and `Measured` of their histograms.
        seconds: Spent preparing, training and in all, sessions of a resumed run together.
        refused: By site that is not ready, why.
        left_out: By site and code, how many of its rounds and evaluations do not count.
        taken: Arrays of the initial adapter that come from the start.
    """

    round: int = 0
    completed: int = 0
    epsilon: dict[str, dict[str, float | None]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    releases: dict[str, int] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    bytes_up_per_round: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "train": 0.0, "total": 0.0}
    )
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """What a completed run hands to the report.

    Attributes:
        prepared: By site that is ready, the public body of its answer (`server.answers.Ready`).
        receipts: By site, the head of its ledger at its last answer.
        start: Where the study started, if not from its seed alone.
    """

    study: Study
    run: str
    adapter: Arrays
    progress: Progress
    prepared: Mapping[str, dict[str, Any]]
    receipts: Mapping[str, Receipt] = field(default_factory=dict)
    start: Start | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """What the sites say the adapter is."""
        return most(self.prepared, "spec")

    @property
    def encoders(self) -> dict[str, Any]:
        """By source, what the sites say they read it with."""
        return most(self.prepared, "encoders")


class Federation:
    """One run of a study over the sites that an exchange reaches.

    Args:
        out: Receives `checkpoint/` and `rounds.jsonl`.
        on_line: Called with each line of `rounds.jsonl`, for live curves.
        start: The adapter that the study's `[start]` names.
    """

    def __init__(
        self,
        exchange: Exchange,
        study: Study,
        out: Path,
        *,
        resume: bool = False,
        on_line: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        start: Start | None = None,
    ) -> None:
        self.start = start
        self.exchange, self.study, self.out = exchange, study, out
        self.on_line, self._clock = on_line, clock
        self.resume = resume
        self.optimizer = server_optimizer(study.federation)
        self.average = TailAverage(study.federation.rounds, study.federation.average_last)
        self.progress = Progress()
        self.adapter: Arrays = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        self._lost: set[str] = set()  # when sites were asked last
        self._slowest: dict[str, float] = {}  # answer, by kind of question
        self._began, self._before = clock(), 0.0
        self.quorum = max(1, math.ceil(study.federation.quorum * len(study.federation.sites)))

    # -- the run ----------------------------------------------------------------------------

    def run(self) -> Finished:
        """Runs all rounds.

        Raises:
            FederationError: Quorum cannot be met any more. What was reached is in the checkpoint.
        """
        federation = self.study.federation
        self._restore()
        self._began, self._before = self._clock(), self.progress.seconds["total"]
        self._start()
        if self.progress.round == 0:
            self.adapter = self._initial()
            self._save()
        due = [
            math.ceil(federation.rounds * i / self.study.evaluation.releases)
            for i in range(1, self.study.evaluation.releases + 1)
        ]
        self._evaluate_due(due)
        while self.progress.completed < federation.rounds:
            if self.progress.round >= self.study.priced_rounds:
                raise FederationError(
                    f"{self.progress.round} rounds were asked, {self.progress.completed} reached "
                    f"the quorum of {self.quorum} sites, and no spare round is left",
                    cure="see rounds.jsonl for the codes; raise privacy.spare_rounds",
                )
            self._train_round()
            self._evaluate_due(due)
        self._count_time()
        return Finished(
            self.study,
            self.exchange.run,
            self.average.mean(self.adapter),
            self.progress,
            self.prepared,
            {
                site: receipt
                for site in federation.sites
                if (receipt := self.exchange.receipts.latest(site))
            },
            self.start,
        )

    def _count_time(self) -> None:
        self.progress.seconds["total"] = self._before + self._clock() - self._began

    def _restore(self) -> None:
        found = Checkpoint.latest(self.out / "checkpoint", study_hash=self.study.hash)
        if found and self.resume:
            self.exchange.run = found.run
            self.adapter = found.adapter
            self.optimizer.restore(found.optimizer)
            self.average.restore(found.average)
            self.progress = Progress(round=found.round, completed=found.completed, **found.history)
            log.info("resuming after round %d (%d completed)", found.round, found.completed)
        elif found:
            raise FederationError(
                f"{self.out} holds the checkpoint of an earlier run",
                cure="add --resume to go on with it, or choose another folder",
            )
        path = self.out / "rounds.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["round"] <= self.progress.round and self.progress.round:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # torn by a crash
        path.write_text("".join(f"{line}\n" for line in kept))

    def _start(self) -> None:
        """Finds the sites and has them prepare; time here counts against no round."""
        federation = self.study.federation
        began = self._clock()
        self.exchange.discover(seconds=federation.startup_seconds)
        missing = [s for s in federation.sites if s not in self.exchange.hosts]
        if len(federation.sites) - len(missing) < self.quorum:
            raise FederationError(
                f"only {len(federation.sites) - len(missing)} of {len(federation.sites)} sites "
                f"appeared in {federation.startup_seconds:.0f} s, and a round needs {self.quorum}",
                cure=f"start the daemons of {', '.join(missing)}",
            )
        left = max(1.0, federation.startup_seconds - (self._clock() - began))
        self._prepare(list(self.exchange.hosts), seconds=left)
        if len(self.prepared) < self.quorum:
            codes = ", ".join(f"{s} {c}" for s, c in sorted(self.progress.refused.items()))
            raise FederationError(
                f"{len(self.prepared)} sites are ready, a round needs {self.quorum}: {codes}",
                cure="each code's story is in its site's own log",
            )
        self.progress.seconds["encode"] += self._clock() - began

    def _prepare(self, sites: list[str], *, seconds: float) -> None:
        began, told = self._clock(), self._clock()

        def report(outcome: Outcome, waiting: int) -> None:
            nonlocal told
            if self._clock() - told >= 15:
                told = self._clock()
                log.info(
                    "preparing: %d of %d sites ready after %.0f s",
                    len(outcome.answers),
                    len(sites),
                    told - began,
                )

        outcome = self.exchange.ask("prepare", sites, seconds=seconds, progress=report)
        for site, ready in read(outcome, Ready).items():
            if not ready.spec.dims.keys() >= self.study.sources.keys():
                leave_out(outcome, site, "answer-invalid")
                continue
            self.prepared[site] = ready.model_dump(exclude_unset=True)  # as it was said
            self.progress.refused.pop(site, None)
        for site, code in (outcome.refused | outcome.lost).items():
            log.warning("site %s is not ready: %s", site, code)
            self.prepared.pop(site, None)
            self.progress.refused[site] = code
        log.info("%d of %d sites are ready", len(self.prepared), len(self.study.federation.sites))

    def _initial(self) -> Arrays:
        """The adapter that the study's seed gives, from whichever site answers first, under that
        of the start."""
        numbers = most(self.prepared, "spec")["trainable_parameters"]
        for site in self._ready():
            outcome = self.exchange.ask(
                "initialise", [site], seconds=self.study.federation.deadline_seconds
            )
            received = outcome.answers.get(site)
            if (
                received
                and _sound(received.arrays)
                and sum(a.size for a in received.arrays.values()) == numbers
            ):
                return self._started(received.arrays)
            log.warning("site %s gave no initial adapter", site)
        raise FederationError("no site gave an initial adapter", cure="see the sites' logs")

    def _started(self, seeded: Arrays) -> Arrays:
        if self.start is None:
            return seeded
        arrays, self.progress.taken = self.start.over(seeded)
        log.info("%d of %d arrays come from the start", len(self.progress.taken), len(arrays))
        return arrays

    def _ready(self) -> list[str]:
        return [site for site in self.study.federation.sites if site in self.prepared]

    # -- a round ----------------------------------------------------------------------------

    def _train_round(self) -> None:
        progress = self.progress
        progress.round += 1
        began = self._clock()
        outcome = self._ask("train", progress.round, self.adapter)
        for site in [s for s, r in outcome.answers.items() if not _like(r.arrays, self.adapter)]:
            leave_out(outcome, site, "adapter-invalid")
        for site, released in read(outcome, Released).items():
            progress.epsilon[site] = dict(released.epsilon)
            progress.steps[site] = progress.steps.get(site, 0) + released.steps
        answered = self._in_order(outcome)
        reached = len(answered) >= self.quorum
        if reached:
            mean = weighted_mean(
                [(self.study.weight(site), r.arrays) for site, r in answered.items()]
            )
            self.adapter = self.optimizer.step(self.adapter, mean)
            progress.completed += 1
            self.average.add(progress.completed, self.adapter)
            progress.bytes_up_per_round = max(r.size for r in answered.values())
        seconds = self._clock() - began
        progress.seconds["train"] += seconds
        self._note(outcome)
        self._save()
        self._line(outcome, kind="train", seconds=seconds, aggregated=reached)
        log.info(
            "round %d: %d of %d sites in %.1f s%s",
            progress.round,
            len(answered),
            len(self.study.federation.sites),
            seconds,
            "" if reached else f"; lost, a round needs {self.quorum}",
        )

    def _ask(self, kind: Any, number: int, adapter: Arrays) -> Outcome:
        """Asks all ready sites, and those that did not answer again while the quorum is missed.

        The same request is sent each time, so that a site which answered too late is not charged
        twice. Sites that restarted prepare first.
        """
        federation = self.study.federation
        total = Outcome()
        for attempt in range(federation.retries + 1):
            sites = [s for s in self._ready() if s not in total.answers and s not in total.refused]
            if attempt and sites:
                log.info("asking %d sites again", len(sites))
            _merge(total, self._ask_once(kind, sites, number, adapter))
            woken = [s for s, code in total.refused.items() if code == "not-prepared"]
            if woken:
                self._prepare(woken, seconds=federation.startup_seconds)
                woken = [s for s in woken if s in self.prepared]
                for site in woken:
                    del total.refused[site]
                _merge(total, self._ask_once(kind, woken, number, adapter))
            if len(total.answers) >= self.quorum or not total.lost:
                break
        self._lost = set(total.lost)
        if total.answers:
            self._slowest[kind] = total.slowest
        for site, code in (total.refused | total.lost).items():
            log.warning("site %s did not take part: %s", site, code)
        return total

    def _ask_once(self, kind: Any, sites: list[str], number: int, adapter: Arrays) -> Outcome:
        """A site that was lost the last time does not make the others wait for the deadline once
        more, unless the quorum needs it; back again, it answers about as fast as they did."""
        doubtful = self._lost.intersection(sites)
        if len(sites) - len(doubtful) < self.quorum or kind not in self._slowest:
            doubtful = set()
        return self.exchange.ask(
            kind,
            sites,
            round=number,
            arrays=adapter,
            seconds=self.study.federation.deadline_seconds,
            briefly={s: max(_RETURN_SECONDS, 2 * self._slowest[kind]) for s in doubtful},
        )

    def _note(self, outcome: Outcome) -> None:
        """Counts whose answers do not count; kept with what the others gave."""
        for site, code in (outcome.refused | outcome.lost).items():
            codes = self.progress.left_out.setdefault(site, {})
            codes[code] = codes.get(code, 0) + 1

    def _in_order(self, outcome: Outcome) -> dict[str, Received]:
        return {s: outcome.answers[s] for s in self.study.federation.sites if s in outcome.answers}

    # -- evaluation -------------------------------------------------------------------------

    def _evaluate_due(self, due: list[int]) -> None:
        """Makes up for every release whose round has been completed."""
        progress = self.progress
        while len(progress.evaluations) < len(due):
            if progress.completed < due[len(progress.evaluations)]:
                return
            release = len(progress.evaluations) + 1
            began = self._clock()
            outcome = self._ask("evaluate", release, self.average.mean(self.adapter))
            shape = (len(self.study.tasks), 2, self.study.evaluation.bins)
            expected = {"histograms": np.zeros(shape)}
            for site in [s for s, r in outcome.answers.items() if not _like(r.arrays, expected)]:
                leave_out(outcome, site, "answer-invalid")
            for site, released in read(outcome, Released).items():
                progress.releases[site] = progress.releases.get(site, 0) + 1
                progress.epsilon[site] = dict(released.epsilon)
            answered = self._in_order(outcome)
            self._note(outcome)
            if not answered:
                raise FederationError(
                    f"no site answered evaluation {release}",
                    cure="see rounds.jsonl for the codes, then go on with --resume",
                )
            tasks = list(self.study.tasks)
            total = np.sum([r.arrays["histograms"] for r in answered.values()], axis=0)
            noise = noise_deviation(
                self.study.evaluation.noise_multiplier, len(tasks), len(answered)
            )
            metrics = measure(total, noise, tasks).model_dump(mode="json")
            progress.evaluations.append(
                {"round": progress.round, "sites": list(answered), "metrics": metrics}
            )
            self._save()
            self._line(outcome, kind="evaluate", seconds=self._clock() - began, metrics=metrics)
            log.info("evaluation %d: %d sites", release, len(answered))

    # -- files ------------------------------------------------------------------------------

    def _save(self) -> None:
        self._count_time()
        history = {k: v for k, v in vars(self.progress).items() if k not in ("round", "completed")}
        Checkpoint(
            self.study.hash,
            self.exchange.run,
            self.progress.round,
            self.progress.completed,
            self.adapter,
            self.optimizer.state(),
            history,
            self.average.state(),
        ).write(self.out / "checkpoint")

    def _line(self, outcome: Outcome, *, kind: str, seconds: float, **more: Any) -> None:
        """One line of `rounds.jsonl`; `bytes_up` is from sites to coordinator."""
        line = {
            "round": self.progress.round,
            "completed": self.progress.completed,
            "kind": kind,
            "sites": list(self._in_order(outcome)),
            "refused": dict(sorted(outcome.refused.items())),
            "lost": dict(sorted(outcome.lost.items())),
            "seconds": round(seconds, 3),
            "bytes_up": sum(r.size for r in outcome.answers.values()),
            "bytes_down": outcome.sent,
            "epsilon": {s: self.progress.epsilon[s] for s in self._in_order(outcome)},
            **more,
        }
        with (self.out / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.on_line:
            self.on_line(line)


def _merge(total: Outcome, more: Outcome) -> None:
    total.answers |= more.answers
    total.refused |= more.refused
    total.sent += more.sent
    total.slowest = max(total.slowest, more.slowest)
    total.lost = {
        s: c
        for s, c in (total.lost | more.lost).items()
        if s not in total.answers and s not in total.refused
    }


def _like(given: Arrays, expected: Arrays) -> bool:
    """Same names, shapes and types, and finite."""
    return (
        given.keys() == expected.keys()
        and all(
            given[n].shape == a.shape and given[n].dtype == a.dtype for n, a in expected.items()
        )
        and _sound(given)
    )


def _sound(arrays: Arrays) -> bool:
    return bool(arrays) and all(np.isfinite(a).all() for a in arrays.values())

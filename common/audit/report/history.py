"""The ledger in time: what was spent when, and what became of each study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from common.audit.prices import largest_delta
from common.audit.reading import Reading, moment
from common.privacy.book import POPULATIONS, Book
from common.privacy.events import Population
from common.privacy.lines import (
    Line,
    PolicyChanged,
    Reconciled,
    Released,
    StudyApproved,
    StudyRevoked,
    Upgraded,
)
from common.privacy.pricing import epsilon

MOST = 48
"""Points of the curve: each is a composition by PLD."""


@dataclass(frozen=True)
class Point:
    """One population after one line.

    Attributes:
        spent: Epsilon of all releases so far by PLD; information only (see `prices`).
        committed: Epsilon under the cap's rule, all that is set aside included; None without cap.
        cap: The cap then in force.
    """

    at: datetime
    spent: float
    committed: float | None
    cap: float | None


@dataclass(frozen=True)
class Life:
    """A study at this site.

    Attributes:
        end: When it was revoked, closed or expired; None while it may go on.
        ending: `revoked`, `reconciled`, `expired` or `open`.
    """

    name: str
    study_hash: str
    approvals: tuple[datetime, ...]
    releases: tuple[datetime, ...]
    end: datetime | None
    ending: str
    expires: datetime | None


@dataclass(frozen=True)
class Decided:
    """A decision about a study: who, when, and under which terms."""

    at: datetime
    verdict: str
    name: str
    study_hash: str
    who: str
    terms: str


def curve(reading: Reading) -> dict[Population, tuple[Point, ...]]:
    """Spending over time, thinned out to about `MOST` points; it ends at the ledger's last line."""
    lines = reading.book.lines
    moved = [i for i, line in enumerate(lines) if _moves(line)]
    chosen = {*_thinned(moved), len(lines) - 1} if moved else set()
    delta = largest_delta(reading.book)
    book = Book()
    points: dict[Population, list[Point]] = {population: [] for population in POPULATIONS}
    for index, (raw, line) in enumerate(zip(reading.raws, lines, strict=False)):
        book.admit(line, raw)
        if index in chosen:
            for population in POPULATIONS:
                points[population].append(_point(book, population, moment(line.at), delta))
    return {population: tuple(some) for population, some in points.items()}


def lives(reading: Reading) -> tuple[Life, ...]:
    """Every study that was approved, oldest first."""
    book, found = reading.book, []
    now = moment(book.last_at) if book.lines else None
    for hash_, account in book.studies.items():
        if not account.approvals:  # assumed from lost lines: when, is not known
            continue
        closing = [line for line in book.lines if _closes(line, hash_)]
        end, ending = None, "open"
        if account.closed:
            end, ending = moment(closing[-1].at), account.closed
        elif account.expires and now and account.expires <= now:
            end, ending = account.expires, "expired"
        found.append(
            Life(
                name=account.name,
                study_hash=hash_,
                approvals=tuple(moment(line.at) for line in account.approvals),
                releases=tuple(moment(line.at) for line in account.released),
                end=end,
                ending=ending,
                expires=account.expires,
            )
        )
    return tuple(found)


def decided(book: Book) -> tuple[Decided, ...]:
    """Approvals and revocations, and what closed studies without a person."""
    found = []
    for line in book.lines:
        if isinstance(line, StudyApproved):
            terms = f"{line.runs:,} run{'' if line.runs == 1 else 's'}"
            terms += f", until {line.expires[:10]}" if line.expires else ", without end"
            who = line.decision.approver if line.decision else "nobody (virtual, or schema 1)"
            found.append(
                Decided(moment(line.at), "approved", line.name, line.study_hash, who, terms)
            )
        elif isinstance(line, StudyRevoked):
            name = book.studies[line.study_hash].name
            found.append(
                Decided(
                    moment(line.at), "revoked", name, line.study_hash, line.decision.approver, ""
                )
            )
        elif isinstance(line, Reconciled):
            terms = f"up to line {line.receipt.lines}; what they may have released is counted"
            found.append(Decided(moment(line.at), "lines lost", "all studies", "", "–", terms))
    return tuple(found)


def _moves(line: Line) -> bool:
    kinds = Released | StudyApproved | StudyRevoked | PolicyChanged | Reconciled
    return isinstance(line, kinds)


def _closes(line: Line, study_hash: str) -> bool:
    return isinstance(line, Reconciled | Upgraded) or (
        isinstance(line, StudyRevoked) and line.study_hash == study_hash
    )


def _thinned(indices: Sequence[int]) -> list[int]:
    if len(indices) <= MOST:
        return list(indices)
    step = (len(indices) - 1) / (MOST - 1)
    return [indices[round(i * step)] for i in range(MOST)]


def _point(book: Book, population: Population, at: datetime, delta: float) -> Point:
    lifetime = book.lifetime(population)
    return Point(
        at=at,
        spent=epsilon(book.events(population), delta),
        committed=lifetime.epsilon if lifetime else None,
        cap=lifetime.cap.epsilon if lifetime else None,
    )

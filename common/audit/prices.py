"""What a ledger's releases cost, by study, population and in all; by independent accountants.

A study's price is PLD's at its own delta. Everything together, at the largest of these, is
information only: a hospital chooses its next study in the light of earlier answers, and there PLD
has no proof. What bounds a patient's life is the filter of the policy (`common.privacy.lifetime`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from common.audit.findings import Finding, error
from common.audit.reading import Reading
from common.audit.verify import judge
from common.errors import FedwardError
from common.privacy.accounts import StudyAccount
from common.privacy.book import POPULATIONS, Book
from common.privacy.events import PoissonGaussian, Population, ReleaseEvent, Unprotected
from common.privacy.lifetime import Commitment, Spending
from common.privacy.pricing import LARGE, cross_check, epsilon, epsilon_rdp
from common.study import Study, resolve

TOLERANCE = "PLD within PRV's interval (±0.01, or ±0.2 % of a large ε) and not above Rényi DP"
_NOT_OF_A_PRICE = {"key-untrusted", "unsigned"}
THEOREMS = {
    "rdp": "fully adaptive Rényi filter (Feldman, Zrnic 2021)",
    "sum": "basic composition is a filter (Rogers et al. 2016)",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figures(_Part):
    """One price; infinity is null in JSON.

    Attributes:
        rdp: Renyi DP's, an upper bound.
        prv: The interval in which the true value lies; None where PRV was not asked.
        agree: Whether the three agree (`TOLERANCE`); None where only two were asked.
        bounded: `pld` is Renyi DP's bound, because the price is above `LARGE`.
    """

    pld: float
    rdp: float
    prv: tuple[float, float] | None = None
    agree: bool | None = None
    bounded: bool = False


class Row(_Part):
    """A price of one population.

    Attributes:
        study: Hash; None for all together.
        spent: Of what was released.
        reserved: Of that and of what still may be.
        preset: Whether all of it was fixed beforehand; False after a second approval.
    """

    study: str | None
    name: str
    population: Population
    delta: float
    releases: int
    spent: Figures
    reserved: Figures
    preset: bool


class EventRow(_Part):
    """Equal releases of one study, merged.

    Attributes:
        mechanisms: Noised sums or vectors of one release: steps of DP-SGD, or 1.
        released, reserved: How many such releases were made, and set aside in all.
    """

    study: str
    name: str
    population: Population
    kind: str
    sample_rate: float | None
    noise_multiplier: float | None
    mechanisms: int
    released: int
    reserved: int


class CapRow(_Part):
    """A population's lifetime cap.

    Attributes:
        epsilon, delta: Committed under the cap's rule: spent, and still set aside.
        after: Epsilon with the study of `--what-if`.
    """

    population: Population
    rule: Literal["rdp", "sum"]
    order: int
    theorem: str
    epsilon: float
    delta: float
    cap_epsilon: float
    cap_delta: float
    remaining: float
    within: bool
    after: float | None = None
    fits: bool | None = None


class WhatIf(_Part):
    """A study that is not approved yet: what it would set aside.

    Attributes:
        alone: Its epsilon at `delta`, by population.
        now, then: Epsilon of everything set aside without and with it, at `delta_together`.
    """

    name: str
    study_hash: str
    delta: float
    delta_together: float
    alone: dict[Population, float]
    now: dict[Population, float]
    then: dict[Population, float]


class Prices(_Part):
    """The prices of a ledger, with what an audit of it found."""

    site: str
    at: str
    lines: int
    head: str
    tolerance: str = TOLERANCE
    rows: tuple[Row, ...]
    together: tuple[Row, ...]
    caps: tuple[CapRow, ...]
    events: tuple[EventRow, ...]
    what_if: WhatIf | None
    findings: tuple[Finding, ...]


def price(
    reading: Reading, *, at: datetime | None = None, what_if: str | None = None, quick: bool = False
) -> Prices:
    """Prices a ledger.

    Args:
        at: Of the lines up to then only.
        what_if: A study's file or ready name, priced as if it were approved on top.
        quick: Leave PRV out, which takes 1 to 3 s for each distinct mechanism.

    Raises:
        FedwardError: The study of `what_if` cannot be read or does not say what this site would
            release.
    """
    book = reading.book if at is None else reading.until(at)
    study = None if what_if is None else planned(what_if, book.site)
    more = (
        None
        if study is None
        else Commitment(
            study.privacy.delta,
            _account(book, study).more(Counter(study.reserved_events(book.site))),
        )
    )
    each, in_all = rows(book, quick=quick), together(book, quick=quick)
    said = [f for f in judge(reading).findings if f.rule not in _NOT_OF_A_PRICE]
    return Prices(
        site=book.site,
        at=book.last_at,
        lines=len(book.lines),
        head=book.head,
        rows=each,
        together=in_all,
        caps=caps(book, more),
        events=events(book),
        what_if=None if study is None or more is None else _what_if(book, study, more),
        findings=(*said, *_disagreements((*each, *in_all))),
    )


def _disagreements(some: tuple[Row, ...]) -> list[Finding]:
    return [
        error(
            "accountants-disagree",
            f"'{row.name}', {row.population} patients: {TOLERANCE} does not hold",
            "trust none of the figures; report it with the ledger's events",
        )
        for row in some
        if row.spent.agree is False or row.reserved.agree is False
    ]


def rows(book: Book, *, quick: bool) -> tuple[Row, ...]:
    """Every study that set anything aside, by population."""
    return tuple(
        _row(hash_, account.name, population, account.delta, [account], quick=quick)
        for hash_, account in book.studies.items()
        for population in POPULATIONS
        if _of(committed([account]), population)
    )


def together(book: Book, *, quick: bool) -> tuple[Row, ...]:
    """All studies, by population, at the largest delta of any. Information only."""
    accounts = list(book.studies.values())
    delta = largest_delta(book)
    return tuple(
        _row(None, "all together", population, delta, accounts, quick=quick)
        for population in POPULATIONS
        if _of(committed(accounts), population)
    )


def largest_delta(book: Book) -> float:
    """Of all studies; 1e-5 before the first."""
    return max((account.delta for account in book.studies.values()), default=1e-5)


def committed(accounts: list[StudyAccount]) -> Counter[ReleaseEvent]:
    """All that was, or still may be, released."""
    total: Counter[ReleaseEvent] = Counter()
    for account in accounts:
        total.update(account.committed)
    return total


def figures(some: Mapping[ReleaseEvent, int], delta: float, *, quick: bool) -> Figures:
    """The price of releases of one population, by two accountants or (not `quick`) by three."""
    pld, rdp = epsilon(some, delta), epsilon_rdp(some, delta)
    if pld > LARGE:
        return Figures(pld=pld, rdp=rdp, bounded=not math.isinf(pld))
    if quick:
        return Figures(pld=pld, rdp=rdp)
    found = cross_check(some, delta)
    interval = (found.prv_lower, found.prv_upper)
    return Figures(pld=found.pld, rdp=found.rdp, prv=interval, agree=found.agree)


def caps(book: Book, more: Commitment | None = None) -> tuple[CapRow, ...]:
    """The lifetime caps of the policy in force, where it has any."""
    found = []
    for population in POPULATIONS:
        now = book.lifetime(population)
        if now is not None:
            after = book.lifetime(population, more) if more else None
            found.append(_cap(population, now, after))
    return tuple(found)


def events(book: Book) -> tuple[EventRow, ...]:
    """The releases behind the prices."""
    found = []
    for hash_, account in book.studies.items():
        for event, reserved in committed([account]).items():
            found.append(
                EventRow(
                    study=hash_,
                    name=account.name,
                    population=event.population,
                    kind=event.kind,
                    sample_rate=getattr(event, "sample_rate", None),
                    noise_multiplier=getattr(event, "noise_multiplier", None),
                    mechanisms=_mechanisms(event),
                    released=account.spent[event],
                    reserved=reserved,
                )
            )
    return tuple(found)


def planned(name: str, site: str) -> Study:
    """A study as it would run at a site, noise multipliers settled.

    Raises:
        FedwardError: It does not name the site, or cannot be settled.
    """
    try:
        study = Study.load(name)
    except UnicodeDecodeError:
        raise FedwardError(f"the study {name} is not text", cure="give its TOML file") from None
    roster = study.federation.sites
    if site not in roster and (roster or study.federation.patients_declared is None):
        raise FedwardError(
            f"study '{study.name}' does not name site '{site}'",
            cure=f"add [federation.sites.{site}] with patients_declared = …",
        )
    if study.resolved:
        return study
    return resolve(study, sites=None if site in roster else {site: None})


def _account(book: Book, study: Study) -> StudyAccount:
    return book.studies.get(study.hash, StudyAccount(study.hash, study.name, study.privacy.delta))


def _what_if(book: Book, study: Study, more: Commitment) -> WhatIf:
    now = committed(list(book.studies.values()))
    then = now + Counter(more.events)
    largest = max([more.delta, *(account.delta for account in book.studies.values())])

    def by_population(some: Mapping[ReleaseEvent, int], delta: float) -> dict[Population, float]:
        return {p: epsilon(_of(some, p), delta) for p in POPULATIONS}

    return WhatIf(
        name=study.name,
        study_hash=study.hash,
        delta=more.delta,
        delta_together=largest,
        alone=by_population(more.events, more.delta),
        now=by_population(now, largest),
        then=by_population(then, largest),
    )


def _row(
    study: str | None,
    name: str,
    population: Population,
    delta: float,
    accounts: list[StudyAccount],
    *,
    quick: bool,
) -> Row:
    spent: Counter[ReleaseEvent] = sum((a.spent for a in accounts), Counter())
    released = _of(spent, population)
    parts = [c for a in accounts for c in a.wholes if _of(c.events, population)]
    return Row(
        study=study,
        name=name,
        population=population,
        delta=delta,
        releases=sum(released.values()),
        spent=figures(released, delta, quick=quick),
        reserved=figures(_of(committed(accounts), population), delta, quick=quick),
        preset=len(parts) <= 1,
    )


def _cap(population: Population, now: Spending, after: Spending | None) -> CapRow:
    return CapRow(
        population=population,
        rule=now.cap.rule,
        order=now.cap.order,
        theorem=THEOREMS[now.cap.rule],
        epsilon=now.epsilon,
        delta=now.delta,
        cap_epsilon=now.cap.epsilon,
        cap_delta=now.cap.delta,
        remaining=now.remaining,
        within=now.within,
        after=after.epsilon if after else None,
        fits=after.within if after else None,
    )


def _mechanisms(event: ReleaseEvent) -> int:
    if isinstance(event, PoissonGaussian):
        return event.steps
    return 1 if isinstance(event, Unprotected) else event.count


def _of(some: Mapping[ReleaseEvent, int], population: Population) -> dict[ReleaseEvent, int]:
    return {e: n for e, n in some.items() if e.population == population and n}

"""A draft for the record of processing (GDPR, article 30) and the impact assessment (article 35).

It holds what ledger and policy say. Whatever else the law asks for is left to the officer: a
`to_fill` says what, and nothing is invented in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from common.audit.prices import CapRow, Row
from common.audit.report.history import Decided, Life
from common.audit.report.risk import Risk
from common.audit.tables import eps
from common.audit.verify import NAMES, Verification
from common.privacy.book import Book
from common.privacy.events import Population
from common.privacy.lines import PatientErased, Software
from common.privacy.policy import Policy

_LEAVES = {
    "poisson_gaussian": "sums of patients' gradients, clipped and noised, and what follows from "
    "them (an adapter)",
    "gaussian_histogram": "histograms of scores of validation patients, noised",
    "noisy_count": "counts of patients, noised",
    "unprotected": "results without any noise",
}


class Entry(BaseModel):
    """One heading.

    Attributes:
        article: Of the GDPR.
        known: What ledger and policy say.
        to_fill: What the officer must add; empty where nothing is missing.
    """

    model_config = ConfigDict(frozen=True)

    article: str
    title: str
    known: tuple[str, ...] = ()
    to_fill: str = ""


class Record(BaseModel):
    """The draft, with what it rests on."""

    model_config = ConfigDict(frozen=True)

    site: str
    written: str
    ledger_valid: bool
    ledger_lines: int
    ledger_head: str
    proven: str
    entries: tuple[Entry, ...]


def record(
    book: Book,
    found: Verification,
    rows: Sequence[Row],
    caps: Sequence[CapRow],
    risks: dict[Population, Risk],
    lives: Sequence[Life],
    decisions: Sequence[Decided],
    policy: Policy | None,
    written: str,
) -> Record:
    """The draft of a site."""
    return Record(
        site=book.site,
        written=written,
        ledger_valid=found.valid,
        ledger_lines=found.lines,
        ledger_head=found.head,
        proven=found.proven,
        entries=(
            Entry(
                article="30 (1) a",
                title="Controller and data-protection officer",
                known=(f"site '{book.site}' in the federation",),
                to_fill="name and contact details of controller, representative and officer",
            ),
            Entry(
                article="30 (1) b",
                title="Purposes",
                known=tuple(
                    f"study '{a.name}' ({hash_[:12]}…)" for hash_, a in book.studies.items()
                ),
                to_fill="what each study is for, and its legal basis",
            ),
            Entry(
                article="30 (1) c",
                title="Data subjects and personal data",
                known=_subjects(book),
                to_fill="categories of data that each study read; the ledger does not record them",
            ),
            Entry(
                article="30 (1) d",
                title="Recipients",
                known=_recipients(book, policy),
                to_fill="who holds these keys, and to whom results are published"
                if policy
                else "the coordinators, whose keys stand in the policy (not given here)",
            ),
            Entry(
                article="30 (1) e",
                title="Transfers to third countries",
                to_fill="countries of coordinators and recipients, and safeguards",
            ),
            Entry(
                article="30 (1) f",
                title="Time limits and erasure",
                known=_limits(book, lives),
                to_fill="how long the hospital keeps the data that studies read",
            ),
            Entry(
                article="30 (1) g, 32",
                title="Technical safeguards",
                known=_safeguards(book, rows, caps),
                to_fill="organisational measures; who may reach the daemon's machine",
            ),
            Entry(
                article="35 (7) a",
                title="Description of the processing",
                known=_description(book, decisions),
                to_fill="the clinical context",
            ),
            Entry(
                article="35 (7) b",
                title="Necessity and proportionality",
                to_fill="why these studies, with these data, are necessary and proportionate",
            ),
            Entry(
                article="35 (7) c",
                title="Risks to patients",
                known=(
                    *(
                        f"{NAMES[p]} patients: whoever sees all that was released guesses whether "
                        f"a given patient took part rightly in at most "
                        f"{100 * (risk.sharper or risk.accuracy):.1f} of 100 cases; a coin in 50"
                        for p, risk in risks.items()
                    ),
                    "patients treated at several sites: their ε and δ add up over the sites",
                ),
                to_fill="other risks, such as those of the models' use",
            ),
            Entry(
                article="35 (7) d",
                title="Measures against them",
                known=_measures(found),
                to_fill="further measures, and who answers for them",
            ),
        ),
    )


def _subjects(book: Book) -> tuple[str, ...]:
    touched = {event.population for account in book.studies.values() for event in account.allowed}
    declared = [line.patients_declared for a in book.studies.values() for line in a.approvals]
    largest = max((n for n in declared if n is not None), default=None)
    known = [f"{NAMES[p]} patients of the site" for p in NAMES if p in touched]
    if len(known) == len(NAMES):
        known.append("the two are disjoint: no patient is in both")
    if largest is not None:
        known.append(f"at least {largest:,} training patients, as the largest study declares")
    return tuple(known)


def _recipients(book: Book, policy: Policy | None) -> tuple[str, ...]:
    kinds = dict.fromkeys(e.kind for a in book.studies.values() for e in a.spent)
    left = tuple(f"left the site: {_LEAVES[kind]}" for kind in kinds) or ("nothing left the site",)
    keys = tuple(f"coordinator with key {key}" for key in policy.coordinators) if policy else ()
    return (*keys, *left)


def _limits(book: Book, lives: Sequence[Life]) -> tuple[str, ...]:
    ends = tuple(
        f"approval of '{life.name}' {life.ending if life.end else 'ends'} "
        f"{(life.end or life.expires):%Y-%m-%d}"
        if life.end or life.expires
        else f"approval of '{life.name}' has no end"
        for life in lives
    )
    erased = [line.at[:10] for line in book.lines if isinstance(line, PatientErased)]
    gone = f"patients erased: {len(erased)}" + (f" ({', '.join(erased)})" if erased else "")
    return (*ends, gone, "what was released before stays released; the DP statement covers it")


def _safeguards(book: Book, rows: Sequence[Row], caps: Sequence[CapRow]) -> tuple[str, ...]:
    known = ["differential privacy for the patient, with all records; add/remove adjacency"]
    known += [
        f"study '{row.name}', {NAMES[row.population]} patients: ε {eps(row.spent.pld)} spent, "
        f"at most {eps(row.reserved.pld)}, δ {row.delta:g}"
        for row in rows
    ]
    known += [
        f"lifetime cap, {NAMES[cap.population]} patients: ε {cap.cap_epsilon:g}, δ "
        f"{cap.cap_delta:g}; {cap.theorem}"
        for cap in caps
    ]
    if book.simulated:
        known.append("NOT PRIVATE: the randomness was seeded")
    elif book.lines:
        known.append("randomness of the operating system, never stored")
    signs = "hash-chained and signed" if book.keys else "hash-chained, not signed"
    known.append(f"each release is written into a ledger first, {signs}")
    return tuple(known)


def _description(book: Book, decisions: Sequence[Decided]) -> tuple[str, ...]:
    software = [line for line in book.lines if isinstance(line, Software)]
    return (
        *(
            f"{d.at:%Y-%m-%d}: {d.name} {d.verdict} by {d.who}{f' ({d.terms})' if d.terms else ''}"
            for d in decisions
        ),
        *(f"{s.at[:10]}: software {s.version}, code {s.code_hash[:12]}…" for s in software),
    )


def _measures(found: Verification) -> tuple[str, ...]:
    asked = sum(found.refusals.values())
    outcome = "valid" if found.valid else "NOT valid: see the findings"
    return (
        f"requests refused by the site: {asked}",
        f"ledger verified: {outcome}; {found.proven}",
        f"policy in force: {found.policy_sha256 or 'none recorded'}",
    )

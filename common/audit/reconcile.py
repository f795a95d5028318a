"""A published privacy statement against the ledgers of its sites.

The card claims less than, or exactly, what the ledgers charged: an answer that was lost on its way
was charged and does not show in the card. The other way round, a card that claims more work than
was charged, or less epsilon than that work costs, is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, computed_field

from common.audit.card import Card, Claim, read_card
from common.audit.findings import Finding, error, note, warning, wrong
from common.audit.prices import committed
from common.audit.reading import Reading, read
from common.audit.verify import Verification, hold, judge
from common.errors import FedwardError
from common.privacy.accounts import StudyAccount
from common.privacy.events import (
    GaussianHistogram,
    PoissonGaussian,
    Population,
    ReleaseEvent,
    Unprotected,
)
from common.privacy.pricing import epsilon

_PRINTED = 0.5e-3 * (1 + 1e-9)  # by which a sigma of 3 decimals may be off
_NOT_OF_A_CARD = {"key-untrusted", "lifetime-uncapped"}  # said of the ledger, not of the statement


class Row(BaseModel):
    """Claimed and charged of one site; infinity is null in JSON."""

    model_config = ConfigDict(frozen=True)

    site: str
    steps_claimed: int
    steps_charged: int
    evaluations_claimed: int
    evaluations_charged: int
    train_claimed: float
    train_charged: float
    validation_claimed: float
    validation_charged: float
    at_most: float
    reserved: float


class Reconciliation(BaseModel):
    """The outcome."""

    model_config = ConfigDict(frozen=True)

    card: str
    study_hash: str
    rows: tuple[Row, ...]
    proven: dict[str, str]
    findings: tuple[Finding, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def valid(self) -> bool:
        """Whether the card's claims hold."""
        return not wrong(self.findings)


def reconcile(card_path: Path, ledgers: Sequence[Path]) -> Reconciliation:
    """Compares a model card with ledgers of its sites.

    Raises:
        FedwardError: A file cannot be read, or two ledgers are of one site.
    """
    card = read_card(card_path)
    found: list[Finding] = []
    readings: dict[str, Reading] = {}
    proven: dict[str, str] = {}
    for path in ledgers:
        reading = read(path)
        site = reading.book.site or str(path)
        if site in readings:
            raise FedwardError(
                f"{readings[site].path} and {path} are both ledgers of site '{site}'",
                cure="give the newer one only",
            )
        readings[site] = reading
        outcome, audited = _audited(card, site, reading)
        found += audited
        proven[site] = outcome.proven
    rows = []
    for claim in card.claims:
        claimed = readings.get(claim.site)
        if claimed is None:
            text = "the card names this site, but no ledger of it was given"
            found += _at(claim.site, [error("ledger-missing", text, "ask the site for it")])
            continue
        account = claimed.book.studies.get(card.study_hash)
        if account is None:
            text = f"study {card.study_hash[:12]}… was never approved here"
            found += _at(claim.site, [error("study-unapproved", text)])
            continue
        row = _row(claim, account)
        rows.append(row)
        found += _at(claim.site, _compared(claim, row, account))
    if not card.private:
        found += _without_privacy(card, readings)
    named = {claim.site for claim in card.claims}
    for site in readings if card.private else ():
        if site not in named:
            text = "a ledger was given of a site that the card does not name"
            found += _at(site, [warning("ledger-unasked", text)])
    order = ("error", "warning", "note")
    return Reconciliation(
        card=str(card.path),
        study_hash=card.study_hash,
        rows=tuple(rows),
        proven=proven,
        findings=tuple(sorted(found, key=lambda finding: order.index(finding.severity))),
    )


def _audited(card: Card, site: str, reading: Reading) -> tuple[Verification, list[Finding]]:
    """The ledger's own findings, and whether it holds the head that the card keeps."""
    heads = [head for head in card.heads if head.site == site]
    outcome = judge(reading, public_key=heads[0].public_key if heads else None)
    found = [f for f in outcome.findings if f.rule not in _NOT_OF_A_CARD]
    if not heads and any(claim.site == site for claim in card.claims):
        text = (
            "the card keeps no head of this ledger: whose it is, and that it is whole, is not shown"
        )
        found.append(warning("card-headless", text))
    lacking = [hold(reading, head.lines, head.head) for head in heads]
    found += [finding for finding in lacking if finding is not None]
    held = [head.lines for head, finding in zip(heads, lacking, strict=True) if finding is None]
    if held:
        outcome = outcome.model_copy(update={"receipts": len(held), "complete_to": max(held)})
    if (outcome.virtual or outcome.entropy == "seeded") and not card.simulated:
        text = "the ledger is of a simulation, and the card does not say so"
        found.append(error("simulation-unsaid", text, "publish nothing of it as private"))
    return outcome, _at(site, found)


def _row(claim: Claim, account: StudyAccount) -> Row:
    reserved = committed([account])
    return Row(
        site=claim.site,
        steps_claimed=claim.steps,
        steps_charged=sum(e.steps * n for e, n in _training(account.spent).items()),
        evaluations_claimed=claim.evaluations,
        evaluations_charged=sum(e.count * n for e, n in _evaluations(account.spent).items()),
        train_claimed=claim.train,
        train_charged=_epsilon(account.spent, "train", account.delta),
        validation_claimed=claim.validation,
        validation_charged=_epsilon(account.spent, "validation", account.delta),
        at_most=claim.at_most,
        reserved=max(
            _epsilon(reserved, "train", account.delta),
            _epsilon(reserved, "validation", account.delta),
        ),
    )


def _compared(claim: Claim, row: Row, account: StudyAccount) -> Iterable[Finding]:
    """Every claim of a row against what was charged and set aside."""
    if f"{account.delta:g}" != f"{claim.delta:g}":
        yield error(
            "delta-differs", f"the card says δ {claim.delta:g}, the ledger {account.delta:g}"
        )
    for event in _training(committed([account])):
        if abs(event.noise_multiplier - claim.noise_multiplier) > _PRINTED:
            text = f"the card says σ {claim.noise_multiplier:g}, the ledger "
            yield error("noise-differs", f"{text}{event.noise_multiplier:g}")
        if event.sample_rate != claim.sample_rate:
            text = f"the card says q {claim.sample_rate:g}, the ledger {event.sample_rate:g}"
            yield error("sample-rate-differs", text)
    for what, claimed, charged in (
        ("steps", row.steps_claimed, row.steps_charged),
        ("evaluations", row.evaluations_claimed, row.evaluations_charged),
    ):
        if charged < claimed:
            text = f"the card claims {claimed} {what}, the ledger charged {charged}"
            yield error("work-uncharged", text)
        elif charged > claimed:
            text = f"the ledger charged {charged} {what}, {claimed} arrived: answers were lost, or "
            yield warning("charged-more", f"{text}the study ran again")
    yield from _priced(claim, row, account)


def _priced(claim: Claim, row: Row, account: StudyAccount) -> Iterable[Finding]:
    work = {
        "train": _steps(_training(account.spent), claim.steps),
        "validation": _vectors(_evaluations(account.spent), claim.evaluations),
    }
    for population, claimed, charged in (
        ("train", row.train_claimed, row.train_charged),
        ("validation", row.validation_claimed, row.validation_charged),
    ):
        costs = epsilon(work[population], account.delta)
        if costs > claimed:
            text = f"{population}: the card claims ε {_shown(claimed)}, but the work that it claims"
            yield error("epsilon-flattered", f"{text} costs {_shown(costs)}")
        if charged > claim.at_most:
            text = f"{population}: {_shown(charged)} was charged, the card says at most "
            yield error("epsilon-passed", f"{text}{_shown(claim.at_most)}")
        elif charged > claimed:
            text = f"{population}: ε {_shown(charged)} was charged, the card's {_shown(claimed)}"
            yield warning("epsilon-charged-more", f"{text} leaves out what did not arrive")
    if row.reserved > claim.at_most:
        text = f"ε {_shown(row.reserved)} is set aside, the card says at most "
        yield warning(
            "reserve-larger",
            f"{text}{_shown(claim.at_most)}: approved for more runs, or under other terms",
        )


def _without_privacy(card: Card, readings: dict[str, Reading]) -> list[Finding]:
    found: list[Finding] = []
    for site, reading in readings.items():
        account = reading.book.studies.get(card.study_hash)
        if account is None:
            text = f"study {card.study_hash[:12]}… was never approved here"
            found += _at(site, [error("study-unapproved", text)])
        elif any(isinstance(event, Unprotected) for event in account.spent):
            text = "released without privacy, as the card says: priced at infinity, for ever"
            found += _at(site, [note("unprotected-as-said", text)])
    return found


def _training(some: Counter[ReleaseEvent]) -> dict[PoissonGaussian, int]:
    return {e: n for e, n in some.items() if isinstance(e, PoissonGaussian)}


def _evaluations(some: Counter[ReleaseEvent]) -> dict[GaussianHistogram, int]:
    return {e: n for e, n in some.items() if isinstance(e, GaussianHistogram)}


def _steps(some: dict[PoissonGaussian, int], steps: int) -> dict[ReleaseEvent, int]:
    """`steps` steps of the charged mechanism; it is one where the card is right."""
    first = next(iter(some), None)
    return {first.model_copy(update={"steps": steps}): 1} if first and steps else {}


def _vectors(some: dict[GaussianHistogram, int], count: int) -> dict[ReleaseEvent, int]:
    """`count` vectors of the charged mechanism."""
    first = next(iter(some), None)
    return {first.model_copy(update={"count": count}): 1} if first and count else {}


def _epsilon(some: Counter[ReleaseEvent], population: Population, delta: float) -> float:
    chosen = {e: n for e, n in some.items() if e.population == population}
    return epsilon(chosen, delta)


def _shown(value: float) -> str:
    return "∞" if math.isinf(value) else f"{math.ceil(value * 1000) / 1000:.3f}"


def _at(site: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding.model_copy(update={"site": site}) for finding in findings]

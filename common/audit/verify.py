"""What a ledger proves: chain, signatures, order, budgets, and against receipts that it is whole.

A valid ledger is a prefix of what its site wrote. That nothing was cut off its end shows only
against receipts that others keep: coordinators, other sites, a printed report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from common.audit.findings import Finding, error, note, warning, wrong
from common.audit.reading import Reading, moment, read
from common.audit.tampering import tampering
from common.privacy.book import POPULATIONS, Book
from common.privacy.events import Population
from common.privacy.lines import split
from common.privacy.policy import Policy
from common.privacy.receipts import Receipt

_AHEAD = timedelta(minutes=10)  # by which the auditor's own clock may stand behind

NAMES: dict[Population, str] = {"train": "training", "validation": "validation"}


class Verification(BaseModel):
    """The outcome, up to the last line that holds.

    Attributes:
        lines: That hold; `lines_in_file` counts all.
        head: SHA-256 of the last of them: what the printed page and a receipt name.
        public_keys: Of the site, oldest first; the last one signs.
        unsigned: Lines of schema 1 at the beginning, which are chained but not signed.
        counts: Lines by kind.
        receipts: Receipts of this site that the ledger holds.
        complete_to: Line up to which nothing can have been cut; 0 without a receipt.
    """

    model_config = ConfigDict(frozen=True)

    ledger: str
    site: str
    public_keys: tuple[str, ...]
    ledger_schema: Literal[1, 2]
    entropy: Literal["os", "seeded"]
    virtual: bool
    lines: int
    lines_in_file: int
    unsigned: int
    head: str
    first_at: str
    last_at: str
    counts: dict[str, int]
    refusals: dict[str, int]
    policy_sha256: str | None
    receipts: int
    complete_to: int
    findings: tuple[Finding, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def valid(self) -> bool:
        """Whether every claim holds."""
        return not wrong(self.findings)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def proven(self) -> str:
        """What is proven about its being whole."""
        if not self.complete_to:
            return "a valid prefix only: without a receipt, lines may have been cut off its end"
        held = f"{self.receipts} receipt{'' if self.receipts == 1 else 's'}"
        return f"complete up to line {self.complete_to} of {self.lines} against {held}"


def verify(
    path: Path,
    *,
    public_key: str | None = None,
    receipts: Sequence[Receipt] = (),
    policy: Policy | None = None,
) -> Verification:
    """Verifies a ledger file.

    Args:
        public_key: Of the site, hex, from where the reader trusts; any key of its succession.
        receipts: Receipts that others kept.
        policy: The hospital's, to be compared with the one in force at the end.

    Raises:
        FedwardError: There is no file, or it is empty.
    """
    return judge(read(path), public_key=public_key, receipts=receipts, policy=policy)


def judge(
    reading: Reading,
    *,
    public_key: str | None = None,
    receipts: Sequence[Receipt] = (),
    policy: Policy | None = None,
) -> Verification:
    """`verify` for a ledger that was read."""
    book = reading.book
    broken = tampering(reading)
    own, of_receipts = _receipts(reading, list(dict.fromkeys(receipts)), public_key)
    findings = [
        *([broken] if broken else []),
        *_whose(book, public_key),
        *_what(book),
        *of_receipts,
        *_policy(book, policy),
    ]
    order = ("error", "warning", "note")
    unsigned = next((i for i, raw in enumerate(reading.raws) if split(raw)[1]), len(book.lines))
    return Verification(
        ledger=str(reading.path),
        site=book.site,
        public_keys=tuple(book.keys),
        ledger_schema=2 if book.keys else 1,
        entropy="seeded" if book.simulated else "os",
        virtual=book.virtual,
        lines=len(book.lines),
        lines_in_file=len(reading.raws),
        unsigned=unsigned,
        head=book.head,
        first_at=book.lines[0].at if book.lines else "",
        last_at=book.last_at,
        counts=Counter(line.line for line in book.lines),
        refusals=book.refusals,
        policy_sha256=book.policy.sha256 if book.policy else None,
        receipts=len(own),
        complete_to=max((receipt.lines for receipt in own), default=0),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
    )


def _whose(book: Book, public_key: str | None) -> list[Finding]:
    if not book.lines:
        return []
    if not book.keys:
        text = "the ledger is of schema 1: chained, but not signed, so whoever holds the file can "
        return [
            warning(
                "unsigned",
                f"{text}write another one",
                "start a daemon of this version on it, which signs from then on",
            )
        ]
    found = []
    if book.lines[0].line == "genesis" and book.lines[0].public_key is None:
        signed_from = next(i for i, line in enumerate(book.lines, 1) if line.line == "upgraded")
        text = f"lines 1 to {signed_from - 1} are chained, but not signed (schema 1)"
        found.append(note("unsigned", f"{text}; line {signed_from} signs for them all"))
    if public_key is None:
        found.append(
            warning(
                "key-untrusted",
                f"no public key was given to compare: that this is the ledger of '{book.site}' "
                "rests on your trust",
                "give --public-key, from the study or from the hospital itself",
            )
        )
    elif public_key not in book.keys:
        found.append(
            error(
                "site-foreign",
                f"another site's ledger: it is signed by {_keys(book)}, not by {public_key[:12]}…",
                "compare the public key with what the hospital says it is",
            )
        )
    elif public_key != book.public_key:
        found.append(note("key-rotated", f"the key given was rotated; now {_keys(book)} sign"))
    return found


def _keys(book: Book) -> str:
    return ", ".join(f"{key[:12]}…" for key in book.keys)


def _what(book: Book) -> list[Finding]:
    """What the lines say, where a reader could take it for more or better."""
    found = [error(rule, text, line=line) for rule, line, text in book.anomalies]
    if book.simulated:
        found.append(
            error(
                "entropy-seeded",
                "simulated: the randomness was seeded, so whoever has the seed can take the noise "
                "away; nothing here is private",
            )
        )
    if book.virtual:
        text = "a virtual hospital of a simulation: it protects no patient"
        found.append(warning("site-virtual", text))
    for population in sorted(book.unprotected()):
        text = f"{NAMES[population]} patients were released without privacy: priced at infinity"
        found.append(warning("unprotected", f"{text}, for ever"))
    for population in POPULATIONS:
        spending = book.lifetime(population)
        if spending is not None and not spending.within:
            found.append(
                warning(
                    "lifetime-exceeded",
                    f"{NAMES[population]} patients: the cap was lowered below what is set aside; "
                    "nothing more is released",
                )
            )
    if book.lines and not book.virtual and (book.policy is None or book.policy.lifetime is None):
        text = "no lifetime cap: studies may follow one another without end"
        found.append(warning("lifetime-uncapped", text))
    for line in book.reconciled:
        text = f"lines up to {line.receipt.lines} were lost; all that they may have released counts"
        found.append(warning("reconciled", f"{text} as spent", line=book.lines.index(line) + 1))
    for rule, number, text in book.remarks:
        found.append(warning(rule, text, line=number))
    if book.lines and moment(book.last_at) > datetime.now(UTC) + _AHEAD:
        text = f"dated in the future ({book.last_at}): the site's clock was ahead"
        found.append(warning("clock-ahead", text, line=len(book.lines)))
    return found


def _receipts(
    reading: Reading, receipts: Sequence[Receipt], public_key: str | None
) -> tuple[list[Receipt], list[Finding]]:
    """Receipts whose line the ledger holds, and what there is to say of all."""
    book = reading.book
    keys = book.keys or ([public_key] if public_key else [])
    held: list[Receipt] = []
    found: list[Finding] = []
    others = [r for r in receipts if r.site != book.site]
    for receipt in receipts:
        if receipt.site != book.site:
            continue
        if not receipt.genuine:
            text = f"a receipt of line {receipt.lines} was not signed by the key that it names"
            found.append(error("receipt-forged", text, "ask its holder for the original"))
        elif keys and receipt.public_key not in keys:
            text = f"a receipt of line {receipt.lines} in this site's name is by another key"
            found.append(error("receipt-foreign", f"{text}: {receipt.public_key[:12]}…"))
        else:
            finding = hold(reading, receipt.lines, receipt.head)
            if finding is None:
                held.append(receipt)
            else:
                found.append(finding)
    if others and book.lines:
        names = ", ".join(sorted({receipt.site for receipt in others}))
        if len(others) < len(receipts):  # a report.json has the receipts of all its sites
            found.append(note("receipts-of-others", f"passed over receipts of {names}"))
        else:
            text = f"the receipts are of {names}; this is the ledger of '{book.site}'"
            found.append(error("receipt-foreign", text, "give the ledger of the receipts' site"))
    return held, found


def hold(reading: Reading, lines: int, head: str) -> Finding | None:
    """Why a ledger lacks the line that a receipt names; None where it holds it."""
    book = reading.book
    if lines <= len(book.heads) and book.heads[lines - 1] == head:
        return None
    if any((line.receipt.lines, line.receipt.head) == (lines, head) for line in book.reconciled):
        text = f"a receipt names line {lines} ({head[:12]}…), which was lost and reconciled"
        return warning("receipt-reconciled", text)
    if lines <= len(book.heads):
        return error(
            "ledger-forked",
            f"line {lines} is another one than a receipt names ({head[:12]}…): the ledger was "
            "rewritten, or goes on from an older copy",
            "ask the site for the ledger that it signed the receipt for",
            line=lines,
        )
    if reading.broken is not None and lines <= len(reading.raws):
        text = f"a receipt names line {lines}, which stands below the broken one"
        return note("receipt-unread", text)
    return error(
        "ledger-cut",
        f"a receipt names line {lines} ({head[:12]}…), but the ledger ends at line "
        f"{len(book.heads)}: it was cut, or replaced by an older copy",
        "restore the newest copy; what is lost counts as spent (`fedward site reconcile`)",
        line=lines,
    )


def _policy(book: Book, policy: Policy | None) -> list[Finding]:
    if policy is None:
        return []
    if book.policy is None:
        return [error("policy-other", "the ledger records no policy; none was in force")]
    if book.policy.sha256 != policy.sha256:
        return [
            error(
                "policy-other",
                f"the policy in force is {book.policy.sha256[:12]}…, the one given is "
                f"{policy.sha256[:12]}…",
                "ask for the policy file that the daemon runs with",
            )
        ]
    return []

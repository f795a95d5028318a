"""Reading a ledger: one fold over its lines, by daemon and auditor alike.

What a daemon may not write, an auditor finds: both hold each line against the same state, so claim
and code cannot part. Every broken rule has a code of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import FedwardError, PrivacyError
from common.identity import verify
from common.privacy import decisions
from common.privacy.accounts import StudyAccount, total
from common.privacy.decisions import Verdict
from common.privacy.events import Population, ReleaseEvent, Unprotected
from common.privacy.lifetime import Commitment, Spending, spending
from common.privacy.lines import (
    START,
    Decision,
    Genesis,
    KeyRotated,
    Line,
    PatientErased,
    PolicyChanged,
    Reconciled,
    Refused,
    Released,
    Software,
    StudyApproved,
    StudyRevoked,
    Upgraded,
    chained,
    hash_of,
    parse,
    reserve_hash,
    split,
)
from common.privacy.pricing import epsilon_by_population
from common.privacy.receipts import Receipt

POPULATIONS: tuple[Population, ...] = ("train", "validation")


class LedgerError(PrivacyError):
    """A line that breaks a rule.

    Attributes:
        rule: Stable code of the rule.
        number: Of the line, from 1.
        message: What is wrong with it.
    """

    def __init__(self, rule: str, number: int, message: str, *, cure: str = "") -> None:
        self.rule, self.number, self.message = rule, number, message
        cure = cure or "restore the ledger from its backup; never edit it"
        super().__init__(f"line {number}: {message}", cure=cure)

    def at(self, path: Path) -> LedgerError:
        """The same error, naming the file."""
        named = LedgerError(self.rule, self.number, self.message, cure=self.cure)
        named.args = (f"{path}, {self.args[0]}",)
        return named


class Book:
    """The state after some lines.

    Attributes:
        site, entropy, virtual: Of the first line.
        keys: Public keys of the site, oldest first; the last one signs. Empty in schema 1.
        lines: All lines, oldest first.
        heads: SHA-256 of each line.
        studies: By study hash, in order of their approval.
        policy: The latest line about it, None before the first.
        anomalies: What is wrong without breaking the chain: `(rule, line, text)`.
        remarks: What a reader should know of: `(rule, line, text)`.
        approvals_hash: Chain of what the approvals set aside; see `lines.chained`.
    """

    def __init__(self) -> None:
        self.site, self.entropy, self.virtual = "", "os", False
        self.keys: list[str] = []
        self.lines: list[Line] = []
        self.heads: list[str] = []
        self.studies: dict[str, StudyAccount] = {}
        self.policy: PolicyChanged | None = None
        self.software: Software | None = None
        self.refusals: Counter[str] = Counter()
        self.erased: set[str] = set()
        self.reconciled: list[Reconciled] = []
        self.anomalies: list[tuple[str, int, str]] = []
        self.remarks: list[tuple[str, int, str]] = []
        self.approvals, self.approvals_hash = 0, START
        self.last_at = ""
        self._refused_on: dict[str, set[tuple[str, str]]] = {}
        self._digests: set[str] = set()
        self._decisions: set[str] = set()
        self._spendings: dict[Population, Spending] = {}
        self._committed: Counter[ReleaseEvent] = Counter()

    # -- state ------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """SHA-256 of the last line."""
        return self.heads[-1] if self.heads else START

    @property
    def ledger_id(self) -> str:
        """SHA-256 of the first line: which ledger this is."""
        return self.heads[0] if self.heads else START

    @property
    def public_key(self) -> str | None:
        """The key that signs now; None in schema 1."""
        return self.keys[-1] if self.keys else None

    @property
    def simulated(self) -> bool:
        """Whether randomness was seeded."""
        return self.entropy == "seeded"

    def refusals_on(self, day: str) -> set[tuple[str, str]]:
        """Request digest and code of what was refused on a day (YYYY-MM-DD)."""
        return self._refused_on.get(day, set())

    def released(self, study_hash: str, run: str | None = None) -> tuple[Released, ...]:
        """Charges of a study, oldest first, of one run or of all."""
        account = self.studies.get(study_hash)
        charges = account.released if account else []
        return tuple(c for c in charges if run is None or c.run == run)

    def training_rounds(self, since: datetime) -> int:
        """Training rounds of all studies that were charged at or after `since`."""
        count = 0
        for line in reversed(self.lines):
            if datetime.fromisoformat(line.at) < since:
                break
            if isinstance(line, Released) and line.event.population == "train":
                count += 1
        return count

    def events(
        self, population: Population | None = None, study_hash: str | None = None
    ) -> Counter[ReleaseEvent]:
        """How often each release was made, of one population or study or of all."""
        total: Counter[ReleaseEvent] = Counter()
        for hash_, account in self.studies.items():
            if study_hash in (None, hash_):
                for event, count in account.spent.items():
                    if population in (None, event.population):
                        total[event] += count
        return total

    def unprotected(self) -> set[Population]:
        """Populations of which anything was ever released without privacy."""
        return {e.population for e in self.events() if isinstance(e, Unprotected)}

    def epsilon(self, delta: float, study_hash: str | None = None) -> dict[str, float]:
        """Epsilon at `delta` by population; infinity after an unprotected release.

        Over one study this is its price. Over all studies (`study_hash=None`) it is information
        only where later studies were chosen in the light of earlier answers.
        """
        spent = epsilon_by_population(self.events(study_hash=study_hash), delta)
        return {"train": 0.0, "validation": 0.0, **spent}

    def lifetime(self, population: Population, more: Commitment | None = None) -> Spending | None:
        """What is committed of the population's lifetime cap, and would be with `more`; None
        without a cap."""
        if self.policy is None or self.policy.lifetime is None:
            return None
        if more is None and population in self._spendings:
            return self._spendings[population]
        cap = self.policy.lifetime.of(population)
        if cap.rule == "rdp":  # holds release by release, whatever study it belongs to
            committed = [Commitment(cap.delta, self._committed)]
        else:
            committed = [c for account in self.studies.values() for c in account.wholes]
        with_more = [*committed, more] if more else committed
        found = spending(with_more, population, cap, protected=self.policy.unprotected)
        if more is None:
            self._spendings[population] = found
        return found

    # -- receipts ---------------------------------------------------------------------------

    def holds(self, receipt: Receipt) -> bool:
        """Whether the receipt's line is in the ledger, or its loss was reconciled."""
        at = receipt.lines
        if at <= len(self.heads) and self.heads[at - 1] == receipt.head:
            return True
        return any(
            (line.receipt.lines, line.receipt.head) == (at, receipt.head)
            for line in self.reconciled
        )

    @property
    def epoch(self) -> int:
        """Above that of every receipt whose loss was reconciled."""
        return max((line.receipt.epoch + 1 for line in self.reconciled), default=0)

    @property
    def ancestors(self) -> tuple[tuple[int, str], ...]:
        """SHA-256 of some earlier lines, for a receipt: see `Receipt.ancestors`."""
        last = len(self.heads)
        steps = [1 << n for n in range(last.bit_length()) if 1 << n < last]
        numbers = {1, *(last - step for step in steps)} if last > 1 else set()
        return tuple((number, self.heads[number - 1]) for number in sorted(numbers))

    def fork(self, receipt: Receipt) -> int:
        """The last line of which it is known that both this ledger and that of the receipt have it;
        0 if there is none."""
        return max(
            (
                number
                for number, head in receipt.ancestors
                if 1 <= number <= len(self.heads) and self.heads[number - 1] == head
            ),
            default=0,
        )

    def prefix(self, lines: int) -> Book:
        """The state after the first lines of this ledger."""
        book = Book()
        for line, head in zip(self.lines[:lines], self.heads, strict=False):
            book._fold(line)
            book.lines.append(line)
            book.heads.append(head)
        return book

    # -- one more line ----------------------------------------------------------------------

    def take(self, raw: bytes) -> Line:
        """Checks a whole line (without its end of line) and takes it in; errors as in `check`."""
        line = self.check(raw)
        self.admit(line, raw)
        return line

    def check(self, raw: bytes) -> Line:
        """Holds a line against all before it.

        Raises:
            LedgerError: The line breaks a rule.
        """
        number = len(self.lines) + 1
        body, signature = split(raw)
        try:
            line = parse(body)
        except PrivacyError as error:
            raise LedgerError("line-unreadable", number, f"no ledger line: {error}") from None
        if isinstance(line, Genesis) != (number == 1):
            raise LedgerError("genesis-misplaced", number, "a ledger has one genesis line: line 1")
        if line.previous != self.head:
            raise LedgerError(
                "chain-broken",
                number,
                f"does not follow from line {number - 1}: a line was changed, removed, inserted or "
                "moved",
            )
        self._signed(number, line, body, signature)
        self._allowed(number, line)
        return line

    def admit(self, line: Line, raw: bytes) -> None:
        """Takes a checked line in."""
        number = len(self.lines) + 1
        self._fold(line)
        self.lines.append(line)
        self.heads.append(hash_of(raw))
        if line.at < self.last_at:
            self.anomalies.append(
                ("clock-back", number, f"dated {line.at}, before the line above ({self.last_at})")
            )
        self.last_at = max(self.last_at, line.at)

    def _signed(self, number: int, line: Line, body: bytes, signature: bytes | None) -> None:
        key = self.public_key
        if isinstance(line, Genesis | Upgraded):
            key = line.public_key
            if isinstance(line, Genesis) and (line.ledger_schema == 1) != (key is None):
                raise LedgerError("line-unreadable", number, "schema 2 names the site's key")
            if isinstance(line, Upgraded) and self.keys:
                raise LedgerError("key-changed", number, "only `key-rotated` changes the key")
        if key is None:
            if signature is not None:
                raise LedgerError("signature-invalid", number, "signed, in a ledger of schema 1")
            return
        if signature is None:
            raise LedgerError("signature-missing", number, "is not signed")
        if not verify(key, body, signature):
            raise LedgerError(
                "signature-invalid",
                number,
                "the signature is not by the site's key: the line was changed after it was signed, "
                "or another key signed it",
            )
        if isinstance(line, KeyRotated) and not verify(
            line.public_key, rotation(self.head, self.site), bytes.fromhex(line.proof)
        ):
            raise LedgerError("rotation-unproven", number, "the new key did not sign for itself")

    def _allowed(self, number: int, line: Line) -> None:
        """What a daemon would not have written."""
        if isinstance(line, StudyApproved):
            self._may_approve(number, line)
        elif isinstance(line, StudyRevoked):
            if line.study_hash not in self.studies:
                raise LedgerError("revocation-unfounded", number, "revokes what was not approved")
            self._decided(number, line, line.decision, "revoke")
        elif isinstance(line, Released):
            self._may_release(number, line)
        elif isinstance(line, PolicyChanged):
            self._may_change(number, line)
        elif isinstance(line, Reconciled):
            self._may_reconcile(number, line)

    def _may_reconcile(self, number: int, line: Reconciled) -> None:
        receipt = line.receipt
        if receipt.site != self.site or receipt.public_key not in self.keys or not receipt.genuine:
            raise LedgerError("loss-unproven", number, "its receipt is not by a key of this site")
        if self.holds(receipt):
            raise LedgerError("loss-unproven", number, "its receipt names no lost line")
        common = self.prefix(self.fork(receipt))
        chain, count = common.approvals_hash, common.approvals + len(line.lost)
        for lost in line.lost:
            chain = chained(chain, lost.reserve_hash)
        if (count, chain) != (receipt.approvals, receipt.approvals_hash):
            raise LedgerError(
                "loss-understated",
                number,
                f"after line {len(common.lines)}, the last in common, the receipt counts "
                f"{receipt.approvals - common.approvals} approvals; not exactly these are given",
                cure="give each lost approval with --study, in its order, as STUDY or STUDY:RUNS; "
                "their coordinators have them",
            )

    def _may_change(self, number: int, line: PolicyChanged) -> None:
        """A filter holds at an order that was fixed before anything was spent under it."""
        before = self.policy.lifetime if self.policy else None
        if before is None or not self.studies:
            return
        if line.lifetime is None:
            raise LedgerError("lifetime-rule-changed", number, "takes the lifetime caps away")
        for population in POPULATIONS:
            was, is_now = before.of(population), line.lifetime.of(population)
            if (was.rule, was.order) != (is_now.rule, is_now.order):
                raise LedgerError(
                    "lifetime-rule-changed",
                    number,
                    f"changes rule or order of the {population} cap, which are fixed once a study "
                    "was approved",
                    cure=f'write rule = "{was.rule}" and order = {was.order} into '
                    f"[lifetime.{population}]; epsilon and delta may change",
                )

    def _may_approve(self, number: int, line: StudyApproved) -> None:
        if line.decision is not None:
            reserve = reserve_hash(line.study_hash, line.delta, line.runs, line.reserved)
            self._decided(
                number, line, line.decision, "approve", reserve=reserve, expires=line.expires
            )
        elif self.keys and not self.virtual:
            raise LedgerError("approval-unsigned", number, "a study approved by nobody")
        if line.expires is not None and line.expires <= line.at:
            raise LedgerError("approval-expired", number, "an approval that has expired already")
        account = self.studies.get(line.study_hash, StudyAccount("", "", line.delta))
        if account.delta != line.delta:
            raise LedgerError("approval-changed", number, "the study's delta is another one now")
        if not account.closed and line.runs < account.runs:
            raise LedgerError("approval-changed", number, "fewer runs than are approved already")
        more = Commitment(line.delta, account.more(total(line.reserved)))
        for population in POPULATIONS:
            after = self.lifetime(population, more)
            if after is not None and not after.within:
                raise LedgerError(
                    "lifetime-passed",
                    number,
                    f"study '{line.name}' takes the {population} patients to epsilon "
                    f"{after.epsilon:.3f} of {after.cap.epsilon:g}",
                )

    def _decided(
        self,
        number: int,
        line: StudyApproved | StudyRevoked,
        decision: Decision,
        verdict: Verdict,
        **terms: Any,
    ) -> None:
        if not decisions.stands(decision, verdict, self.ledger_id, line.study_hash, **terms):
            raise LedgerError(
                "approval-forged", number, f"'{decision.approver}' did not sign this decision"
            )
        if decision.signature in self._decisions:
            raise LedgerError(
                "decision-replayed", number, f"'{decision.approver}' signed this decision only once"
            )
        account = self.studies.get(line.study_hash)
        if account is not None and decision.at <= account.decided_at:
            raise LedgerError(
                "decision-stale", number, "a later decision about this study stands in the ledger"
            )
        known = self.policy.approvers if self.policy else {}
        if known.get(decision.approver) != decision.public_key:
            raise LedgerError(
                "approver-unknown",
                number,
                f"the policy then in force does not let '{decision.approver}' decide with this key",
            )

    def _may_release(self, number: int, line: Released) -> None:
        account = self.studies.get(line.study_hash)
        allowed = account.allowed[line.event] if account else 0
        if account is None or not allowed:
            raise LedgerError("release-unreserved", number, "a release that no approval set aside")
        if account.closed:
            raise LedgerError("release-after-end", number, f"the study was {account.closed}")
        if account.expires and datetime.fromisoformat(line.at) >= account.expires:
            raise LedgerError("release-after-end", number, "the study's approval had expired")
        if account.spent[line.event] >= allowed:
            raise LedgerError("budget-passed", number, "more releases than the approval set aside")
        lifetime = self.lifetime(line.event.population)
        if lifetime is not None and not lifetime.within:
            raise LedgerError("lifetime-passed", number, "a release beyond the lifetime cap")
        if line.request_digest in self._digests:
            raise LedgerError("request-charged-twice", number, "one request charged twice")

    def _fold(self, line: Line) -> None:
        if isinstance(line, Genesis):
            self.site, self.entropy, self.virtual = line.site, line.entropy, line.virtual
            self.keys = [line.public_key] if line.public_key else []
        elif isinstance(line, Upgraded | KeyRotated):
            self.keys.append(line.public_key)
            if isinstance(line, Upgraded):
                self._close("undecided")
        elif isinstance(line, Software):
            self.software = line
        elif isinstance(line, PolicyChanged):
            self._remark_raised(line)
            self.policy = line
            self._spendings.clear()
        elif isinstance(line, StudyApproved):
            account = self.studies.setdefault(
                line.study_hash, StudyAccount(line.study_hash, line.name, line.delta)
            )
            self._committed.update(account.approve(line))
            self._spendings.clear()
            self.approvals += 1
            self.approvals_hash = chained(
                self.approvals_hash,
                reserve_hash(line.study_hash, line.delta, line.runs, line.reserved),
            )
            if line.decision:
                account.decisions.append(line.decision)
                self._decisions.add(line.decision.signature)
        elif isinstance(line, StudyRevoked):
            account = self.studies[line.study_hash]
            account.decisions.append(line.decision)
            self._decisions.add(line.decision.signature)
            self._close("revoked", account)
        elif isinstance(line, Released):
            account = self.studies[line.study_hash]
            account.released.append(line)
            account.spent[line.event] += 1
            self._digests.add(line.request_digest)
        elif isinstance(line, Refused):
            said = (line.request_digest, line.code)
            self._refused_on.setdefault(line.at[:10], set()).add(said)
            self.refusals[line.code] += 1
        elif isinstance(line, PatientErased):
            self.erased.add(line.commitment)
        elif isinstance(line, Reconciled):
            self._reconcile(line)

    def _reconcile(self, line: Reconciled) -> None:
        """Counts what the lost lines may have released, beside what this ledger counts."""
        common = self.prefix(self.fork(line.receipt))
        assumed = [(a.study_hash, a.name, a.delta, a.left) for a in common.studies.values()]
        assumed += [(a.study_hash, a.name, a.delta, total(a.reserved)) for a in line.lost]
        self._close("reconciled")
        for study_hash, name, delta, events in assumed:
            account = self.studies.setdefault(study_hash, StudyAccount(study_hash, name, delta))
            account.spent = account.spent + events
            account.closed = account.closed or "reconciled"
            self._committed.update(events)
        self.reconciled.append(line)
        # A loss that contains this line would lose what it counts: part of the chain, it cannot be
        # left out, and as it is no approval, such a loss cannot be reconciled, only restored.
        self.approvals += 1
        self.approvals_hash = chained(self.approvals_hash, line.receipt.head)
        self._spendings.clear()

    def _close(self, why: str, *accounts: StudyAccount) -> None:
        """Ends studies, by default all; what they had left is committed no longer."""
        for account in accounts or tuple(self.studies.values()):
            self._committed.subtract(account.left)
            account.closed = account.closed or why
        self._spendings.clear()

    def _remark_raised(self, line: PolicyChanged) -> None:
        before = self.policy.lifetime if self.policy else None
        if before is None or line.lifetime is None or not self.studies:
            return
        for population in POPULATIONS:
            was, is_now = before.of(population), line.lifetime.of(population)
            if (is_now.epsilon, is_now.delta) > (was.epsilon, was.delta):
                text = (
                    f"the {population} cap was raised from ε {was.epsilon:g} to {is_now.epsilon:g}"
                )
                self.remarks.append(("lifetime-raised", len(self.lines) + 1, text))

    # -- reading a file ---------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Book:
        """The whole of a ledger file, read only.

        Raises:
            LedgerError: The first line that breaks a rule, or an unfinished last one.
            FedwardError: No file there.
        """
        book = cls()
        try:
            for raw in raw_lines(path):
                book.take(raw)
        except LedgerError as error:
            raise error.at(path) from None
        return book


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger file without their ends.

    Raises:
        LedgerError: `line-unfinished`, after the lines before it.
        FedwardError: The file cannot be read, or is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FedwardError(
            f"cannot read the ledger {path} ({error.strerror})",
            cure="give the file ledger.jsonl of a site's state folder",
        ) from None
    if not data:
        raise FedwardError(f"the ledger {path} is empty", cure="restore it from its backup")
    *whole, tail = data.split(b"\n")
    yield from whole
    if tail:
        raise LedgerError(
            "line-unfinished",
            len(whole) + 1,
            f"unfinished ({len(tail)} bytes): torn by a power cut or full disk, or changed by hand",
            cure="start the site's daemon, which sets a torn line aside and records it; "
            "it refuses if the line was whole before",
        )


def rotation(head: str, site: str) -> bytes:
    """What a new key signs to prove itself."""
    return f"fedward key rotation\0{site}\0{head}".encode()

"""The privacy ledger of one site: what was released about whom, written before it happens.

Lines (`lines`) are chained by SHA-256 and signed by the site. They describe events, never epsilon:
prices are computed from them (`pricing`) and can be computed again by anyone.

Order of a charge: exclusive file lock; read what others appended; check policy, lifetime and
reserve; append; fsync; unlock. Only then may the caller act. Two processes on one file therefore
never spend one reserve twice, and a crash after the charge leaves it spent. Nothing is ever
refunded. What becomes of an unfinished line, `chain` says.

A valid chain proves a *prefix*. Receipts, which others keep, prove that nothing was cut off: a
ledger that lacks a receipt's line refuses every release until it is reconciled (`reconcile`), and
then counts every reserve as spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.errors import PrivacyError, Refusal
from common.files import sync_folder
from common.identity import Identity
from common.messages import Request
from common.privacy.accounts import StudyAccount, reserves, total
from common.privacy.book import POPULATIONS, rotation
from common.privacy.chain import Chain, now
from common.privacy.events import ReleaseEvent
from common.privacy.fields import is_hash
from common.privacy.lifetime import Commitment
from common.privacy.lines import (
    Decision,
    Genesis,
    KeyRotated,
    Lost,
    PatientErased,
    PolicyChanged,
    ReceiptGiven,
    Reconciled,
    Refused,
    Released,
    Software,
    StudyApproved,
    StudyRevoked,
    Upgraded,
    chained,
)
from common.privacy.policy import Policy
from common.privacy.receipts import Receipt
from common.study import Study

CLOCK_TOLERANCE = timedelta(minutes=2)
"""By which the clock may stand behind the last line; a new line then takes that one's time."""

_REFUSALS_PER_DAY = 1000  # recorded; a coordinator can invent more, and must not fill the disk


class Ledger(Chain):
    """A site's ledger, to be written. To read one, `Book.read` is enough."""

    def __init__(self, path: Path, identity: Identity) -> None:
        """Use `open`, which creates and checks."""
        super().__init__(path, identity)
        self._policy = ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        site: str,
        identity: Identity,
        *,
        simulated: bool = False,
        virtual: bool = False,
    ) -> Ledger:
        """Reads and verifies the ledger, or begins one.

        Args:
            identity: The site's; signs every line.
            simulated: Randomness of the releases is seeded (tests). An existing ledger keeps its
                mark; one begun with the operating system's entropy refuses seeded releases.
            virtual: A virtual hospital of a simulation; recorded when the ledger begins.

        Raises:
            PrivacyError: The chain is broken, the ledger is another site's or signed with another
                key, or it would have to record seeded releases as private ones.
        """
        ledger = cls(Path(path), identity)
        ledger.path.parent.mkdir(parents=True, exist_ok=True)
        with ledger._locked() as file:
            book = ledger.book
            if not book.lines:
                ledger._append(
                    file,
                    Genesis,
                    site=site,
                    entropy="seeded" if simulated else "os",
                    virtual=virtual,
                    public_key=identity.public,
                )
                sync_folder(ledger.path.parent)
            if book.site != site:
                raise PrivacyError(
                    f"{path} is the ledger of site '{book.site}', not '{site}'",
                    cure="give each site its own state folder",
                )
            if not book.keys:
                ledger._append(file, Upgraded, public_key=identity.public)
            if book.public_key != identity.public:
                raise PrivacyError(
                    f"{path} is signed with key {book.public_key}, but the site's key is "
                    f"{identity.public}",
                    cure="restore site.key and ledger.jsonl from the same backup; to change the "
                    "key, use `fedward site rotate-key`",
                )
            if simulated and not book.simulated:
                raise PrivacyError(
                    f"{path} records releases under real randomness; seeded ones cannot join it",
                    cure="run simulations with seeded entropy on a state folder of their own",
                )
        return ledger

    # -- persons and policy -------------------------------------------------------------------

    def settle_software(self, version: str, code_hash: str) -> None:
        """Records the software where it is not that of the latest line about it."""
        with self._locked() as file:
            before = self.book.software
            if before is None or (before.version, before.code_hash) != (version, code_hash):
                self._append(file, Software, version=version, code_hash=code_hash)

    def settle_policy(self, policy: Policy) -> None:
        """Records the policy where it is not the one in force, and acts under it from here on."""
        with self._locked() as file:
            self._policy = policy.sha256
            if self.book.policy is None or self.book.policy.sha256 != policy.sha256:
                self._append(
                    file,
                    PolicyChanged,
                    sha256=policy.sha256,
                    lifetime=policy.lifetime,
                    unprotected=policy.without_privacy is not None,
                    approvers=policy.approvers,
                )

    def approve(
        self,
        study: Study,
        *,
        runs: int = 1,
        expires: str | None = None,
        decision: Decision | None = None,
    ) -> None:
        """Sets aside everything that `study` may release here; does nothing when it already is.

        Args:
            runs: How often the hospital lets the study run. The reserve belongs to the study's
                hash: a run beyond `runs` finds only what earlier ones left of it.
            expires: From when on nothing more is released, ISO 8601 in UTC.
            decision: Of a person who may approve; None only for virtual hospitals. Reopens a study
                that was revoked, with a new reserve.

        Raises:
            Refusal: `lifetime-exceeded`, `ledger-behind`, `clock-behind`, `policy-changed`.
        """
        site = self.book.site
        with self._locked() as file:
            account = self.book.studies.get(study.hash)
            if account and decision is None and (account.closed or account.runs >= runs):
                return
            self._check()
            wanted = planned(study, site, runs)
            account = account or StudyAccount(study.hash, study.name, study.privacy.delta)
            if not account.closed and runs < account.runs:
                raise PrivacyError(
                    f"study '{study.name}' is approved for {account.runs} runs already",
                    cure="revoke it first",
                )
            self._afford(study.name, Commitment(study.privacy.delta, account.more(wanted)))
            self._append(
                file,
                StudyApproved,
                study_hash=study.hash,
                name=study.name,
                delta=study.privacy.delta,
                runs=runs,
                reserved=reserves(wanted),
                patients_declared=study.federation.sites[site].patients_declared,
                expires=expires,
                decision=decision,
            )

    def revoke(self, study_hash: str, decision: Decision) -> None:
        """Ends a study; under an `rdp` cap, what it did not release is free again.

        Raises:
            Refusal: `study-unapproved`.
        """
        with self._locked() as file:
            account = self.book.studies.get(study_hash)
            if account is None or account.closed:
                raise Refusal("study-unapproved", f"study {study_hash} is not approved here")
            self._append(file, StudyRevoked, study_hash=study_hash, decision=decision)

    def erase(self, commitment: str) -> None:
        """Records, once, that a patient's data were removed."""
        with self._locked() as file:
            if commitment not in self.book.erased:
                self._append(file, PatientErased, commitment=commitment)

    def rotate(self, fresh: Identity) -> None:
        """Hands signing over to a new key; the old one signs that line."""
        with self._locked() as file:
            proof = fresh.sign(rotation(self.book.head, self.book.site)).hex()
            self._append(file, KeyRotated, public_key=fresh.public, proof=proof)
            self._identity = fresh
            self._keep_head()

    # -- charging -----------------------------------------------------------------------------

    def charge(
        self, study: Study, site: str, request: Request, *, rounds_per_day: int | None = None
    ) -> Released:
        """Spends one release of the study's reserve; durable when this returns.

        A request is charged once. Whoever holds the stored answer returns that; where it was lost
        (a crash between charge and answer), a retry with a higher `attempt` is another request and
        another charge: the same noise cannot be made again, and fresh noise is not free.

        Raises:
            Refusal: `study-unapproved`, `study-revoked`, `approval-expired`; `budget-exhausted`:
                the reserve of this kind is spent; `lifetime-exceeded`: a cap was lowered below what
                is set aside; `rounds-per-day`; `answer-lost`: this very request was charged before;
                `request-changed`: the round was charged for another request and `attempt` is not
                higher than then; `ledger-behind`, `clock-behind`, `policy-changed`.
        """
        if request.kind not in ("train", "evaluate") or site != self.book.site:
            raise PrivacyError(f"a '{request.kind}' request to site '{site}' is no release here")
        training = request.kind == "train"
        event = study.round_event(site) if training else study.evaluation_event()
        with self._locked() as file:
            self._check()
            account = self._open_account(study)
            _unspent(account, event, request)
            allowed = account.allowed[event]
            if account.spent[event] >= allowed:
                raise Refusal(
                    "budget-exhausted",
                    f"study '{study.name}' has spent all {allowed} releases of kind "
                    f"'{request.kind}' reserved at site '{site}'",
                    cure="a study that needs more is a new study, with its own price",
                )
            self._afford(study.name)
            if training and rounds_per_day is not None:
                self._not_too_many(rounds_per_day)
            return self._append(
                file,
                Released,
                study_hash=study.hash,
                run=request.run,
                round=request.round,
                attempt=request.attempt,
                request_digest=request.digest,
                event=event,
            )

    def check_open(self, study: Study) -> None:
        """Whether the study may be charged at all; refusals as of `charge`."""
        with self._locked():
            self._check()
            self._open_account(study)

    def refuse(self, request: Request, code: str) -> None:
        """Records, once, that a signed request was declined; at most 1,000 in a day."""
        with self._locked() as file:
            some = self.book.refusals_on(self._time()[:10])
            if len(some) < _REFUSALS_PER_DAY and (request.digest, code) not in some:
                self._append(
                    file,
                    Refused,
                    study_hash=request.study_hash if is_hash(request.study_hash) else "",
                    request=request.kind,
                    request_digest=request.digest,
                    code=code,
                )

    # -- receipts -----------------------------------------------------------------------------

    def receipt(self) -> Receipt:
        """The ledger's present head, signed."""
        with self._locked():
            return self._receipt()

    def give_receipt(self, holder: str) -> Receipt:
        """The present head for someone outside to keep; the ledger records who."""
        with self._locked() as file:
            if self.behind is not None:
                raise PrivacyError(
                    "this ledger lacks lines: a receipt of it would stand against the whole one",
                    cure="restore the newest ledger.jsonl, or reconcile first",
                )
            receipt = self._receipt()
            self._append(file, ReceiptGiven, holder=holder, lines=receipt.lines)
            return receipt

    def compare(self, receipt: Receipt) -> None:
        """Holds a receipt that someone else kept against this ledger; see `behind`.

        Raises:
            PrivacyError: The receipt is not this site's.
        """
        with self._locked():
            if receipt.site != self.book.site or receipt.public_key not in self.book.keys:
                raise PrivacyError(
                    f"the receipt is of site '{receipt.site}' with key {receipt.public_key}, which "
                    f"is not a key of site '{self.book.site}'"
                )
            if not receipt.genuine:
                raise PrivacyError("the receipt's signature is not by the key that it names")
            if not self.book.holds(receipt):
                known = self._kept_receipts()
                self._hold(receipt)  # first, whether or not it can be kept
                if receipt not in known:
                    self._keep_receipt(receipt)

    def reconcile(self, lost: Sequence[tuple[Study, int]] = ()) -> Reconciled:
        """Goes on from a ledger that lost lines. All that they may have released is counted, and
        every study is closed: what was left is lost, nothing is under-reported.

        Args:
            lost: Resolved studies that the lost lines approved, in order, with their number of
                runs; those after the last line in common, where that is earlier.

        Raises:
            PrivacyError: Nothing is lost, or not exactly the lost approvals are given.
        """
        site = self.book.site
        for study, _ in lost:
            if site not in study.federation.sites:
                raise PrivacyError(f"study '{study.name}' does not name site '{site}'")
        with self._locked() as file:
            if self.behind is None:
                raise PrivacyError("this ledger lacks no line that a receipt names")
            given = [
                _lost(s.hash, s.name, s.privacy.delta, runs, planned(s, site, runs))
                for s, runs in lost
            ]
            line = self._append(
                file,
                Reconciled,
                receipt=self.behind,
                lost=(*self._shared(self.behind, given), *given),
            )
            self.behind = None
            for kept in self._kept_receipts():
                self._hold(kept)
            self._keep_head()
            return line

    def _shared(self, receipt: Receipt, given: Sequence[Lost]) -> tuple[Lost, ...]:
        """Approvals of this ledger's own, after the last line that is known to be common, which the
        receipt's ledger had too: those with which the given ones make up its chain."""
        common = self.book.prefix(self.book.fork(receipt))
        after = tuple(
            _lost(line.study_hash, line.name, line.delta, line.runs, total(line.reserved))
            for line in self.book.lines[len(common.lines) :]
            if isinstance(line, StudyApproved)
        )
        for count in range(len(after) + 1):
            chain = common.approvals_hash
            for approval in (*after[:count], *given):
                chain = chained(chain, approval.reserve_hash)
            if chain == receipt.approvals_hash:
                return after[:count]
        return ()

    def refresh(self) -> None:
        """Reads what other processes appended."""
        with self._locked():
            pass

    # -- checks -------------------------------------------------------------------------------

    def _check(self) -> None:
        """What every approval and release asks first."""
        book = self.book
        if self.behind is not None:
            raise Refusal(
                "ledger-behind",
                f"a receipt names line {self.behind.lines} ({self.behind.head[:12]}…), which this "
                f"ledger of {len(book.lines)} lines does not hold: charges are missing",
                cure="restore the newest ledger.jsonl; if there is none, `fedward site reconcile`",
            )
        if datetime.now(UTC) < datetime.fromisoformat(book.last_at) - CLOCK_TOLERANCE:
            raise Refusal(
                "clock-behind",
                f"the clock says {now()}, but the ledger's last line is of {book.last_at}",
                cure="set the clock right",
            )
        if book.public_key != self._identity.public:
            raise Refusal(
                "key-rotated",
                "the site's key was changed since this process read it",
                cure="restart the site's daemon",
            )
        if self._policy and book.policy and book.policy.sha256 != self._policy:
            raise Refusal(
                "policy-changed",
                "the policy was changed since this process read it",
                cure="restart the site's daemon",
            )

    def _open_account(self, study: Study) -> StudyAccount:
        account = self.book.studies.get(study.hash)
        if account is None:
            raise Refusal("study-unapproved", f"study {study.hash} was never approved here")
        if account.closed:
            raise Refusal("study-revoked", f"study {study.hash} was {account.closed} here")
        if account.expires and datetime.now(UTC) >= account.expires:
            raise Refusal(
                "approval-expired",
                f"the approval of study {study.hash} expired on {account.expires:%Y-%m-%d}",
                cure="review and approve it again",
            )
        return account

    def _afford(self, name: str, more: Commitment | None = None) -> None:
        for population in POPULATIONS:
            after = self.book.lifetime(population, more)
            if after is not None and not after.within:
                raise Refusal(
                    "lifetime-exceeded",
                    f"with study '{name}' the {population} patients of site '{self.book.site}' are "
                    f"at epsilon {after.epsilon:.3f}, delta {after.delta:g}; the policy's lifetime "
                    f"cap is {after.cap.epsilon:g} at {after.cap.delta:g}",
                    cure="revoke a study that is not needed, or ask for a smaller one",
                )

    def _not_too_many(self, rounds_per_day: int) -> None:
        if self.book.training_rounds(datetime.now(UTC) - timedelta(days=1)) >= rounds_per_day:
            raise Refusal(
                "rounds-per-day",
                f"{rounds_per_day} training rounds were charged in the last 24 hours",
                cure="wait, or raise policy.rounds_per_day",
            )


def planned(study: Study, site: str, runs: int) -> Counter[ReleaseEvent]:
    """All that `runs` runs of a study may release at a site, spare rounds included."""
    once = Counter(study.reserved_events(site))
    return Counter({event: count * runs for event, count in once.items()})


def _lost(
    study_hash: str, name: str, delta: float, runs: int, reserved: Counter[ReleaseEvent]
) -> Lost:
    return Lost(
        study_hash=study_hash, name=name, delta=delta, runs=runs, reserved=reserves(reserved)
    )


def _unspent(account: StudyAccount, event: ReleaseEvent, request: Request) -> None:
    """Makes sure that neither the request nor its round was charged before."""
    spent = [line for line in account.released if line.event == event]
    if any(line.request_digest == request.digest for line in spent):
        raise Refusal(
            "answer-lost",
            f"round {request.round} of run {request.run} was charged, but its answer is not kept",
            cure="retry with a higher attempt: a new charge",
        )
    for line in spent:
        same_round = (line.run, line.round) == (request.run, request.round)
        if same_round and request.attempt <= line.attempt:
            raise Refusal(
                "request-changed",
                f"round {request.round} of run {request.run} was charged for another request "
                f"(attempt {line.attempt})",
                cure="retry a lost round with a higher attempt",
            )

"""Rules 7 and 8 at the ledger: nothing without a reserve, nothing past a cap, nothing unseen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError, Refusal
from common.identity import Identity
from common.messages import Request
from common.privacy import chain
from common.privacy.accounts import reserves
from common.privacy.book import Book, LedgerError
from common.privacy.decisions import decide
from common.privacy.ledger import Ledger, planned
from common.privacy.lifetime import Cap, Lifetime
from common.privacy.lines import (
    Decision,
    KeyRotated,
    Reconciled,
    Released,
    StudyApproved,
    StudyRevoked,
    body_of,
    reserve_hash,
    signed,
)
from common.privacy.policy import SENTENCE, Policy
from common.privacy.receipts import Receipt
from common.study import Study, resolve

DELTA = 1e-5


def make_study(name: str = "small", *, epsilon: float = 2.0, private: bool = True) -> Study:
    return resolve(
        Study.model_validate(
            {
                "name": name,
                "sources": {"table": {"modality": "table", "encoder": "demographics"}},
                "tasks": {"death": {}},
                "privacy": {"epsilon": epsilon, "spare_rounds": 0.5},
                "training": {"steps_per_round": 2},
                "federation": {"rounds": 2, "sites": {"a": {"patients_declared": 50}}},
            }
        ),
        private=private,
    )


STUDY = make_study()


class Site:
    """A real hospital's ledger, with an officer who approves."""

    def __init__(self, folder: Path, *, cap: float = 20.0, **policy: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "ledger.jsonl"
        self.key = Identity.open(folder / "site.key")
        self.officer = Identity.open(folder / "officer.key")
        limit = Cap(epsilon=cap, delta=DELTA)
        rules = {
            "approvers": {"officer": self.officer.public},
            "lifetime": Lifetime(train=limit, validation=limit),
            **policy,
        }
        self.policy = Policy(**rules)
        self.ledger = self.open()

    def open(self) -> Ledger:
        ledger = Ledger.open(self.path, "a", self.key)
        ledger.settle_policy(self.policy)
        return ledger

    def approve(self, study: Study = STUDY, *, runs: int = 1, days: float = 30) -> None:
        expires = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="milliseconds")
        decision = self.decide("approve", study, runs=runs, expires=expires)
        self.ledger.approve(study, runs=runs, expires=expires, decision=decision)

    def revoke(self, study: Study = STUDY) -> None:
        self.ledger.revoke(study.hash, self.decide("revoke", study))

    def decide(
        self, verdict: Any, study: Study = STUDY, key: Identity | None = None, **terms: Any
    ) -> Decision:
        ledger = self.ledger.book.ledger_id
        if runs := terms.pop("runs", 0):
            terms["reserve"] = reserve_hash(
                study.hash, study.privacy.delta, runs, reserves(planned(study, "a", runs))
            )
        return decide(key or self.officer, "officer", verdict, ledger, study.hash, **terms)

    def charge(self, round_: int = 1, study: Study = STUDY, kind: Any = "train") -> Released:
        request = Request(kind=kind, run="run", site="a", study_hash=study.hash, round=round_)
        return self.ledger.charge(study, "a", request)

    def forge(self, kind: Any, *, key: Identity | None = None, **fields: Any) -> None:
        """Appends a line that only someone with the site's key could sign, past every check."""
        book = Book.read(self.path)
        line = kind(**{"previous": book.head, "at": book.last_at, **fields})
        body = body_of(line)
        with self.path.open("ab") as file:
            file.write(signed(body, (key or self.key).sign(body)) + b"\n")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "a")


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as refusal:
        act()
    return refusal.value.code


# -- who decides ------------------------------------------------------------------------------


def test_nothing_is_released_before_a_person_approved(site: Site) -> None:
    assert code_of(site.charge) == "study-unapproved"
    with pytest.raises(LedgerError, match="approved by nobody"):
        site.ledger.approve(STUDY)
    stranger = Identity.open(site.path.with_name("stranger.key"))
    decision = site.decide("approve", key=stranger, runs=1)
    with pytest.raises(LedgerError, match="does not let 'officer' decide with this key"):
        site.ledger.approve(STUDY, decision=decision)
    other = site.decide("approve", runs=9)  # another reserve than that of one run
    with pytest.raises(LedgerError, match="did not sign this decision"):
        site.ledger.approve(STUDY, decision=other)
    assert not Book.read(site.path).studies, "what is refused is not written"
    site.approve()
    assert site.charge().event == STUDY.round_event("a")


def test_a_revoked_study_releases_nothing_more_and_frees_its_reserve(tmp_path: Path) -> None:
    site = Site(tmp_path, cap=4.0)
    site.approve()
    site.charge(1)
    another = make_study("another")
    assert code_of(lambda: site.approve(another)) == "lifetime-exceeded"
    site.revoke()
    assert code_of(lambda: site.charge(2)) == "study-revoked"
    before = site.ledger.book.lifetime("train")
    assert before is not None
    assert 0 < before.epsilon < 4, "what was released stays spent"
    site.approve(another)
    assert code_of(lambda: site.revoke(make_study("unknown"))) == "study-unapproved"


def test_a_decision_serves_once_and_in_no_other_ledger(site: Site, tmp_path: Path) -> None:
    decision = site.decide("approve", runs=1)
    site.ledger.approve(STUDY, decision=decision)
    site.revoke()
    with pytest.raises(LedgerError, match="signed this decision only once"):
        site.ledger.approve(STUDY, decision=decision)
    other = Site(tmp_path / "b")
    other.policy = site.policy
    other.ledger = other.open()
    with pytest.raises(LedgerError, match="did not sign this decision"):
        other.ledger.approve(STUDY, decision=site.decide("approve", runs=1))


def test_an_overtaken_decision_and_an_expired_one_are_refused(site: Site) -> None:
    stale = site.decide("approve", runs=1)
    time.sleep(0.002)
    site.approve()
    site.revoke()
    with pytest.raises(LedgerError) as found:
        site.ledger.approve(STUDY, decision=stale)
    assert found.value.rule == "decision-stale"
    past = "2020-01-01T00:00:00.000+00:00"
    late = site.decide("approve", OTHER, runs=1, expires=past)
    with pytest.raises(LedgerError, match="has expired already"):
        site.ledger.approve(OTHER, expires=past, decision=late)


def test_what_was_approved_before_lines_were_signed_needs_a_person_again(tmp_path: Path) -> None:
    """Anybody can write a ledger of schema 1; nobody's approval stands in it."""
    folder = tmp_path / "a"
    folder.mkdir()
    golden = Path(__file__).parent.parent / "common" / "ledgers" / "schema1.jsonl"
    (folder / "ledger.jsonl").write_bytes(golden.read_bytes())
    site = Site(folder, cap=1000.0, without_privacy=SENTENCE)
    accounts = site.ledger.book.studies.values()
    assert {account.closed for account in accounts} == {"undecided"}
    assert site.ledger.book.epsilon(DELTA)["train"] > 7, "what was spent stays spent"


def test_under_the_sum_a_revoked_study_stays_counted_whole(tmp_path: Path) -> None:
    """When it stopped may depend on what it said: PLD of its steps so far is no price."""
    cap = Cap(epsilon=4.0, delta=2 * DELTA, rule="sum")
    site = Site(tmp_path, lifetime=Lifetime(train=cap, validation=cap))
    site.approve()
    site.charge(1)
    before = site.ledger.book.lifetime("train")
    site.revoke()
    assert site.ledger.book.lifetime("train") == before
    site.approve(OTHER)
    with pytest.raises(Refusal, match="delta 3e-05"):
        site.approve(make_study("third", epsilon=0.1))


def test_an_expired_approval_releases_nothing_more(site: Site) -> None:
    site.approve(days=1 / 86400 / 20)
    time.sleep(0.06)
    assert code_of(site.charge) == "approval-expired"
    site.approve(days=1)
    site.charge()


# -- what may be spent ------------------------------------------------------------------------


def test_of_eight_concurrent_studies_with_budget_for_one_exactly_one_proceeds(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, cap=4.0)
    studies = [make_study(f"study-{number}") for number in range(8)]
    program = (
        "import sys, json\n"
        "from common.privacy.ledger import Ledger; from common.study import Study\n"
        "from common.privacy.lines import Decision; from common.identity import Identity\n"
        "from common.messages import Request; from common.errors import Refusal\n"
        "given = json.load(sys.stdin); study = Study.model_validate_json(given['study'])\n"
        "l = Ledger.open(given['path'], 'a', Identity.open(given['key']))\n"
        "print('ready', flush=True); sys.stdin.close()\n"
        "try:\n"
        "  l.approve(study, decision=Decision(**given['decision']))\n"
        "  l.charge(study, 'a', Request(kind='train', run='r', site='a', study_hash=study.hash,"
        " round=1)); print('charged')\n"
        "except Refusal as e: print(e.code)\n"
    )
    workers = []
    for study in studies:
        given = {
            "study": study.canonical().decode(),
            "path": str(site.path),
            "key": str(site.path.with_name("site.key")),
            "decision": site.decide("approve", study, runs=1).model_dump(),
        }
        worker = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdin
        worker.stdin.write(json.dumps(given))
        worker.stdin.close()
        workers.append(worker)
    said_each = [worker.stdout.read().split()[-1] for worker in workers if worker.stdout]
    assert [worker.wait() for worker in workers] == [0] * 8
    assert sorted(said_each) == ["charged"] + ["lifetime-exceeded"] * 7
    book = Book.read(site.path)
    assert book.events().total() == 1
    spending = book.lifetime("train")
    assert spending is not None
    assert spending.within


def test_a_cap_that_is_lowered_stops_what_is_set_aside(site: Site) -> None:
    site.approve()
    site.charge(1)
    lower = Cap(epsilon=0.5, delta=DELTA, order=Cap(epsilon=20.0, delta=DELTA).order)
    site.ledger.settle_policy(
        site.policy.model_copy(update={"lifetime": Lifetime(train=lower, validation=lower)})
    )
    assert code_of(lambda: site.charge(2)) == "lifetime-exceeded"


def test_rule_and_order_of_a_cap_are_fixed_once_a_study_was_approved(site: Site) -> None:
    """A Renyi filter holds at one order, chosen before anything was spent under it."""
    other = Cap(epsilon=30.0, delta=DELTA)
    assert other.order != Cap(epsilon=20.0, delta=DELTA).order
    changed = site.policy.model_copy(update={"lifetime": Lifetime(train=other, validation=other)})
    site.ledger.settle_policy(changed)
    site.approve()
    with pytest.raises(LedgerError, match=f"order = {other.order} into"):
        site.ledger.settle_policy(site.policy)
    same = Cap(epsilon=40.0, delta=DELTA, order=other.order)
    site.ledger.settle_policy(
        site.policy.model_copy(update={"lifetime": Lifetime(train=same, validation=same)})
    )
    with pytest.raises(LedgerError, match="takes the lifetime caps away"):
        site.ledger.settle_policy(site.policy.model_copy(update={"lifetime": None}))


def test_a_process_with_another_policy_than_the_one_in_force_stops(site: Site) -> None:
    site.approve()
    other = site.open()
    other.settle_policy(site.policy.model_copy(update={"min_patients": 7}))
    assert code_of(site.charge) == "policy-changed"


def test_without_privacy_is_infinite_for_ever_and_needs_the_sentence(tmp_path: Path) -> None:
    bare = make_study("bare", private=False)
    strict = Site(tmp_path / "strict")
    assert code_of(lambda: strict.approve(bare)) == "lifetime-exceeded"
    site = Site(tmp_path / "open", without_privacy=SENTENCE)
    site.approve(bare)
    site.charge(1, bare)
    site.approve(STUDY)
    site.charge(1)
    assert site.ledger.book.epsilon(DELTA)["train"] == math.inf
    site.ledger.settle_policy(site.policy.model_copy(update={"without_privacy": None}))
    assert code_of(lambda: site.charge(2)) == "lifetime-exceeded", "the cap is void without it"


def test_rounds_of_a_day_are_limited(site: Site) -> None:
    site.approve(runs=5)

    def charge(number: int) -> object:
        request = Request(kind="train", run="r", site="a", study_hash=STUDY.hash, round=number)
        return site.ledger.charge(STUDY, "a", request, rounds_per_day=2)

    charge(1)
    charge(2)
    assert code_of(lambda: charge(3)) == "rounds-per-day"


# -- what an auditor finds --------------------------------------------------------------------


def _release(study: Study = STUDY, digest: str = "1") -> dict[str, Any]:
    return {
        "study_hash": study.hash,
        "run": "run",
        "round": 1,
        "attempt": 0,
        "request_digest": digest * 64,
        "event": study.round_event("a"),
    }


def test_releases_that_no_daemon_would_write_are_found_though_signed(site: Site) -> None:
    site.approve()
    site.forge(Released, **_release(make_study("other", epsilon=1.0)))
    with pytest.raises(LedgerError) as found:
        Book.read(site.path)
    assert (found.value.rule, found.value.number) == ("release-unreserved", 4)


@pytest.mark.parametrize(
    ("rule", "act"),
    [
        ("budget-passed", lambda s: [s.forge(Released, **_release(digest=d)) for d in "1234"]),
        ("request-charged-twice", lambda s: [s.forge(Released, **_release()) for _ in "12"]),
        ("release-after-end", lambda s: (s.revoke(), s.forge(Released, **_release()))),
        (
            "release-after-end",
            lambda s: s.forge(Released, **{**_release(), "at": "2999-01-01T00:00:00.000+00:00"}),
        ),
        (
            "approval-unsigned",
            lambda s: s.forge(
                StudyApproved, study_hash="0" * 64, name="x", delta=DELTA, runs=1, reserved=()
            ),
        ),
        (
            "revocation-unfounded",
            lambda s: s.forge(
                StudyRevoked,
                study_hash="0" * 64,
                decision=s.decide("revoke"),
            ),
        ),
        (
            "rotation-unproven",
            lambda s: s.forge(KeyRotated, public_key=s.officer.public, proof="0" * 128),
        ),
        ("signature-invalid", lambda s: s.forge(Released, key=s.officer, **_release())),
    ],
)
def test_each_broken_rule_has_its_own_code(
    site: Site, rule: str, act: Callable[[Site], object]
) -> None:
    site.approve()
    act(site)
    with pytest.raises(LedgerError) as found:
        Book.read(site.path)
    assert found.value.rule == rule
    with pytest.raises(PrivacyError):
        site.open()  # and no daemon starts on it


def test_a_clock_that_runs_back_stops_releases_and_shows(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve()
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="milliseconds")
    with monkeypatch.context() as patch:
        patch.setattr(chain, "now", lambda: later)
        site.charge(1)
    assert code_of(lambda: site.charge(2)) == "clock-behind"
    site.ledger.refuse(Request(kind="train", run="r", site="a", study_hash=STUDY.hash), "x")
    assert Book.read(site.path).lines[-1].at == later, "time never runs back in a ledger"
    site.forge(Released, **{**_release(), "at": "2020-01-01T00:00:00.000+00:00"})
    assert [rule for rule, _, _ in Book.read(site.path).anomalies] == ["clock-back"]


# -- what is missing --------------------------------------------------------------------------


def test_a_cut_ledger_is_refused_by_its_own_head_and_by_receipts(site: Site) -> None:
    site.approve()
    site.charge(1)
    backup = site.path.read_bytes()
    site.charge(2)
    receipt = site.ledger.receipt()
    whole = site.path.read_bytes()

    head = site.path.with_name("ledger.head").read_bytes()
    site.path.write_bytes(backup)
    for start in range(3):  # what is appended meanwhile must not make it forget
        site.ledger = site.open()
        site.ledger.settle_software(f"version {start}", "0" * 64)
        refused = Request(kind="train", run="r", site="a", study_hash=STUDY.hash, round=start)
        site.ledger.refuse(refused, "ledger-behind")
        assert code_of(lambda: site.charge(3)) == "ledger-behind"
    assert site.path.with_name("ledger.head").read_bytes() == head

    site.path.write_bytes(backup)
    site.path.with_name("ledger.head").unlink()  # a backup of the whole folder: older, but in order
    site.ledger = site.open()
    site.ledger.compare(receipt)  # what the coordinator keeps
    assert code_of(lambda: site.charge(3)) == "ledger-behind"
    assert code_of(lambda: site.approve(make_study("another"))) == "ledger-behind"
    site.ledger = site.open()
    assert code_of(lambda: site.charge(3)) == "ledger-behind", "remembered over a restart"

    site.path.write_bytes(whole)
    site.ledger = site.open()
    site.charge(3)


def test_a_receipt_must_be_the_sites_own(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "b")
    receipt = site.ledger.receipt()
    with pytest.raises(PrivacyError, match="is not a key of site 'a'"):
        site.ledger.compare(other.ledger.receipt())
    with pytest.raises(PrivacyError, match="signature is not by the key"):
        site.ledger.compare(receipt.model_copy(update={"lines": 99}))
    assert site.ledger.behind is None, "nobody can stop a hospital without its key"


class Loss:
    """A site, restored to what it was at some moment, and the receipts that it gave since."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder, cap=1000.0)

    def backup(self) -> bytes:
        return self.site.path.read_bytes()

    def restore(self, backup: bytes, *receipts: Receipt) -> None:
        self.site.path.write_bytes(backup)
        self.site.path.with_name("ledger.head").unlink()
        self.site.ledger = self.site.open()
        for receipt in receipts:
            self.site.ledger.compare(receipt)

    def counted(self, study: Study) -> int:
        """Training releases of a study that the ledger counts as spent."""
        return self.site.ledger.book.events("train", study.hash).total()


@pytest.fixture
def loss(tmp_path: Path) -> Loss:
    return Loss(tmp_path / "a")


OTHER = make_study("other", epsilon=1.0)


def test_what_lost_lines_may_have_released_is_counted_on_top(loss: Loss) -> None:
    site = loss.site
    site.approve()
    site.charge(1)
    backup = loss.backup()
    site.charge(2)  # lost
    site.approve(OTHER, runs=3)  # lost, with a run of it
    site.charge(1, OTHER)
    receipt = site.ledger.receipt()
    loss.restore(backup, receipt)
    for wrong in ([], [(OTHER, 1)], [(OTHER, 3), (OTHER, 3)], [(STUDY, 3)]):
        with pytest.raises(LedgerError, match="not exactly these are given") as found:
            site.ledger.reconcile(wrong)
        assert found.value.rule == "loss-understated"
    site.ledger.reconcile([(OTHER, 3)])
    # One charged here; two that may have been there, or three: where the histories parted is known
    # to within a few lines.
    assert 1 + 2 <= loss.counted(STUDY) <= 1 + 3
    assert loss.counted(OTHER) == 3 * 3
    assert code_of(lambda: site.charge(3)) == "study-revoked"
    book = Book.read(site.path)
    assert book.holds(receipt)
    assert {a.closed for a in book.studies.values()} == {"reconciled"}
    site.approve()
    site.charge(3)
    site.ledger = site.open()
    assert site.ledger.behind is None
    with pytest.raises(PrivacyError, match="lacks no line"):
        site.ledger.reconcile()


def test_lines_written_after_the_loss_hide_nothing_of_it(loss: Loss) -> None:
    """The restored site goes on, approves and releases, before anybody shows a receipt."""
    site = loss.site
    site.approve()
    backup = loss.backup()
    for number in (1, 2):
        site.charge(number)
    site.approve(OTHER)
    receipt = site.ledger.receipt()
    loss.restore(backup)
    for number in (1, 2, 3):
        site.charge(number)
    third = make_study("third", epsilon=0.7)
    site.approve(third)
    site.ledger.compare(receipt)
    with pytest.raises(LedgerError, match="the receipt counts"):
        site.ledger.reconcile([(third, 1)])
    site.ledger.reconcile([(OTHER, 1)])
    assert loss.counted(STUDY) == 3 + 3, "three here, and three that may have been there"
    assert loss.counted(OTHER) == 3


def test_two_lost_histories_are_both_counted(loss: Loss) -> None:
    site = loss.site
    site.approve()
    backup = loss.backup()
    site.charge(1)
    site.approve(OTHER)
    longer = site.ledger.receipt()
    loss.restore(backup)
    site.charge(1)
    shorter = site.ledger.receipt()
    loss.restore(backup, shorter, longer)
    assert site.ledger.behind == longer
    site.ledger.reconcile([(OTHER, 1)])
    assert site.ledger.behind == shorter, "a receipt is covered by itself alone"
    site.ledger.reconcile()
    assert site.ledger.behind is None
    assert loss.counted(STUDY) == 3 + 3


def test_a_second_approval_that_was_lost_counts_with_its_runs(loss: Loss) -> None:
    site = loss.site
    site.approve()
    backup = loss.backup()
    site.approve(runs=4)
    receipt = site.ledger.receipt()
    loss.restore(backup, receipt)
    with pytest.raises(LedgerError):
        site.ledger.reconcile([(OTHER, 1)])
    site.ledger.reconcile([(STUDY, 4)])
    assert loss.counted(STUDY) >= 4 * 3


def test_a_loss_that_contains_a_reconciliation_cannot_hide_it(loss: Loss) -> None:
    site = loss.site
    site.approve()
    backup = loss.backup()
    site.charge(1)
    first = site.ledger.receipt()
    loss.restore(backup, first)
    site.ledger.reconcile()
    counted = loss.counted(STUDY)
    site.approve(OTHER)
    second = site.ledger.receipt()
    loss.restore(backup, second)
    assert loss.counted(STUDY) < counted
    with pytest.raises(PrivacyError, match="would stand against the whole one"):
        site.ledger.give_receipt("an auditor")
    for some in ([], [(OTHER, 1)], [(STUDY, 1), (OTHER, 1)]):
        with pytest.raises(LedgerError, match="not exactly these"):
            site.ledger.reconcile(some)
    assert code_of(lambda: site.charge(2)) == "ledger-behind"


def test_a_loss_cannot_be_made_up(loss: Loss) -> None:
    """Who holds the site's key cannot declare lines lost, nor leave out what they approved."""
    site = loss.site
    site.approve()
    backup = loss.backup()
    site.charge(1)
    site.approve(OTHER)
    receipt = site.ledger.receipt()
    loss.restore(backup)
    stranger = receipt.model_copy(update={"public_key": site.officer.public}).sealed(site.officer)
    for made_up, rule in (
        (stranger, "loss-unproven"),
        (receipt.model_copy(update={"lines": 10**9}), "loss-unproven"),
        (site.ledger.receipt(), "loss-unproven"),
        (receipt, "loss-understated"),
    ):
        kept = site.path.read_bytes()
        site.forge(Reconciled, receipt=made_up, lost=())
        with pytest.raises(LedgerError) as found:
            Book.read(site.path)
        assert found.value.rule == rule
        site.path.write_bytes(kept)


def test_a_loss_is_remembered_whatever_fails(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    site = loss.site
    site.approve()
    backup = loss.backup()
    site.charge(1)
    receipt = site.ledger.receipt()
    loss.restore(backup)

    def full(self: Ledger, receipt: Receipt) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_keep_receipt", full)
        with pytest.raises(OSError, match="No space"):
            site.ledger.compare(receipt)
    assert code_of(lambda: site.charge(2)) == "ledger-behind"
    site.path.with_name("ledger.receipts").write_text('{"site":"a","lin')  # torn
    site.ledger = site.open()
    site.ledger.compare(receipt)
    site.ledger = site.open()
    assert code_of(lambda: site.charge(2)) == "ledger-behind"
    for damage in (b"", b"{", b'{"site":"a"}', b"\xff"):
        site.path.with_name("ledger.head").write_bytes(damage)
        with pytest.raises(PrivacyError, match="is damaged"):
            site.open()


# -- disks ------------------------------------------------------------------------------------

_FULL = """
import resource, signal, sys, os
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_ledger_rules as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
site = t.Site(Path(sys.argv[1]))
site.ledger.refresh()
room = site.path.stat().st_size + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
try:
    site.charge(1)
    print("charged")
except OSError as error:
    print("refused", error.errno)
"""


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_full_disk_refuses_and_leaves_a_ledger_that_goes_on(tmp_path: Path, room: int) -> None:
    site = Site(tmp_path / "a")
    site.approve()
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "a"), here, str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    site.ledger = site.open()
    site.charge(1)
    book = Book.read(site.path)
    assert book.events().total() == 1
    assert (book.lines[-2].line == "recovered") == (room > 0)


def test_a_read_only_disk_refuses(site: Site, tmp_path: Path) -> None:
    site.approve()
    if os.geteuid() == 0:  # permissions do not bind root; an immutable mount does
        mounted = subprocess.run(
            ["mount", "--bind", "-o", "ro", site.path.parent, site.path.parent], check=False
        )
        if mounted.returncode:
            pytest.skip("no read-only mount can be made here")
        undo = ["umount", str(site.path.parent)]
    else:
        site.path.chmod(0o400)
        undo = ["chmod", "600", str(site.path)]
    try:
        before = site.path.read_bytes()
        with pytest.raises(OSError, match=r"Read-only|Permission"):
            site.charge(1)
        assert site.path.read_bytes() == before
    finally:
        subprocess.run(undo, check=True)
    site.charge(1)


# -- any history ------------------------------------------------------------------------------

SMALL = [make_study(f"small-{number}", epsilon=1.0) for number in range(3)]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_history_of_losses_makes_a_ledger_count_too_little(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Approve, release, back up, restore, in any order; every receipt of a lost history is shown in
    the end. Then at least as much is counted of each study as was ever released of it."""
    folder = tmp_path / os.urandom(4).hex()
    loss = Loss(folder)
    site, made = loss.site, Counter[str]()
    approved: list[tuple[Study, int]] = []
    backups = [(loss.backup(), list(approved))]
    lost: list[tuple[Receipt, list[tuple[Study, int]]]] = []
    number = 0
    for _ in range(data.draw(st.integers(3, 14))):
        what = data.draw(st.sampled_from(["approve", "charge", "charge", "back up", "restore"]))
        study = data.draw(st.sampled_from(SMALL))
        account = site.ledger.book.studies.get(study.hash)
        if what == "approve":
            runs = (account.runs if account else 0) + data.draw(st.integers(1, 2))
            site.approve(study, runs=runs)
            approved.append((study, runs))
        elif what == "charge" and account and account.left[study.round_event("a")]:
            number += 1
            site.charge(number, study)
            made[study.hash] += 1
        elif what == "back up":
            backups.append((loss.backup(), list(approved)))
        elif what == "restore":
            backup, then = data.draw(st.sampled_from(backups))
            lost.append((site.ledger.receipt(), list(approved)))
            loss.restore(backup)
            approved = list(then)
    while (behind := _next_loss(site, lost)) is not None:
        history = behind[1]
        shared = 0
        while history[shared : shared + 1] == approved[shared : shared + 1] != []:
            shared += 1
        site.ledger.reconcile(history[shared:])
    for study in SMALL:
        assert loss.counted(study) >= made[study.hash]
    Book.read(site.path)


def _next_loss(site: Site, lost: list[tuple[Receipt, Any]]) -> tuple[Receipt, Any] | None:
    for receipt, history in lost:
        if not site.ledger.book.holds(receipt):
            site.ledger.behind = None
            site.ledger.compare(receipt)
            assert site.ledger.behind == receipt
            return receipt, history
    return None

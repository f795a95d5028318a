"""Rules 7 and 8 at the ledger: nothing without a reserve, nothing past a cap, nothing unseen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import PrivacyError, Refusal
from common.identity import Identity
from common.messages import Request
from common.privacy import chain
from common.privacy.book import Book, LedgerError
from common.privacy.decisions import decide
from common.privacy.ledger import Ledger, planned
from common.privacy.lifetime import Cap, Lifetime
from common.privacy.lines import (
    Decision,
    KeyRotated,
    Released,
    StudyApproved,
    StudyRevoked,
    body_of,
    signed,
)
from common.privacy.policy import SENTENCE, Policy
from common.privacy.pricing import epsilon
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
    other = site.decide("approve", runs=9)
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


def test_reconciling_counts_every_reserve_as_spent(site: Site) -> None:
    site.approve()
    site.charge(1)
    backup = site.path.read_bytes()
    site.charge(2)
    another = make_study("another", epsilon=1.0)
    site.approve(another)
    site.charge(1, another)
    spent = {s.hash: site.ledger.book.epsilon(DELTA, s.hash)["train"] for s in (STUDY, another)}
    receipt = site.ledger.receipt()

    site.path.write_bytes(backup)
    site.ledger = site.open()
    with pytest.raises(PrivacyError, match="hold 1 approvals, 0 of them are given"):
        site.ledger.reconcile()
    site.ledger.reconcile([another])
    book = Book.read(site.path)
    for study in (STUDY, another):
        whole = epsilon(planned(study, "a", 1), DELTA)
        assert book.epsilon(DELTA, study.hash)["train"] >= spent[study.hash]
        reserve = {e: n for e, n in planned(study, "a", 1).items() if e.population == "train"}
        assert book.epsilon(DELTA, study.hash)["train"] == pytest.approx(epsilon(reserve, DELTA))
        assert whole > 0
    assert book.holds(receipt)
    assert code_of(lambda: site.charge(3)) == "study-revoked"
    site.approve()
    site.charge(3)
    site.ledger = site.open()
    assert site.ledger.behind is None
    with pytest.raises(PrivacyError, match="lacks no line"):
        site.ledger.reconcile()


def test_lines_lost_after_a_reconciliation_are_not_covered_by_it(site: Site) -> None:
    """Line numbers are used again, so a receipt says in which epoch it was given."""
    site.approve()
    first = site.path.read_bytes()
    for number in (1, 2, 3):
        site.charge(number)
    old = site.ledger.receipt()
    site.path.write_bytes(first)
    site.ledger = site.open()
    site.ledger.reconcile()
    site.approve()
    second = site.path.read_bytes()
    site.charge(4)
    new = site.ledger.receipt()
    assert new.lines <= old.lines + 2
    assert (old.epoch, new.epoch) == (0, 1)

    site.path.write_bytes(second)
    site.path.with_name("ledger.head").unlink()
    site.ledger = site.open()
    site.ledger.compare(old)
    assert site.ledger.behind is None
    site.ledger.compare(new)
    assert code_of(lambda: site.charge(5)) == "ledger-behind"
    site.ledger.reconcile()
    assert site.ledger.book.epoch == 2
    site.ledger.compare(old)
    site.ledger.compare(new)
    assert site.ledger.behind is None


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

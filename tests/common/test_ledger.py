"""The ledger: durable, chained, shared by processes, and never more than was reserved."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FedwardError, PrivacyError, Refusal
from common.identity import Identity
from common.messages import Request
from common.privacy import ledger as ledger_module
from common.privacy.book import Book, LedgerError
from common.privacy.ledger import Ledger
from common.privacy.lines import body_of, signed, split
from common.study import Study, resolve


def make_study(*, private: bool = True, rounds: int = 4, name: str = "small") -> Study:
    study = Study.model_validate(
        {
            "name": name,
            "sources": {
                "lab": {"modality": "series", "encoder": "series-statistics", "series": ["lactate"]}
            },
            "tasks": {"death": {}},
            "privacy": {"spare_rounds": 0.25},
            "training": {"steps_per_round": 3},
            "federation": {"rounds": rounds, "sites": {"a": {"patients_declared": 50}}},
        }
    )
    return resolve(study, private=private)


STUDY = make_study()


def train(round_: int, attempt: int = 0, run: str = "run") -> Request:
    return Request(
        kind="train", run=run, site="a", study_hash=STUDY.hash, round=round_, attempt=attempt
    )


def tear(ledger: Ledger, keep: int) -> bytes:
    """Power fails while the charge of round 2 is being written."""
    head = ledger.path.with_name("ledger.head").read_bytes()
    before = ledger.path.stat().st_size
    ledger.charge(STUDY, "a", train(2))
    os.truncate(ledger.path, before + keep)
    ledger.path.with_name("ledger.head").write_bytes(head)
    return ledger.path.read_bytes()[before:]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.jsonl"


def opened(path: Path, site: str = "a", **options: Any) -> Ledger:
    """The ledger of a virtual hospital, which needs no person to approve its studies."""
    return Ledger.open(path, site, Identity.open(path.parent / "site.key"), virtual=True, **options)


def approved(path: Path, study: Study = STUDY) -> Ledger:
    ledger = opened(path)
    ledger.approve(study)
    return ledger


def test_lines_describe_events_and_survive_a_restart(path: Path) -> None:
    ledger = approved(path)
    request = train(1)
    ledger.charge(STUDY, "a", request)
    ledger.refuse(train(9), "budget-exhausted")

    again = opened(path)
    assert [line.line for line in again.book.lines] == [
        "genesis",
        "study-approved",
        "released",
        "refused",
    ]
    assert again.book.head == ledger.book.head
    assert again.book.events() == {STUDY.round_event("a"): 1}
    assert [c.request_digest for c in again.book.released(STUDY.hash)] == [request.digest]
    assert "epsilon" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_charge_is_on_disk_before_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (real(handle), synced.append(os.fstat(handle).st_size))[0]
    )
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    assert path.stat().st_size in synced
    assert path.parent.stat().st_size in synced, "the folder entry of a new ledger is synced too"


def test_reserve_is_rounds_with_spare_ones_and_the_declared_evaluations(path: Path) -> None:
    ledger = approved(path)
    assert STUDY.priced_rounds == 5
    for number in range(1, 6):
        ledger.charge(STUDY, "a", train(number))
    with pytest.raises(Refusal, match="spent all 5") as refusal:
        ledger.charge(STUDY, "a", train(6))
    assert refusal.value.code == "budget-exhausted"

    evaluate = Request(kind="evaluate", run="run", site="a", study_hash=STUDY.hash, round=1)
    ledger.charge(STUDY, "a", evaluate)
    with pytest.raises(Refusal, match="spent all 1"):
        ledger.charge(STUDY, "a", evaluate.model_copy(update={"round": 2}))
    assert ledger.book.epsilon(STUDY.privacy.delta)["train"] <= STUDY.privacy.epsilon
    assert ledger.book.epsilon(STUDY.privacy.delta)["validation"] <= STUDY.privacy.epsilon


def test_another_run_of_the_study_draws_on_the_same_reserve(path: Path) -> None:
    ledger = approved(path)
    for number in range(1, 6):
        ledger.charge(STUDY, "a", train(number, run=f"run-{number % 2}"))
    with pytest.raises(Refusal, match="spent all 5"):
        ledger.charge(STUDY, "a", train(1, run="yet another"))
    ledger.approve(STUDY, runs=2)
    ledger.charge(STUDY, "a", train(1, run="yet another"))
    assert ledger.book.epsilon(STUDY.privacy.delta)["train"] > STUDY.privacy.epsilon


def test_changed_request_needs_a_higher_attempt(path: Path) -> None:
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    with pytest.raises(Refusal) as refusal:
        ledger.charge(STUDY, "a", train(1))
    assert refusal.value.code == "request-changed"
    ledger.charge(STUDY, "a", train(1, attempt=1))
    with pytest.raises(Refusal, match="attempt 1"):
        ledger.charge(STUDY, "a", train(1, attempt=1))
    assert ledger.book.events("train").total() == 2


def test_a_request_is_charged_once(path: Path) -> None:
    """Without the stored answer only fresh noise could be released, and that is not free."""
    ledger = approved(path)
    request = train(1)
    ledger.charge(STUDY, "a", request)
    for again in (ledger, opened(path)):
        with pytest.raises(Refusal) as refusal:
            again.charge(STUDY, "a", request)
        assert refusal.value.code == "answer-lost"
    ledger.charge(STUDY, "a", train(1, attempt=1))
    assert opened(path).book.events().total() == 2


def test_unapproved_study_is_not_charged(path: Path) -> None:
    with pytest.raises(Refusal) as refusal:
        opened(path).charge(STUDY, "a", train(1))
    assert refusal.value.code == "study-unapproved"


def test_prices_by_population_and_study(path: Path) -> None:
    ledger = approved(path)
    open_study = make_study(private=False, name="open")
    ledger.approve(open_study)
    assert ledger.book.epsilon(1e-5) == {"train": 0.0, "validation": 0.0}
    ledger.charge(STUDY, "a", train(1))
    first = ledger.book.epsilon(1e-5)
    assert 0 < first["train"] < math.inf
    assert first["validation"] == 0.0
    ledger.charge(open_study, "a", train(1).model_copy(update={"study_hash": open_study.hash}))
    assert ledger.book.epsilon(1e-5)["train"] == math.inf
    assert ledger.book.epsilon(1e-5, STUDY.hash) == first


@pytest.mark.parametrize(
    ("what", "broken", "why"),
    [
        ("value", 3, "the signature is not by the site's key"),
        ("removed", 3, "does not follow from line 2"),
        ("inserted", 4, "does not follow from line 3"),
        ("swapped", 3, "does not follow from line 2"),
    ],
)
def test_altered_history_is_refused_by_line(path: Path, what: str, broken: int, why: str) -> None:
    ledger = approved(path)
    for number in range(1, 4):
        ledger.charge(STUDY, "a", train(number))
    lines = path.read_text().splitlines(keepends=True)
    if what == "value":
        altered = json.loads(lines[2])
        altered["event"]["steps"] = 1
        lines[2] = json.dumps(altered, separators=(",", ":")) + "\n"
    elif what == "removed":
        del lines[2]
    elif what == "swapped":
        lines[2:4] = lines[3], lines[2]
    else:
        lines.insert(2, lines[2])
    path.write_text("".join(lines))
    with pytest.raises(PrivacyError, match=f"line {broken}: {why}"):
        opened(path)


def test_a_ledger_that_shrinks_in_use_is_refused(path: Path) -> None:
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(PrivacyError, match="shorter"):
        ledger.charge(STUDY, "a", train(2))


def test_torn_last_line_is_kept_aside_and_reported(path: Path) -> None:
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    torn = tear(ledger, 40)

    again = opened(path)
    assert (path.parent / "ledger.torn").read_bytes() == torn + b"\n"
    assert again.book.lines[-1].line == "recovered"
    assert again.book.events().total() == 1
    again.charge(STUDY, "a", train(2))
    assert len(Book.read(path).lines) == 5


def test_a_damaged_last_line_is_not_taken_for_a_torn_one(path: Path) -> None:
    """Its release may have happened: `ledger.head` says that it was whole."""
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x0b")  # the end of line, one bit flipped
    with pytest.raises(PrivacyError, match="line 3: the last line was whole when it was written"):
        opened(path)
    assert path.read_bytes() == whole[:-1] + b"\x0b", "nothing is cut"


def test_whole_last_line_without_its_end_counts_as_spent(path: Path) -> None:
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    path.write_bytes(path.read_bytes()[:-1])
    assert opened(path).book.events().total() == 1
    assert opened(path).book.events().total() == 1
    assert not (path.parent / "ledger.torn").exists()


def test_failed_write_spends_or_leaves_nothing_but_never_releases(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = approved(path)
    real = os.write
    state = {"full": True}

    def short_then_full(handle: int, data: bytes) -> int:
        if state["full"] and b"released" not in data:
            raise OSError(28, "No space left on device")
        return real(handle, data[:25] if state["full"] else data)

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(OSError, match="No space"):
        ledger.charge(STUDY, "a", train(1))
    assert not ledger.book.events()
    state["full"] = False
    ledger.charge(STUDY, "a", train(1))
    assert [line.line for line in ledger.book.lines[-2:]] == ["recovered", "released"]
    assert len(Book.read(path).lines) == 4


def test_two_processes_never_spend_one_reserve_twice(path: Path) -> None:
    study = make_study(rounds=40)
    approved(path, study)
    program = (
        "import sys; from common.privacy.ledger import Ledger; from common.study import Study\n"
        "from common.identity import Identity\n"
        "from common.messages import Request; from common.errors import Refusal\n"
        "study = Study.model_validate_json(sys.stdin.read()); key = Identity.open(sys.argv[3])\n"
        "l = Ledger.open(sys.argv[1], 'a', key)\n"
        "n = 0\n"
        "for r in range(1, 60):\n"
        "  try:\n"
        "    l.charge(study, 'a', Request(kind='train', run=sys.argv[2], site='a',"
        " study_hash=study.hash, round=r)); n += 1\n"
        "  except Refusal as e: assert e.code == 'budget-exhausted', e\n"
        "print(n)"
    )
    key = str(path.parent / "site.key")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), name, key],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    for worker in workers:
        assert worker.stdin
        worker.stdin.write(study.canonical().decode())
        worker.stdin.close()
    spent = [int(worker.stdout.read()) for worker in workers if worker.stdout]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert sum(spent) == study.priced_rounds == 50
    assert opened(path).book.events().total() == 50


def test_seeded_ledgers_are_marked_for_ever(path: Path, tmp_path: Path) -> None:
    opened(path, simulated=True)
    assert opened(path).book.simulated
    opened(tmp_path / "real.jsonl", "a")
    with pytest.raises(PrivacyError, match="real randomness"):
        opened(tmp_path / "real.jsonl", "a", simulated=True)
    with pytest.raises(PrivacyError, match="ledger of site 'a', not 'b'"):
        opened(path, "b")


# -- schemas and keys -------------------------------------------------------------------------

GOLDEN = Path(__file__).with_name("ledgers") / "schema1.jsonl"


def test_a_ledger_of_schema_1_is_read_for_ever() -> None:
    book = Book.read(GOLDEN)
    assert book.head == "d7e90a8c07bd4bec9dbbd7fc9c75d7199c05d9ee5326eabe7d47e6c6d96a053b"
    assert (book.site, book.public_key, book.approvals) == ("a", None, 2)
    assert book.epsilon(1e-5)["train"] == pytest.approx(7.44149, abs=1e-4)
    assert [line.line for line in book.lines].count("released") == 5


def test_a_ledger_of_schema_1_goes_on_signed(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(GOLDEN.read_bytes())
    ledger = opened(path)
    assert ledger.book.lines[-1].line == "upgraded"
    ledger.refuse(train(1), "budget-exhausted")
    book = Book.read(path)
    assert book.public_key == Identity.open(path.parent / "site.key").public
    assert book.epsilon(1e-5) == Book.read(GOLDEN).epsilon(1e-5)
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + split(last[:-1])[0] + b"\n")  # the signature taken off
    with pytest.raises(LedgerError) as found:
        Book.read(path)
    assert found.value.rule == "signature-missing"


def test_a_rotated_key_signs_what_follows_and_nothing_else(path: Path) -> None:
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    before = ledger.receipt()
    fresh = Identity.open(path.parent / "fresh.key")
    other = opened(path)
    ledger.rotate(fresh)
    ledger.charge(STUDY, "a", train(2))
    with pytest.raises(Refusal) as refusal:
        other.charge(STUDY, "a", train(3))
    assert refusal.value.code == "key-rotated", "a process that still holds the old key"
    with pytest.raises(PrivacyError, match="but the site's key is"):
        opened(path)
    again = Ledger.open(path, "a", fresh)
    again.compare(before)  # a receipt of the old key still counts
    assert again.behind is None
    assert Book.read(path).keys == [before.public_key, fresh.public]
    assert again.receipt().public_key == fresh.public


def test_receipts_given_are_recorded(path: Path) -> None:
    ledger = approved(path)
    receipt = ledger.give_receipt("Dr. Okafor, on paper")
    assert receipt.genuine
    line = Book.read(path).lines[-1]
    assert (line.line, line.previous) == ("receipt", receipt.head)
    assert Book.read(path).holds(receipt)


def test_erasure_is_recorded_once(path: Path) -> None:
    ledger = approved(path)
    for _ in range(2):
        ledger.erase("ab" * 32)
    assert [line.line for line in ledger.book.lines].count("patient-erased") == 1


def test_a_coordinator_cannot_fill_the_disk_with_refusals(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_REFUSALS_PER_DAY", 5)
    ledger = approved(path)
    for number in range(20):
        ledger.refuse(train(number), "budget-exhausted")
    assert [line.line for line in ledger.book.lines].count("refused") == 5


# -- garbage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed ledger, and room for changed copies beside it."""
    path = tmp_path_factory.mktemp("written") / "ledger.jsonl"
    ledger = approved(path)
    ledger.charge(STUDY, "a", train(1))
    ledger.refuse(train(9), "budget-exhausted")
    return path


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_mutilated_ledger_is_a_clear_error_or_the_same_ledger(
    written: Path, data: st.DataObject
) -> None:
    text = written.read_bytes()
    at = data.draw(st.integers(0, len(text) - 1))
    what = data.draw(st.sampled_from(["flip", "cut", "insert", "garbage"]))
    if what == "flip":
        flipped = text[at] ^ (1 << data.draw(st.integers(0, 7)))
        changed = text[:at] + bytes([flipped]) + text[at + 1 :]
    elif what == "cut":
        changed = text[:at]
    elif what == "insert":
        changed = text[:at] + data.draw(st.binary(min_size=1, max_size=40)) + text[at:]
    else:
        changed = data.draw(st.binary(max_size=300))
    path = written.with_name("changed.jsonl")
    path.write_bytes(changed)
    with contextlib.suppress(FedwardError):
        book = Book.read(path)
        assert text.startswith(changed), "a prefix is valid: only a receipt shows that it is one"
        assert book.lines


@pytest.mark.parametrize(
    "at", ["", "yesterday", "2026-13-01T00:00:00.000+00:00", "2026-01-01", "2026-01-01T00:00:00Z"]
)
def test_a_time_that_is_none_is_named(path: Path, at: str) -> None:
    ledger = approved(path)
    body = body_of(ledger.book.lines[-1]).replace(ledger.book.last_at.encode(), at.encode())
    with pytest.raises(LedgerError, match="at: "):
        ledger.book.take(signed(body, b"0" * 64))


@settings(max_examples=100, deadline=None)
@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_no_line_of_garbage_gets_in(raw: bytes) -> None:
    book = Book()
    with pytest.raises(LedgerError):
        book.take(raw)
    assert book.lines == []

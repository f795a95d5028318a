"""Whatever was done to a ledger is found, and called by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.audit.findings import Finding
from common.audit.verify import Verification, verify
from common.privacy.lines import PatientErased, body_of, hash_of, signed, split

SCHEMA_1 = Path(__file__).parent.parent / "ledgers" / "schema1.jsonl"
Makers = dict[str, Callable[..., Any]]


def errors(found: Verification) -> list[Finding]:
    return [finding for finding in found.findings if finding.severity == "error"]


def changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4].replace(b'"steps":5', b'"steps":1'), *lines[5:]]


def changed_and_rechained(lines: list[bytes], scribe: Any, other: Any) -> list[bytes]:
    """Line 5 signed by somebody else, and the link of line 6 mended to fit."""
    body, _ = split(lines[4])
    forged = signed(body, other.identity.sign(body))
    following, signature = split(lines[5])
    assert signature is not None
    mended = following.replace(hash_of(lines[4]).encode(), hash_of(forged).encode())
    return [*lines[:4], forged, signed(mended, signature), *lines[6:]]


TAMPERINGS: dict[str, tuple[Callable[..., list[bytes]], str, int]] = {
    "a value changed": (lambda a, s, o: changed(a), "line-changed", 5),
    "the last line changed": (
        lambda a, s, o: [*a[:-1], a[-1].replace(b"budget", b"policy")],
        "signature-invalid",
        8,
    ),
    "a link changed": (
        lambda a, s, o: [*a[:4], a[4].replace(a[4][13:21], b"00000000"), *a[5:]],
        "line-changed",
        5,
    ),
    "lines swapped": (lambda a, s, o: [*a[:4], a[5], a[4], *a[6:]], "lines-swapped", 5),
    "a line moved to the end": (lambda a, s, o: [*a[:4], *a[5:], a[4]], "lines-swapped", 5),
    "the first two swapped": (lambda a, s, o: [a[1], a[0], *a[2:]], "lines-swapped", 1),
    "a line removed": (lambda a, s, o: [*a[:4], *a[5:]], "line-removed", 5),
    "the beginning removed": (lambda a, s, o: a[2:], "start-missing", 1),
    "a line repeated": (lambda a, s, o: [*a[:5], a[4], *a[5:]], "line-repeated", 6),
    "a line of another site": (lambda a, s, o: [*a[:4], o.raws[4], *a[4:]], "line-inserted", 5),
    "another ledger below": (lambda a, s, o: [*a, *o.raws], "ledgers-joined", 9),
    "another key's signature": (changed_and_rechained, "key-foreign", 5),
    "rubbish": (lambda a, s, o: [*a[:3], b"\xff{}", *a[3:]], "line-unreadable", 4),
    "an empty line": (lambda a, s, o: [*a[:3], b"", *a[3:]], "line-unreadable", 4),
    "a line not signed": (
        lambda a, s, o: [*a[:-1], a[-1][: a[-1].index(b',"signature"')] + b"}"],
        "signature-missing",
        8,
    ),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_each_tampering_has_a_name_and_a_line(what: str, path: Path, ledgers: Makers) -> None:
    alter, rule, line = TAMPERINGS[what]
    scribe, other = ledgers["small"](), ledgers["small"]("north")
    lines = alter(list(scribe.raws), scribe, other)
    path.write_bytes(b"".join(raw + b"\n" for raw in lines))
    found = verify(path, public_key=scribe.identity.public)
    assert [(e.rule, e.line) for e in errors(found)] == [(rule, line)]
    assert not found.valid
    assert found.lines == line - 1, "what stands below the broken line proves nothing"


def test_the_names_tell_the_tamperings_apart(path: Path, ledgers: Makers) -> None:
    scribe, other = ledgers["small"](), ledgers["small"]("north")
    said = {}
    for alter, rule, _ in TAMPERINGS.values():
        lines = alter(list(scribe.raws), scribe, other)
        path.write_bytes(b"".join(raw + b"\n" for raw in lines))
        said[rule] = errors(verify(path))[0].text
    assert len(set(said.values())) == len(said)


def test_a_torn_last_line_is_an_error_with_its_own_cure(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    scribe.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    (error,) = errors(verify(path))
    assert error.rule == "line-unfinished"
    assert "sets a torn line aside" in error.cure


def test_a_clock_that_was_set_back_shows(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    scribe.wait(days=-2).erase("patient 9")
    scribe.save(path)
    (error,) = errors(verify(path))
    assert (error.rule, error.line) == ("clock-back", len(scribe.raws))


def test_a_clock_ahead_is_a_warning(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    scribe.clock = datetime.now(UTC) + timedelta(days=400)
    scribe.erase("patient 9")
    scribe.save(path)
    found = verify(path)
    assert found.valid
    assert "clock-ahead" in {finding.rule for finding in found.findings}


def test_a_line_of_a_later_version_is_not_called_damaged(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    body = b'{"previous":"%s","at":"2027-01-01T00:00:00+00:00","line":"from-the-future"}'
    body %= scribe.book.head.encode()
    scribe.raws.append(signed(body, scribe.identity.sign(body)))
    scribe.save(path)
    (error,) = errors(verify(path))
    assert error.rule == "line-unknown"


def test_a_key_that_was_given_up_signs_no_more(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    first = scribe.identity
    scribe.rotate("second key")
    line = PatientErased(previous=scribe.book.head, at=scribe.book.last_at, commitment="0" * 64)
    scribe.raws.append(signed(body_of(line), first.sign(body_of(line))))
    scribe.save(path)
    (error,) = errors(verify(path))
    assert error.rule == "key-retired"


@pytest.mark.parametrize(
    ("field", "value"), [("at", "yesterday"), ("at", "2026-11-25T00:00:00"), ("at", "")]
)
def test_a_value_without_meaning_ends_the_reading(field: str, value: str, path: Path) -> None:
    first = json.loads(SCHEMA_1.read_bytes().splitlines()[0])
    first[field] = value
    path.write_text(json.dumps(first, separators=(",", ":")) + "\n")
    (error,) = errors(verify(path))
    assert error.rule == "line-unreadable"


def test_every_byte_of_the_last_line_counts(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    whole = scribe.save(path).read_bytes()
    for position in range(len(whole) - len(scribe.raws[-1]) - 1, len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert errors(verify(path)), f"byte {position} was flipped unseen"


@pytest.fixture(scope="session")
def flippable(ledgers: Makers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledgers["small"]().save(tmp_path_factory.mktemp("flip") / "whole.jsonl")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_byte_is_found(flippable: Path, data: st.DataObject) -> None:
    flipped = bytearray(flippable.read_bytes())
    position = data.draw(st.integers(0, len(flipped) - 1))
    flipped[position] ^= data.draw(st.integers(1, 255))
    path = flippable.with_name("flipped.jsonl")
    path.write_bytes(flipped)
    assert errors(verify(path))

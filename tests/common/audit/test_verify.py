"""What `verify` proves, and of whom: keys, receipts, policy, and marks that nobody may miss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.audit.findings import Finding
from common.audit.verify import Verification, verify
from common.errors import FedwardError
from common.privacy.lines import Upgraded
from common.privacy.policy import Policy

SCHEMA_1 = Path(__file__).parent.parent / "ledgers" / "schema1.jsonl"
Makers = dict[str, Callable[..., Any]]


def errors(found: Verification) -> list[Finding]:
    return [finding for finding in found.findings if finding.severity == "error"]


def rules(found: Verification) -> set[str]:
    return {finding.rule for finding in found.findings}


def test_an_untouched_ledger_is_a_valid_prefix_and_against_a_receipt_complete(
    path: Path, ledgers: Makers
) -> None:
    scribe = ledgers["months"]()
    scribe.save(path)
    found = verify(path, public_key=scribe.identity.public)
    assert found.valid
    assert not found.findings, "with the site's key there is nothing to say"
    assert found.proven.startswith("a valid prefix only")

    receipt = scribe.receipt()
    found = verify(path, public_key=scribe.identity.public, receipts=[receipt, receipt])
    assert found.complete_to == found.lines == len(scribe.raws)
    assert found.proven == f"complete up to line {found.lines} of {found.lines} against 1 receipt"
    assert found.head == scribe.book.head
    assert found.counts["released"] == scribe.book.events().total()


# -- whose, and whether whole ---------------------------------------------------------------------


def test_another_sites_ledger_is_told_by_its_key(path: Path, ledgers: Makers) -> None:
    ours, theirs = ledgers["small"](), ledgers["small"]("north")
    theirs.save(path)
    (error,) = errors(verify(path, public_key=ours.identity.public))
    assert error.rule == "site-foreign"
    found = verify(path)
    assert found.valid
    assert "key-untrusted" in rules(found)


def test_the_whole_succession_of_keys_is_the_sites(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    first = scribe.identity.public
    scribe.rotate("second key")
    scribe.save(path)
    assert verify(path, public_key=first).valid
    assert "key-rotated" in rules(verify(path, public_key=first))
    assert not verify(path, public_key=scribe.identity.public).findings


def test_a_ledger_signed_anew_by_another_key_is_foreign(path: Path, ledgers: Makers) -> None:
    """Everything in it is consistent: only the key that one trusts tells."""
    honest, forged = ledgers["small"](), ledgers["small"](key="forger")
    forged.save(path)
    assert verify(path).valid
    found = verify(path, public_key=honest.identity.public, receipts=[honest.receipt()])
    assert {e.rule for e in errors(found)} == {"site-foreign", "receipt-foreign"}


def test_a_cut_ledger_lacks_its_receipts_line(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    receipt = scribe.receipt()
    scribe.save(path)
    path.write_bytes(b"".join(raw + b"\n" for raw in scribe.raws[:-1]))
    assert verify(path).valid, "a prefix is valid: only a receipt tells"
    (error,) = errors(verify(path, receipts=[receipt]))
    assert error.rule == "ledger-cut"
    assert "replaced by an older copy" in error.text


def test_an_old_copy_that_went_on_is_a_fork(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    receipt = scribe.receipt()
    older = scribe.resumed(scribe.raws[:-1])
    older.wait(days=9).erase("patient 7")
    older.erase("patient 8")
    older.save(path)
    (error,) = errors(verify(path, receipts=[receipt]))
    assert (error.rule, error.line) == ("ledger-forked", receipt.lines)


def test_receipts_of_others_and_forged_ones_have_their_own_names(
    path: Path, ledgers: Makers
) -> None:
    ours, theirs = ledgers["small"](), ledgers["small"]("north")
    ours.save(path)
    (error,) = errors(verify(path, receipts=[theirs.receipt()]))
    assert error.rule == "receipt-foreign"
    found = verify(path, receipts=[theirs.receipt(), ours.receipt()])
    assert found.valid, "a report.json holds the receipts of all its sites"
    assert "receipts-of-others" in rules(found)
    forged = ours.receipt().model_copy(update={"lines": 99})
    (error,) = errors(verify(path, receipts=[forged]))
    assert error.rule == "receipt-forged"
    by_another = ours.receipt().model_copy(update={"public_key": theirs.identity.public})
    (error,) = errors(verify(path, receipts=[by_another.sealed(theirs.identity)]))
    assert error.rule == "receipt-foreign"


def test_a_receipt_below_the_broken_line_proves_nothing_either_way(
    path: Path, ledgers: Makers
) -> None:
    scribe = ledgers["small"]()
    scribe.raws[4] = scribe.raws[4].replace(b'"steps":5', b'"steps":1')
    scribe.save(path)
    found = verify(path, receipts=[scribe.receipt()])
    assert [e.rule for e in errors(found)] == ["line-changed"]
    assert "receipt-unread" in rules(found)


def test_the_policy_given_must_be_the_one_in_force(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    scribe.save(path)
    (error,) = errors(verify(path, policy=Policy()))
    assert error.rule == "policy-other"


# -- what nobody may take for private -------------------------------------------------------------


def test_seeded_entropy_is_never_valid(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"](virtual=True, entropy="seeded")
    scribe.save(path)
    found = verify(path, public_key=scribe.identity.public, receipts=[scribe.receipt()])
    assert [e.rule for e in errors(found)] == ["entropy-seeded"]
    assert "site-virtual" in rules(found)


def test_virtual_hospitals_and_missing_caps_are_flagged(path: Path, ledgers: Makers) -> None:
    ledgers["small"](virtual=True).save(path)
    found = verify(path)
    assert found.valid
    assert "site-virtual" in rules(found)
    assert "lifetime-uncapped" not in rules(found)


def test_schema_1_stays_readable_and_is_said_not_to_be_signed(path: Path, ledgers: Makers) -> None:
    found = verify(SCHEMA_1)
    assert found.valid
    assert found.unsigned == found.lines == 10
    assert "unsigned" in rules(found)

    scribe = ledgers["small"]()
    upgraded = scribe.resumed(SCHEMA_1.read_bytes().splitlines())
    upgraded.write(Upgraded, public_key=scribe.identity.public)
    upgraded.save(path)
    found = verify(path, public_key=scribe.identity.public)
    assert found.valid
    assert found.unsigned == 10
    notes = [finding for finding in found.findings if finding.severity == "note"]
    assert any("lines 1 to 10 are chained, but not signed" in finding.text for finding in notes)

    lines = path.read_bytes().splitlines(keepends=True)
    for old, new, line in ((b'"steps":3', b'"steps":1', 3), (b'"round":1', b'"round":7', 4)):
        altered = [*lines[:2], lines[2].replace(old, new), *lines[3:]]
        path.write_bytes(b"".join(altered))
        (error,) = errors(verify(path))
        assert (error.rule, error.line) == ("line-changed", line)
        assert "was changed" in error.text


def test_no_file_and_an_empty_one_are_clear_errors(path: Path) -> None:
    with pytest.raises(FedwardError, match="cannot read the ledger"):
        verify(path)
    path.touch()
    with pytest.raises(FedwardError, match="is empty"):
        verify(path)

"""Decisions of persons: letting a study in, or putting an end to it.

The hospital's policy names who may decide, each with an Ed25519 public key. A person signs their
decision, and the ledger keeps the signature: an approval can be proven to be that person's, and the
site's own key alone approves nothing. What is signed names the ledger (the SHA-256 of its first
line) and the moment, so that it serves once, and in no other ledger.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Literal

from common.identity import Identity, verify
from common.privacy.lines import Decision

Verdict = Literal["approve", "revoke"]


def decide(
    person: Identity,
    approver: str,
    verdict: Verdict,
    ledger: str,
    study_hash: str,
    *,
    reserve: str = "",
    expires: str | None = None,
    at: datetime | None = None,
) -> Decision:
    """Signs a decision.

    Args:
        approver: The person's name in the policy.
        ledger: `Book.ledger_id`.
        reserve: What an approval sets aside: `common.privacy.lines.reserve_hash`.
        expires: Of an approval.
        at: When it was made; now by default.
    """
    moment = (at or datetime.now(UTC)).isoformat(timespec="milliseconds")
    said = _statement(verdict, ledger, study_hash, moment, reserve, expires)
    return Decision(
        approver=approver, public_key=person.public, at=moment, signature=person.sign(said).hex()
    )


def stands(
    decision: Decision,
    verdict: Verdict,
    ledger: str,
    study_hash: str,
    *,
    reserve: str = "",
    expires: str | None = None,
) -> bool:
    """Whether the decision's key signed exactly this."""
    said = _statement(verdict, ledger, study_hash, decision.at, reserve, expires)
    return verify(decision.public_key, said, bytes.fromhex(decision.signature))


def _statement(
    verdict: Verdict, ledger: str, study_hash: str, at: str, reserve: str, expires: str | None
) -> bytes:
    fields = {
        "verdict": verdict,
        "ledger": ledger,
        "study": study_hash,
        "at": at,
        "reserve": reserve,
        "expires": expires,
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return b"fedward decision\0" + text.encode()

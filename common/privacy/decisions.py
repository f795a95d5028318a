"""Decisions of persons: letting a study in, or putting an end to it.

The hospital's policy names who may decide, each with an Ed25519 public key. A person signs the
statement of their decision; the ledger keeps the signature, so that an approval can be proven to be
that person's, and the site's own key alone approves nothing.
"""

from __future__ import annotations

import json
from typing import Literal

from common.identity import Identity, verify
from common.privacy.lines import Decision

Verdict = Literal["approve", "revoke"]


def statement(
    verdict: Verdict, site: str, study_hash: str, *, runs: int = 0, expires: str | None = None
) -> bytes:
    """What a person signs."""
    fields = {
        "verdict": verdict,
        "site": site,
        "study": study_hash,
        "runs": runs,
        "expires": expires,
    }
    return (
        b"fedward decision\0" + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    )


def decide(said: bytes, approver: str, identity: Identity) -> Decision:
    """Signs a statement."""
    return Decision(
        approver=approver, public_key=identity.public, signature=identity.sign(said).hex()
    )


def stands(decision: Decision, said: bytes) -> bool:
    """Whether the decision's key signed exactly this statement."""
    return verify(decision.public_key, said, bytes.fromhex(decision.signature))

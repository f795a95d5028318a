"""A site's state folder: what must be there before anything is done with it."""

from __future__ import annotations

from pathlib import Path

from common.errors import PrivacyError
from common.identity import Identity

LEDGER = "ledger.jsonl"
PAUSED = "paused"
"""While this file is there, nothing is charged or released."""
_KEY = "site.key"


def open_identity(state: Path, site: str) -> Identity:
    """The site's identity, created with the folder.

    Raises:
        PrivacyError: Ledger or key is gone, though the folder shows that it was there. Neither is
            begun anew: what was released could no longer be counted, or be shown to be counted.
    """
    ledger = state / LEDGER
    there = ledger.exists() and ledger.stat().st_size > 0
    if not there and any((state / name).exists() for name in ("population.key", "ledger.head")):
        raise PrivacyError(
            f"the ledger of site '{site}' is gone from {state}: what was released can no longer be "
            "counted",
            cure=f"restore {LEDGER} from the backup",
        )
    if there and not (state / _KEY).exists():
        raise PrivacyError(
            f"the key of site '{site}' is gone from {state}: nobody can go on with its ledger",
            cure=f"restore {_KEY} from the backup",
        )
    return Identity.open(state / _KEY)

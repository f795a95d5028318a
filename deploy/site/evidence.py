"""Receipts beside a ledger: what tells, of a ledger that looks whole, that it is an old one.

`ledger.head` is the receipt of the last line written here, `ledger.receipts` holds those that
others showed (`common.privacy.chain` writes both). Here they are read without opening the ledger;
what is damaged proves nothing and is passed over.
"""

from __future__ import annotations

from pathlib import Path

from client.site.daemon.state import LEDGER
from common.errors import FedwardError
from common.files import write_atomically
from common.privacy.book import Book
from common.privacy.receipts import Receipt

HEAD = "ledger.head"
RECEIPTS = "ledger.receipts"


def receipts_of(state: Path) -> list[Receipt]:
    """The genuine receipts that lie beside a ledger."""
    path = state / RECEIPTS
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    found = [_head(state), *(_genuine(line) for line in lines)]
    return [receipt for receipt in found if receipt is not None]


def lacking_receipt(state: Path) -> Receipt | None:
    """The furthest receipt beside a ledger whose line it lacks."""
    if not (state / LEDGER).exists():
        return None
    try:
        book = Book.read(state / LEDGER)
    except FedwardError:
        return None  # `fedward audit verify` says why; the daemon does not start
    missing = [r for r in receipts_of(state) if not book.holds(r)]
    return max(missing, key=lambda r: r.place, default=None)


def keep_evidence(old: Path, made: Path) -> None:
    """Carries what a replaced state folder knows of later lines into the restored one: the newer
    head, and every receipt."""
    before, after = old / RECEIPTS, made / RECEIPTS
    if before.exists():
        known = after.read_text() if after.exists() else ""
        held = before.read_text(errors="replace").split("\n")
        more = [line for line in held if line not in known.split("\n")]
        if more:
            write_atomically(after, "\n".join([known, *more, ""]))
    ours, theirs = _head(made), _head(old)
    if theirs is not None and (ours is None or ours.place < theirs.place):
        write_atomically(made / HEAD, (old / HEAD).read_bytes())


def _head(state: Path) -> Receipt | None:
    try:
        return _genuine((state / HEAD).read_text(errors="replace"))
    except OSError:
        return None


def _genuine(text: str) -> Receipt | None:
    try:
        found = Receipt.model_validate_json(text)
    except ValueError:
        return None
    return found if found.genuine else None

"""What was done to a ledger that does not hold, as far as its bytes tell.

`Book` says which rule a line breaks. Which tampering that was shows in the lines around it: a line
that was moved stands somewhere else, one that was removed stands nowhere, one that was changed no
longer carries its own signature.
"""

from __future__ import annotations

import re

from common.audit.findings import Finding, error
from common.audit.reading import Reading
from common.identity import verify
from common.privacy.lines import START, hash_of, split

_RESTORE = "restore the ledger from its backup; never edit it"
_PREVIOUS = re.compile(rb'^\{"previous":"([0-9a-f]{64})"')


def tampering(reading: Reading) -> Finding | None:
    """The finding about the first broken line; None where none is."""
    broken = reading.broken
    if broken is None:
        return None
    told = {
        "chain-broken": _chain,
        "signature-invalid": _signature,
        "genesis-misplaced": _genesis,
        "line-unreadable": _unreadable,
    }.get(broken.rule, _unsigned)
    rule, text, cure = told(reading) or (broken.rule, broken.message, broken.cure)
    return error(rule, text, cure, line=broken.number)


_Told = tuple[str, str, str]


def _chain(reading: Reading) -> _Told:
    """`previous` is not the hash of the line above."""
    book, raws = reading.book, reading.raws
    here = len(book.lines)  # of the broken line, from 0
    raw, number = raws[here], here + 1
    if hash_of(raw) in book.heads:
        earlier = book.heads.index(hash_of(raw)) + 1
        return "line-repeated", f"line {number} repeats line {earlier}", _RESTORE
    later = [i for i in range(here + 1, len(raws)) if _previous(raws[i]) == book.head]
    if later:
        if _previous(raw) in {hash_of(other) for other in raws}:
            text = f"lines were swapped or moved: what follows line {here} stands in line "
            return "lines-swapped", f"{text}{later[0] + 1}", _RESTORE
        text = f"a line was inserted: line {later[0] + 1} follows from line {here}"
        return "line-inserted", text, _RESTORE
    if book.public_key and not _by(book.public_key, raw):
        return "line-changed", "the line was changed after it was signed", _RESTORE
    if split(reading.raws[here - 1])[1] is None:  # nothing but this link protects line `here`
        text = f"line {here} was changed, or lines after it were removed (they were not signed)"
        return "line-changed", text, _RESTORE
    text = f"one or more lines between line {here} and this one were removed"
    return "line-removed", text, _RESTORE


def _signature(reading: Reading) -> _Told | None:
    """The link holds, the signature does not."""
    book, raws = reading.book, reading.raws
    here = len(book.lines)
    if any(_by(key, raws[here]) for key in book.keys[:-1]):
        text = "signed with a key that the site had given up before (see its `key-rotated` line)"
        return "key-retired", text, _RESTORE
    if here + 1 == len(raws):
        return None
    if _previous(raws[here + 1]) != hash_of(raws[here]):
        return "line-changed", "the line was changed after it was signed", _RESTORE
    text = "signed by another key than the site's, and the lines below follow from it"
    return "key-foreign", text, "ask the site for the ledger that its own key signed"


def _genesis(reading: Reading) -> _Told:
    here = len(reading.book.lines)
    if here:
        text = f"another ledger begins here; only lines 1 to {here} belong to the first"
        return "ledgers-joined", text, "verify each ledger in a file of its own"
    if any(_previous(raw) == START for raw in reading.raws):
        return "lines-swapped", "the first line stands further below", _RESTORE
    return "start-missing", "the beginning of the ledger was cut off", _RESTORE


def _unreadable(reading: Reading) -> _Told | None:
    """A line that the site did sign is no damage: a later version wrote it."""
    key = reading.book.public_key
    if key is None or not _by(key, reading.raws[len(reading.book.lines)]):
        return None
    text = "the site signed this line, but this version of Fedward does not understand it"
    return "line-unknown", text, "verify with the version that wrote the ledger, or a later one"


def _unsigned(reading: Reading) -> _Told | None:
    """A rule is broken by a line that nothing but the link of the next one protects."""
    here = len(reading.book.lines)
    if here + 1 >= len(reading.raws) or split(reading.raws[here])[1] is not None:
        return None
    if _previous(reading.raws[here + 1]) == hash_of(reading.raws[here]):
        return None
    return "line-changed", "the line was changed: the one below does not follow from it", _RESTORE


def _previous(raw: bytes) -> str | None:
    found = _PREVIOUS.match(raw)
    return found[1].decode() if found else None


def _by(key: str, raw: bytes) -> bool:
    body, signature = split(raw)
    return signature is not None and verify(key, body, signature)

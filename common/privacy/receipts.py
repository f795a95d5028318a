"""Receipts: a ledger's head, signed by its site and kept by others.

A chain of signed lines proves that it is a prefix of what was written, not that it is all of it.
Whoever holds a receipt can tell a ledger that was cut, or replaced by an older copy: the receipt's
line is not in it. The coordinator keeps the receipt of every answer, the printed report shows one.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedwardError
from common.files import write_atomically
from common.identity import Identity, verify
from common.privacy.fields import Hash

log = logging.getLogger("fedward")

_MOST_ANCESTORS = 64  # of 2^63 lines: a receipt stays small, whoever made it


class Receipt(BaseModel):
    """A signed head.

    Attributes:
        lines: Number of lines of the ledger, the head's included.
        head: SHA-256 of the last of them.
        approvals: Approvals (and reconciled losses) so far, and `approvals_hash` the chain of what
            they set aside (`common.privacy.lines.chained`): what a restored backup lost can be told
            exactly.
        ancestors: SHA-256 of earlier lines, by number: 1, 2, 4, 8 … before the last, and the first.
            They tell where a ledger that lost lines parted from the one that had them.
        epoch: Rises with every loss that was reconciled: line numbers are used again after one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    public_key: Hash
    lines: int = Field(ge=1, lt=2**63)
    head: Hash
    approvals: int = Field(ge=0)
    approvals_hash: Hash
    ancestors: Annotated[tuple[tuple[int, Hash], ...], Field(max_length=_MOST_ANCESTORS)] = ()
    epoch: int = Field(default=0, ge=0, lt=2**63)
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")] = ""

    def statement(self) -> bytes:
        """What is signed."""
        fields = self.model_dump(mode="json", exclude={"signature"})
        return (
            b"fedward receipt\0"
            + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        )

    def sealed(self, identity: Identity) -> Receipt:
        """The receipt with its signature."""
        return self.model_copy(update={"signature": identity.sign(self.statement()).hex()})

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and line: what a later receipt has more of."""
        return self.epoch, self.lines

    @property
    def genuine(self) -> bool:
        """Whether `public_key` signed it. Whose key that is, the reader must know."""
        return verify(self.public_key, self.statement(), bytes.fromhex(self.signature))


class Receipts:
    """The furthest receipt of each site, by site and key: what a coordinator, or another hospital,
    keeps of the ledgers that it heard of.

    Args:
        path: File that keeps them; None keeps them in memory.

    Raises:
        FedwardError: The file holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._kept: dict[tuple[str, str], Receipt] = {}
        if path is not None and path.exists():
            try:
                for fields in json.loads(path.read_text()):
                    receipt = Receipt.model_validate(fields)
                    self._kept[receipt.site, receipt.public_key] = receipt
            except (ValidationError, ValueError, TypeError):
                raise FedwardError(
                    f"{path} holds no receipts", cure="restore it from the backup, or remove it"
                ) from None

    def take(self, site: str, public_key: str, fields: Any) -> None:
        """Keeps a receipt if it is the site's, genuine, and further than the last."""
        try:
            receipt = Receipt.model_validate(fields)
        except ValidationError:
            return
        if (receipt.site, receipt.public_key) != (site, public_key) or not receipt.genuine:
            log.warning("a receipt that is said to be of site %s is not its own", site)
            return
        with self._mutex:
            before = self._kept.get((site, public_key))
            if before is None or before.place < receipt.place:
                self._kept[site, public_key] = receipt
                self._save()

    def latest(self, site: str) -> Receipt | None:
        """The furthest receipt of a site."""
        found = [r for (name, _), r in self._kept.items() if name == site]
        return max(found, key=lambda r: r.place, default=None)

    def of(self, sites: Iterable[str]) -> tuple[dict[str, Any], ...]:
        """The receipts of these sites, as a request carries them."""
        names = set(sites)
        return tuple(r.model_dump(mode="json") for r in self._kept.values() if r.site in names)

    def _save(self) -> None:
        if self._path is None:
            return
        kept = [receipt.model_dump(mode="json") for receipt in self._kept.values()]
        write_atomically(self._path, json.dumps(kept, indent=1))


def read_receipts(paths: Iterable[Path]) -> list[Receipt]:
    """Receipts in files: one JSON object or list per file, one per line, or a run's `report.json`,
    whose sites carry them.

    Raises:
        FedwardError: Naming the file that holds no receipt.
    """
    found: list[Receipt] = []
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not text"
            raise FedwardError(f"cannot read the receipt {path} ({why})") from None
        try:
            some = _objects(text)
            found += [Receipt.model_validate(item) for item in some]
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            some = []
        if not some:
            raise FedwardError(
                f"{path} holds no receipt",
                cure="give a file of `fedward site receipt`, or a run's report.json",
            )
    return found


def _objects(text: str) -> list[object]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(whole, dict) and isinstance(whole.get("sites"), list):
        return [site["receipt"] for site in whole["sites"] if site.get("receipt")]
    return whole if isinstance(whole, list) else [whole]

"""The file of a ledger: one writer at a time, signed lines, durable before they count.

One rule for an unfinished last line (power cut, full disk): whatever it stood for waits for the
fsync, so an unfinished line can only be a charge that nothing followed. If it still reads as a
whole line of the chain it is ended and counts as spent; if not, it is moved to `ledger.torn` beside
the ledger and a `recovered` line records its length and SHA-256. A line that `ledger.head` says was
whole once is damaged, not unfinished: nothing is moved, and the ledger cannot be opened.

Beside the ledger lie `ledger.head`, the receipt of the last line written here, and
`ledger.receipts`, those that others showed and that the ledger lacked. They are what makes a
restored backup, or a ledger that was cut, show.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from common.errors import PrivacyError
from common.files import sync_folder, write_atomically
from common.identity import Identity
from common.privacy.book import Book, LedgerError
from common.privacy.lines import KeyRotated, Line, Recovered, body_of, signed
from common.privacy.receipts import Receipt

log = logging.getLogger(__name__)

L = TypeVar("L", bound=Line)


class Chain:
    """A ledger file, shared safely between threads and processes.

    Attributes:
        path: The JSONL file, mode 0600.
        book: All lines read so far, and what follows from them.
        behind: A receipt whose line this ledger lacks; None is as it should be.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path, self.book = path, Book()
        self.behind: Receipt | None = None
        self._identity = identity
        self._compared = False
        self._offset = 0
        self._mutex = threading.Lock()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file under its exclusive lock, with everything in it read and checked."""
        with self._mutex:
            begin = 0 if self.book.lines else os.O_CREAT  # never anew once it was there
            file = os.open(self.path, os.O_RDWR | begin | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read(file)
                yield file
            finally:
                os.close(file)  # releases the lock

    def _append(self, file: int, kind: Callable[..., L], **fields: Any) -> L:
        """Signs and writes a line; durable when this returns."""
        line = kind(previous=self.book.head, at=self._time(), **fields)
        body = body_of(line)
        raw = signed(body, self._identity.sign(body))
        self.book.check(raw)  # what an auditor would not accept is never written
        _write_all(file, raw + b"\n")
        os.fsync(file)
        self._admit(line, raw)
        return line

    def _time(self) -> str:
        """Now; but time never runs backwards in a ledger."""
        return max(now(), self.book.last_at)

    # -- reading ------------------------------------------------------------------------------

    def _read(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size < self._offset:
            raise PrivacyError(
                f"{self.path} became shorter while in use: charges are missing",
                cure="restore it from the backup; never edit a ledger",
            )
        fresh = os.pread(file, size - self._offset, self._offset)
        *whole, tail = fresh.split(b"\n")
        for raw in whole:
            try:
                self.book.take(raw)
            except LedgerError as error:
                raise error.at(self.path) from None
            self._offset += len(raw) + 1
        if tail:
            self._recover(file, tail)
        if not self._compared:
            for receipt in self._kept_receipts():
                self._hold(receipt)
            self._compared = True
            if self.book.lines:
                self._record_torn(file)
                self._keep_head()

    def _recover(self, file: int, tail: bytes) -> None:
        try:
            line = self.book.check(tail)
        except LedgerError:
            number = len(self.book.lines) + 1
            if any(receipt.lines >= number for receipt in self._kept_receipts()):
                raise LedgerError(
                    "line-damaged",
                    number,
                    "the last line was whole when it was written and is damaged now",
                ).at(self.path) from None
            self._set_aside(file, tail)
        else:
            log.warning("%s: the last line was whole but not ended; it counts as spent", self.path)
            _write_all(file, b"\n")
            os.fsync(file)
            self._admit(line, tail)

    def _set_aside(self, file: int, tail: bytes) -> None:
        if self.book.public_key not in (None, self._identity.public):
            raise PrivacyError(
                f"{self.path} ends in an unfinished line, and the site's key is not its signer's",
                cure="restore site.key and ledger.jsonl from the same backup",
            )
        aside = self.path.with_name("ledger.torn")
        with aside.open("ab") as torn:
            os.fchmod(torn.fileno(), 0o600)
            torn.write(tail + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        sync_folder(self.path.parent)
        os.ftruncate(file, self._offset)
        log.warning(
            "%s: an unfinished last line of %d bytes, which no release followed, was moved to %s",
            self.path,
            len(tail),
            aside,
        )
        self._record_torn(file)

    def _record_torn(self, file: int) -> None:
        """One `recovered` line for each entry of `ledger.torn` that has none: also after a crash
        between setting it aside and recording it."""
        if self.book.public_key != self._identity.public:
            return
        aside = self.path.with_name("ledger.torn")
        known = {line.torn_sha256 for line in self.book.lines if isinstance(line, Recovered)}
        for tail in aside.read_bytes().split(b"\n") if aside.exists() else ():
            sha256 = hashlib.sha256(tail).hexdigest()
            if tail and sha256 not in known:
                known.add(sha256)
                self._append(file, Recovered, torn_bytes=len(tail), torn_sha256=sha256)

    def _admit(self, line: Line, raw: bytes) -> None:
        self.book.admit(line, raw)
        self._offset += len(raw) + 1
        if not isinstance(line, KeyRotated):  # its receipt is the new key's to sign
            self._keep_head()

    # -- receipts -----------------------------------------------------------------------------

    @property
    def _receipts(self) -> Path:
        return self.path.with_name("ledger.receipts")

    @property
    def _head(self) -> Path:
        return self.path.with_name("ledger.head")

    def _receipt(self) -> Receipt:
        return Receipt(
            site=self.book.site,
            public_key=self._identity.public,
            lines=len(self.book.lines),
            head=self.book.head,
            approvals=self.book.approvals,
            approvals_hash=self.book.approvals_hash,
            ancestors=self.book.ancestors,
            epoch=self.book.epoch,
        ).sealed(self._identity)

    def _keep_head(self) -> None:
        """Not while lines are missing: the head that says so must outlive this process."""
        if self.behind is not None or not self._compared:
            return
        write_atomically(self._head, self._receipt().model_dump_json())

    def _kept_receipts(self) -> list[Receipt]:
        head = self._head.read_text(errors="replace").strip() if self._head.exists() else None
        kept = (
            self._receipts.read_text(errors="replace").split("\n")
            if self._receipts.exists()
            else []
        )
        found = []
        for text in [*kept, *([head] if head is not None else [])]:
            try:
                receipt = Receipt.model_validate_json(text) if text or text is head else None
            except ValidationError:
                if text is head:
                    raise PrivacyError(
                        f"{self._head} is damaged: whether the ledger lacks lines cannot be told",
                        cure="restore it from the backup; if there is none, remove it and have the "
                        "coordinators show their receipts",
                    ) from None
                log.warning("a line of %s is damaged; it is passed over", self._receipts)
                continue
            if receipt is not None and receipt.genuine:
                found.append(receipt)
        return found

    def _keep_receipt(self, receipt: Receipt) -> None:
        handle = os.open(self._receipts, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"\n{receipt.model_dump_json()}\n")  # whatever was torn before ends here
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)

    def _hold(self, receipt: Receipt) -> None:
        """Compares a receipt that this site once signed; the furthest that is lacking stands."""
        if self.book.holds(receipt):
            return
        if self.behind is None or receipt.place > self.behind.place:
            self.behind = receipt
            log.error(
                "%s lacks line %d, which a receipt names: nothing is released until it is restored "
                "or reconciled",
                self.path,
                receipt.lines,
            )


def now() -> str:
    """The time as lines state it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]

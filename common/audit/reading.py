"""Reading a ledger for an audit: as far as it holds, and why no further.

Every line goes through the fold that the daemon uses (`common.privacy.book`). The first line that
breaks a rule ends the reading: what stands below it proves nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path

from common.errors import FedwardError, PrivacyError
from common.privacy.book import Book, LedgerError, raw_lines


@dataclass(frozen=True)
class Reading:
    """A ledger file, read.

    Attributes:
        raws: All whole lines of the file, without their ends; those below a broken one too.
        book: The state after the last line that holds.
        broken: The rule that the next line breaks; None where the whole file holds.
    """

    path: Path
    raws: tuple[bytes, ...]
    book: Book
    broken: LedgerError | None

    def until(self, end: datetime) -> Book:
        """The state after the lines dated `end` or earlier."""
        book = Book()
        for raw, line in zip(self.raws, self.book.lines, strict=False):
            if moment(line.at) > end:
                break
            book.admit(line, raw)
        return book

    @property
    def file_sha256(self) -> str:
        """Of the file as it lies there."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read(path: Path) -> Reading:
    """Reads a ledger file, or the one in a site's state folder.

    Raises:
        FedwardError: There is no file, or it is empty.
    """
    path = path / "ledger.jsonl" if path.is_dir() else path
    book, raws, broken = Book(), [], None
    try:
        for raw in raw_lines(path):
            raws.append(raw)
            if broken is None:
                try:
                    _take(book, raw)
                except LedgerError as error:
                    broken = error
    except LedgerError as error:  # the last line is not ended
        broken = broken or error
    return Reading(path, tuple(raws), book, broken)


def _take(book: Book, raw: bytes) -> None:
    """Takes a line in. A value that has the right form but no meaning (noise so small that nothing
    can be computed from it) breaks a rule too."""
    try:
        book.take(raw)
    except LedgerError:
        raise
    except (PrivacyError, ValueError, TypeError, ArithmeticError) as error:
        raise LedgerError(
            "line-unreadable", len(book.lines) + 1, f"holds a value without a meaning: {error}"
        ) from None


def moment(text: str) -> datetime:
    """The time that a line states, in UTC."""
    return datetime.fromisoformat(text)


def end_of(text: str) -> datetime:
    """The last moment that a person's date means: a bare date is the whole day, in UTC.

    Raises:
        FedwardError: No date.
    """
    try:
        if len(text) == len("2026-01-31"):
            return datetime.combine(date.fromisoformat(text), time.max, UTC)
        found = datetime.fromisoformat(text)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise FedwardError(
            f"'{text}' is no date", cure="write 2026-01-31, or 2026-01-31T12:00:00+01:00"
        ) from None

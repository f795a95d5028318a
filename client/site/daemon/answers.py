"""Answers to charged requests, kept so that the same request gets the same bytes.

Asking again therefore costs nothing, and nothing can be learned from it.
"""

from __future__ import annotations

from pathlib import Path

from common.files import write_atomically

_HEX = frozenset("0123456789abcdef")


class Answers:
    """A folder of packed answers, one file per request digest, mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self, digest: str) -> bytes | None:
        """The stored bytes, or None."""
        try:
            return self._path(digest).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, digest: str, packed: bytes) -> None:
        """Stores an answer whole and durably, or raises `OSError` and stores nothing."""
        write_atomically(self._path(digest), packed)

    def forget(self, digest: str) -> None:
        """Removes an answer that nobody can ask for any more."""
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise ValueError("not a digest")
        return self.folder / f"{digest}.answer"

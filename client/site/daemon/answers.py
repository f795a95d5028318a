"""Answers to charged requests, kept so that the same request gets the same bytes.

Asking again therefore costs nothing, and nothing can be learned from it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

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
        write_durably(self._path(digest), packed)

    def forget(self, digest: str) -> None:
        """Removes an answer that nobody can ask for any more."""
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise ValueError("not a digest")
        return self.folder / f"{digest}.answer"


def write_durably(path: Path, data: bytes, *, once: bool = False) -> None:
    """Replaces `path` (mode 0600) when the new content is complete and on disk.

    Args:
        once: Keep what is there already; of several processes the first one wins.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if once:
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

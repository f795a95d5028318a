"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o600, once: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well: complete, and on disk.

    It is another file until then, so that a reader, a crash or a full disk meets the old content;
    an error leaves nothing behind. A link at `path` is replaced, not followed.

    Args:
        mode: Of the new file, less the umask.
        once: Keep what is there already; of several processes the first one wins.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if once:
            with suppress(FileExistsError):
                os.link(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(
    path: Path, content: str | bytes, *, mode: int = 0o600, once: bool = False
) -> None:
    """Writes a whole file as `atomic_file` does; text in UTF-8."""
    with atomic_file(path, mode=mode, once=once) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Makes durable which files a folder holds."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

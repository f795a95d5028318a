"""Backup of a site: one encrypted archive, made while the daemon runs.

What is backed up and why: docs/backup.md.
"""

from __future__ import annotations

import fcntl
import io
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from client.site.daemon.state import LEDGER
from client.site.encoders.vault import DATABASE
from common.files import sync_folder
from deploy.enrolment import EnrolmentRequest
from deploy.site.archive import PLAIN, VAULT, Contents, Writer, inspect, writing
from deploy.site.layout import SiteFolder
from deploy.site.sealing import BackupError, Header
from deploy.site.setup import insist_usual


def backup(root: Path, destination: Path, passphrase: str, *, with_vault: bool = False) -> Contents:
    """Writes one encrypted archive and reads it back. The daemon may go on running.

    Args:
        destination: File to write; must not exist.
        with_vault: Also the embeddings: a copy of them keeps what a later erasure destroys.

    Raises:
        BackupError: Nothing was written.
    """
    folder = SiteFolder(root)
    insist_usual(folder)
    if not passphrase:
        raise BackupError("the passphrase is empty", cure="give one of at least five random words")
    if destination.exists():
        raise BackupError(f"{destination} exists already", cure="choose another name")
    header = Header.new(EnrolmentRequest.read(folder.request).site)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as out:
            with writing(out, header, passphrase) as writer:
                _add(writer, folder, with_vault)
            out.flush()
            os.fsync(out.fileno())
        contents = inspect(partial, passphrase)
        if contents.files != writer.files:
            raise BackupError(
                f"{destination} does not read back as it was written", cure="check the disk"
            )
        os.link(partial, destination)  # fails where another process was first
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(destination.absolute().parent)
    return contents


def _add(writer: Writer, folder: SiteFolder, with_vault: bool) -> None:
    with _ledger_at_rest(folder):
        for name in PLAIN:
            path = folder.root / name
            if os.path.lexists(path):
                with _own(path) as file:
                    there, data = os.fstat(file.fileno()), file.read()
                writer.add(name, io.BytesIO(data), len(data), there.st_mode, there.st_mtime)
    if with_vault:
        for name in VAULT:
            with _snapshot(folder.root / name) as file:
                there = os.fstat(file.fileno())
                writer.add(name, file, there.st_size, 0o600, there.st_mtime)


def _own(path: Path) -> IO[bytes]:
    """The file itself, to be read. The relay's user could lay a link to a file of patients into
    `relay/`, and a restore would hand its content over."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BackupError(f"{path} is a link, or no file", cure="put the file itself there")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


@contextmanager
def _ledger_at_rest(folder: SiteFolder) -> Iterator[None]:
    """Holds the ledger's lock, so that ledger and head are of one moment and no line is half
    written."""
    path = folder.state / LEDGER
    if not path.exists():
        yield
        return
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _snapshot(path: Path) -> Iterator[IO[bytes]]:
    """A file of the vault as of one moment; SQLite copies the database, encrypted as it is."""
    if path.name != DATABASE:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".backup-") as copy:
        source, target = sqlite3.connect(path, timeout=60), sqlite3.connect(copy.name)
        try:
            source.backup(target)
        finally:
            target.close()
            source.close()
        with open(copy.name, "rb") as file:
            yield file

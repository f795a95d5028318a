"""Restore of a site from its backup: a whole folder, or single files that are missing.

An older ledger over a newer one would let patients be spent twice. So a ledger that can be read is
never replaced by an earlier one, and a restored site is paused until a person has compared it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.site.daemon.state import LEDGER
from common.errors import FedwardError
from common.files import sync_folder
from common.privacy.book import Book
from common.privacy.receipts import Receipt
from deploy.site.archive import Contents, Hashing, inspect, read
from deploy.site.evidence import keep_evidence, lacking_receipt
from deploy.site.layout import LayoutError, SiteFolder
from deploy.site.sealing import CHUNK, BackupError
from deploy.site.setup import Owners, keep_owner, pause, paused_path


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        aside: Where the folder that was there lies now; None if there was none.
        lacking: The receipt of a line that the restored ledger lacks; None if nothing shows that it
            lacks any.
    """

    contents: Contents
    aside: Path | None
    lacking: Receipt | None


def restore(
    archive: Path,
    root: Path,
    passphrase: str,
    *,
    replace: bool = False,
    owners: Owners | None = None,
) -> Restored:
    """Makes a site's folder from an archive, after all of it was checked. The site is paused: only
    receipts that others keep can tell that a ledger is an old one.

    Args:
        replace: Moves a folder that is there aside, and keeps what it knows of later lines.
        owners: Of the files; by default, those of the folder that is replaced.

    Raises:
        FedwardError: The archive cannot be used; the folder holds something; its daemon runs; or
            its ledger is newer, or another one. Nothing was written.
    """
    root = root.absolute()
    old, contents = SiteFolder(root), inspect(archive, passphrase)
    occupied = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if occupied and not replace:
        raise LayoutError(
            f"{root} is not empty",
            cure="give another folder; or --replace, which moves this one aside",
        )
    if occupied:
        if not old.state.is_dir():
            raise LayoutError(f"{root} is no site's folder", cure="give another folder")
        _insist_stopped(old)
        _insist_older(old, contents)
        owners = owners or Owners.of(old)
    root.parent.mkdir(parents=True, exist_ok=True)
    made = SiteFolder(Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent)))
    aside = root.with_name(f"{root.name}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
    try:
        _extract(archive, passphrase, made)
        if occupied:
            keep_evidence(old.state, made.state)
        lacking = lacking_receipt(made.state)
        if not paused_path(made).exists():
            pause(made.root, f"restored from {archive}: compare it with every receipt first")
        config = made.relay.config()
        socket = _socket(made)
        if socket.is_relative_to(made.root):
            socket = root / socket.relative_to(made.root)
        made.relay.configure(config.model_copy(update={"socket": socket}))
        (owners or Owners()).apply(made)
        if occupied:
            os.rename(root, aside)
        os.rename(made.root, root)
    except BaseException:
        shutil.rmtree(made.root, ignore_errors=True)
        if occupied and aside.exists() and not root.exists():
            os.rename(aside, root)
        raise
    sync_folder(root.parent)
    return Restored(contents, aside if occupied else None, lacking)


def restore_missing(archive: Path, root: Path, passphrase: str, names: tuple[str, ...]) -> None:
    """Puts single files of an archive back into a site's folder, where they are missing.

    Args:
        names: Paths as the archive lists them, such as `state/site.key`.

    Raises:
        FedwardError: The archive has no such file, or the folder has it; nothing was written.
    """
    folder, contents = SiteFolder(root.absolute()), inspect(archive, passphrase)
    _insist_stopped(folder)
    for name in names:
        if name not in contents.files:
            raise BackupError(
                f"{archive} has no file '{name}'", cure=f"it has {', '.join(contents.files)}"
            )
        if os.path.lexists(folder.root / name):
            raise BackupError(
                f"{folder.root / name} exists", cure="move it away if it is damaged; keep it"
            )
    with tempfile.TemporaryDirectory(prefix=".restore.", dir=folder.root) as inside:
        staged = SiteFolder(Path(inside))
        _extract(archive, passphrase, staged, names)
        for name in names:
            target = folder.root / name
            keep_owner(staged.root / name, target.parent)
            os.link(staged.root / name, target)  # never over another file
            sync_folder(target.parent)


def _extract(
    archive: Path, passphrase: str, folder: SiteFolder, only: tuple[str, ...] | None = None
) -> None:
    for path in (folder.state, folder.socket.parent, folder.relay.root, folder.relay.flower):
        path.mkdir(mode=0o700)

    def write(name: str, source: Hashing, mode: int) -> None:
        if only is not None and name not in only:
            return
        target = folder.root / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o777)
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())

    read(archive, passphrase, write)


def _insist_stopped(folder: SiteFolder) -> None:
    lock = Path(f"{_socket(folder)}.lock")
    if not lock.exists():
        return
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(
                f"the daemon of {folder.root} runs", cure="stop it, and its relay, first"
            ) from None


def _socket(folder: SiteFolder) -> Path:
    """Where the daemon listens; the usual place if site.toml cannot be read."""
    try:
        named = tomllib.loads(folder.config_file.read_text())["socket"]
        return folder.root / Path(str(named)).expanduser()
    except (OSError, ValueError, KeyError, RuntimeError):  # the last: ~nobody
        return folder.socket


def _insist_older(folder: SiteFolder, contents: Contents) -> None:
    """Refuses to put a ledger over one that can still be read, unless it goes on with it."""
    path = folder.state / LEDGER
    if not path.exists():
        return
    try:
        Book.read(path)
    except FedwardError as error:
        if getattr(error, "rule", "") != "line-unfinished":
            return  # damaged: what ledger.head still tells is kept
    here, kept = (data.split(b"\n")[:-1] for data in (path.read_bytes(), contents.ledger))
    if kept[: len(here)] == here:
        return
    if here[: len(kept)] == kept:
        raise BackupError(
            f"{path} is whole and has {len(here)} lines, the archive's {len(kept)}: an older "
            "ledger over a newer one would let patients be spent twice",
            cure="keep this ledger; put back what is missing with --only, such as "
            "`--only state/site.key`",
        )
    raise BackupError(
        f"{path} is whole, and the archive's (site '{contents.header.site}') is another one",
        cure="restore into a folder of its own, and see docs/backup.md which one charged last",
    )

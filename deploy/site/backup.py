"""Backup, restore and upgrade of a site. What is backed up and why: docs/backup.md.

An archive is one header line, JSON, and an encrypted tar stream. The key comes from the passphrase
by scrypt (RFC 7914); the stream is cut into chunks, each sealed with AES-256-GCM under a nonce of
`prefix | number | last?` (STREAM: Hoang, Reyhanitabar, Rogaway and Vizard 2015), with the header as
associated data. So neither chunks nor header can be changed, moved, dropped or cut off. The last
member of the tar is a manifest: SHA-256 of every file.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import struct
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.site.daemon.config import DaemonConfig
from client.site.daemon.state import LEDGER, PAUSED
from client.site.encoders.vault import DATABASE, KEY_FILE
from common.errors import FedwardError
from common.files import sync_folder
from common.privacy.book import Book
from common.privacy.receipts import Receipt
from deploy.enrolment import EnrolmentRequest
from deploy.site.layout import LayoutError, SiteFolder
from deploy.site.setup import Owners, insist_usual, keep_owner, pause, paused_path
from simulations import bundle

HEAD = "ledger.head"
_RECEIPTS = "ledger.receipts"
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_TAG = 16
_HEADER_LIMIT = 4096
_STATE = (
    # The ledger first and its head after it: a head newer than the copy tells what is lacking.
    LEDGER,
    HEAD,
    _RECEIPTS,
    "ledger.torn",
    "witness.json",
    "site.key",
    "population.key",
    "population.fraction",
    "erasure.key",
    PAUSED,
)
_ROOT = ("site.toml", "policy.toml", "roster.json", "invite.json", "request.json")
_RELAY = ("relay.toml", "relay.key", "relay.crt", "ca.crt", "node.key")
_VAULT = (f"state/vault/{DATABASE}", f"state/vault/{KEY_FILE}")
_PLAIN = (*(f"state/{n}" for n in _STATE), *_ROOT, *(f"relay/{n}" for n in _RELAY))

Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class BackupError(FedwardError):
    """An archive that cannot be made or used."""

    code = "backup-invalid"


class Header(BaseModel):
    """First line of an archive: readable, and bound to every chunk.

    Attributes:
        cost, block, lanes: N, r and p of scrypt; 2^17, 8, 1 take 128 MiB and about half a second.
        prefix: First 7 bytes of every nonce.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fedward backup 1"] = "fedward backup 1"
    site: str
    made: datetime
    version: str
    salt: Hex16
    prefix: Annotated[str, Field(pattern=r"^[0-9a-f]{14}$")]
    cost: int = Field(default=2**17, ge=2**14, le=2**20)
    block: int = Field(default=8, ge=8, le=8)
    lanes: int = Field(default=1, ge=1, le=4)

    def cipher(self, passphrase: str) -> AESGCM:
        scrypt = Scrypt(
            salt=bytes.fromhex(self.salt), length=32, n=self.cost, r=self.block, p=self.lanes
        )
        return AESGCM(scrypt.derive(passphrase.encode()))

    def nonce(self, number: int, *, last: bool) -> bytes:
        return bytes.fromhex(self.prefix) + struct.pack(">I?", number, last)


class _Sealing(io.RawIOBase):
    """A stream whose chunks are sealed into `out`; `close` seals the last one."""

    def __init__(self, out: IO[bytes], header: Header, passphrase: str) -> None:
        self._out, self._header = out, header
        self._bound = header.model_dump_json().encode()
        self._cipher = header.cipher(passphrase)
        self._held, self._number = bytearray(), 0
        out.write(self._bound + b"\n")

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._held += data
        while len(self._held) > _CHUNK:  # the last chunk waits: it is marked
            self._seal(bytes(self._held[:_CHUNK]), last=False)
            del self._held[:_CHUNK]
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._seal(bytes(self._held), last=True)
        super().close()

    def _seal(self, chunk: bytes, *, last: bool) -> None:
        nonce = self._header.nonce(self._number, last=last)
        self._out.write(self._cipher.encrypt(nonce, chunk, self._bound))
        self._number += 1


class _Opening(io.RawIOBase):
    """The stream that `_Sealing` took in. Raises `BackupError` at the first chunk that is not as it
    was written; nothing of such a chunk is given out."""

    def __init__(self, source: IO[bytes], path: Path, passphrase: str) -> None:
        self._source, self._path = source, path
        self._bound = source.readline(_HEADER_LIMIT).rstrip(b"\n")
        try:
            self.header = Header.model_validate_json(self._bound)
        except ValidationError:
            raise BackupError(
                f"{path} is no backup of a site, or its first line was changed",
                cure="give the file that `fedward site backup` wrote",
            ) from None
        self._cipher = self.header.cipher(passphrase)
        self._ahead = source.read(_CHUNK + _TAG)
        if not self._ahead:
            raise BackupError(f"{path} was cut short: it holds nothing", cure="use another copy")
        self._held, self._number = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        if not self._held and self._ahead:
            self._held = self._open()
        count = min(len(into), len(self._held))
        into[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def finish(self) -> None:
        """Reads what is left, so that every chunk, the last one too, has been checked."""
        while self.read(_CHUNK):
            pass

    def _open(self) -> bytes:
        chunk, self._ahead = self._ahead, self._source.read(_CHUNK + _TAG)
        nonce = self.header.nonce(self._number, last=not self._ahead)
        self._number += 1
        try:
            return self._cipher.decrypt(nonce, chunk, self._bound)
        except (InvalidTag, ValueError):
            why = (
                "the passphrase is wrong, or the file was changed or cut short"
                if self._number == 1
                else f"it was changed or cut short in chunk {self._number}"
            )
            raise BackupError(
                f"{self._path} cannot be opened: {why}",
                cure="check the passphrase; if it is right, use another copy of the backup",
            ) from None


# -- backup -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What an archive holds.

    Attributes:
        files: SHA-256 by path inside the site's folder.
    """

    header: Header
    files: dict[str, str]
    ledger: bytes
    head: bytes


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
    header = Header(
        site=EnrolmentRequest.read(folder.request).site,
        made=datetime.now(UTC),
        version=version("fedward"),
        salt=os.urandom(16).hex(),
        prefix=os.urandom(7).hex(),
    )
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as out:
            with _Sealing(out, header, passphrase) as sealed:
                written = _write_tar(sealed, folder, with_vault)
            out.flush()
            os.fsync(out.fileno())
        contents = inspect(partial, passphrase)
        if contents.files != written:
            raise BackupError(
                f"{destination} does not read back as it was written", cure="check the disk"
            )
        os.link(partial, destination)  # fails where another process was first
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(destination.absolute().parent)
    return contents


def _write_tar(stream: io.RawIOBase, folder: SiteFolder, with_vault: bool) -> dict[str, str]:
    hashes: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, source: IO[bytes], size: int, mode: int, modified: float) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = size, mode & 0o777, int(modified)
            reader = _Hashing(source)
            tar.addfile(info, reader)
            hashes[name] = reader.sha256.hexdigest()

        with _ledger_at_rest(folder):
            for name in _PLAIN:
                path = folder.root / name
                if os.path.lexists(path):
                    with _own(path) as file:
                        there, data = os.fstat(file.fileno()), file.read()
                    add(name, io.BytesIO(data), len(data), there.st_mode, there.st_mtime)
        if with_vault:
            for name in _VAULT:
                with _snapshot(folder.root / name) as file:
                    there = os.fstat(file.fileno())
                    add(name, file, there.st_size, 0o600, there.st_mtime)
        manifest = json.dumps(hashes, indent=1).encode()
        info = tarfile.TarInfo(_MANIFEST)
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
    return hashes


def _own(path: Path) -> IO[bytes]:
    """The file itself, to be read. The relay's user could lay a link to a file of patients into
    `relay/`, and a restore would hand its content over."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BackupError(f"{path} is a link, or no file", cure="put the file itself there")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


class _Hashing(io.RawIOBase):
    """Reads through, and hashes."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self.sha256 = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sha256.update(data)
        return data


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


# -- reading an archive -------------------------------------------------------------------------


def inspect(archive: Path, passphrase: str) -> Contents:
    """Decrypts the whole archive and holds every file against the manifest; writes nothing.

    Raises:
        BackupError: Wrong passphrase; cut or changed; not as the manifest says.
    """
    kept: dict[str, bytes] = {}

    def hashed(name: str, source: IO[bytes], _: int) -> str:
        data = _Hashing(source)
        if name in (f"state/{LEDGER}", f"state/{HEAD}"):
            kept[name] = data.read()
        while data.read(_CHUNK):
            pass
        return data.sha256.hexdigest()

    header, files = _members(archive, passphrase, hashed)
    return Contents(header, files, kept.get(f"state/{LEDGER}", b""), kept.get(f"state/{HEAD}", b""))


def _members(
    archive: Path, passphrase: str, take: Callable[[str, IO[bytes], int], str]
) -> tuple[Header, dict[str, str]]:
    """Gives each file (name, content, mode) to `take`, which returns its SHA-256."""
    found: dict[str, str] = {}
    manifest: dict[str, str] | None = None
    with archive.open("rb") as file:
        stream = _Opening(file, archive, passphrase)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None:
                        raise BackupError(f"{archive} holds a member that is no file")
                    if member.name == _MANIFEST:
                        manifest = json.loads(content.read())
                    elif member.name in (*_PLAIN, *_VAULT):  # no other name is ever written
                        found[member.name] = take(member.name, content, member.mode)
                    else:
                        raise BackupError(f"{archive} holds an unknown file '{member.name}'")
            stream.finish()
        except (tarfile.TarError, ValueError):
            raise BackupError(f"{archive} is damaged", cure="use another copy of it") from None
    if manifest is None or found != manifest:
        raise BackupError(
            f"{archive} does not hold what its manifest says", cure="use another copy"
        )
    return stream.header, found


# -- restore ------------------------------------------------------------------------------------


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
        lacking = _keep_evidence(old, made) if occupied else _lacking(made.state)
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

    def write(name: str, source: IO[bytes], mode: int) -> str:
        reader = _Hashing(source)
        if only is not None and name not in only:
            while reader.read(_CHUNK):
                pass
            return reader.sha256.hexdigest()
        target = folder.root / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o777)
        with os.fdopen(handle, "wb") as file:
            while data := reader.read(_CHUNK):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return reader.sha256.hexdigest()

    _members(archive, passphrase, write)


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


def _keep_evidence(old: SiteFolder, made: SiteFolder) -> Receipt | None:
    """Carries what the replaced folder knows of later lines into the restored one: the newer head,
    and every receipt."""
    before, after = old.state / _RECEIPTS, made.state / _RECEIPTS
    if before.exists():
        known = after.read_text() if after.exists() else ""
        held = before.read_text(errors="replace").split("\n")
        more = [line for line in held if line not in known.split("\n")]
        if more:
            after.write_text("\n".join([known, *more, ""]))
            after.chmod(0o600)
    head_before, head_after = old.state / HEAD, made.state / HEAD
    ours, theirs = _receipt(head_after), _receipt(head_before)
    if theirs is not None and (ours is None or ours.place < theirs.place):
        shutil.copyfile(head_before, head_after)
        head_after.chmod(0o600)
    return _lacking(made.state)


def _receipt(path: Path) -> Receipt | None:
    """The receipt in a file of one, if it is there and genuine."""
    try:
        found = Receipt.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None
    return found if found.genuine else None


def receipts_of(state: Path) -> list[Receipt]:
    """The genuine receipts that lie beside a ledger."""
    found = [_receipt(state / HEAD)]
    path = state / _RECEIPTS
    for line in path.read_text(errors="replace").split("\n") if path.exists() else ():
        try:
            found.append(Receipt.model_validate_json(line))
        except ValueError:
            continue
    return [r for r in found if r is not None and r.genuine]


def _lacking(state: Path) -> Receipt | None:
    """The furthest receipt beside a ledger whose line it lacks."""
    if not (state / LEDGER).exists():
        return None
    try:
        book = Book.read(state / LEDGER)
    except FedwardError:
        return None  # `fedward audit verify` says why; the daemon does not start
    missing = [r for r in receipts_of(state) if not book.holds(r)]
    return max(missing, key=lambda r: r.place, default=None)


# -- upgrade ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upgrade:
    """A change of the code that the relay may run: its SHA-256 before and after."""

    before: str
    after: str


def plan_upgrade(root: Path) -> Upgrade:
    """Checks that this version reads the site's files, and says what would change.

    Raises:
        FedwardError: Configuration, policy, roster or ledger do not load.
    """
    folder = SiteFolder(root)
    DaemonConfig.load(folder.config_file)
    if (folder.state / LEDGER).exists():
        Book.read(folder.state / LEDGER)
    return Upgrade(folder.relay.config().bundle, bundle.sha256())


def upgrade(root: Path, change: Upgrade) -> None:
    """Lets the relay run the installed version's code, and no other."""
    relay = SiteFolder(root).relay
    relay.configure(relay.config().model_copy(update={"bundle": change.after}))

"""The vault: embeddings encrypted at rest, in one SQLite file per hospital.

Embeddings of notes and images can be turned back into much of their input, so they are guarded
like the records themselves.

* **Keys.** One master key in a file of mode 0600, created on first use. HKDF-SHA256 derives from it
  one subkey per purpose. Every patient has a random data key, stored wrapped by the master key:
  `forget` destroys it, and with it whatever copy of the patient's embeddings is left.
* **Names.** An entry is found by HMAC(subkey, encoder | patient | input), a patient by
  HMAC(subkey, patient): the file tells nobody which patients or inputs it holds. How many there
  are, and how large, it does tell.
* **Integrity.** AES-256-GCM with a random nonce per entry; the associated data bind name, patient
  and encoder fingerprint, so that no entry can stand in for another one, or for another encoder.
* **Durability.** A batch is one transaction, on disk before `write` returns. A process killed at
  any instant loses at most the batch in hand.

Deleted rows are overwritten (`secure_delete`) and the write-ahead log is emptied. What a file
system, an SSD or a backup keeps of overwritten blocks is out of reach from here.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import shutil
import sqlite3
import stat
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.errors import VaultError

DATABASE = "vault.sqlite"
KEY_FILE = "vault.key"
KEY_VARIABLE = "FEDWARD_VAULT_KEY"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_QUERY_ROWS = 500
_START_AGAIN = (
    "restore the vault's folder from the backup, or remove it: the embeddings are then encoded "
    "again from the shard"
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS patients (name BLOB PRIMARY KEY, wrapped BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    name BLOB PRIMARY KEY, patient BLOB NOT NULL, sealed BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_of_patient ON entries (patient);
"""


class Item(NamedTuple):
    """What an embedding belongs to.

    Attributes:
        encoder: Fingerprint of the encoder.
        patient: Whose it is; decides the data key.
        input: Identity of the input: a hash of its content.
    """

    encoder: str
    patient: str
    input: str


class Vault:
    """Encrypted embeddings of one hospital. Safe to use from several threads."""

    def __init__(self, connection: sqlite3.Connection, path: Path, master: bytes) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()
        self._name_key = _derive(master, b"names")
        self._wrap = AESGCM(_derive(master, b"wrap"))

    @classmethod
    def open(cls, folder: str | Path, *, key_file: str | Path | None = None) -> Vault:
        """Opens the vault in `folder`, creating it and its master key on first use.

        Args:
            key_file: Where the master key lies; by default `vault.key` in the folder. Kept on
                another disk, it makes a stolen vault worthless.

        Raises:
            VaultError: The key is lost, wrong, or readable by others; the file is damaged.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise VaultError(
                f"cannot make the vault's folder {folder} ({error.strerror})",
                cure="give a folder that this user may write to",
            ) from None
        path = folder / DATABASE
        exists = path.exists()
        master = _master_key(Path(key_file) if key_file else folder / KEY_FILE, create=not exists)
        with _one_opens(folder), _explained(path):
            connection = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            try:
                path.chmod(0o600)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")
                connection.executescript(_SCHEMA)
                _check_key(connection, master, path)
            except BaseException:
                connection.close()
                raise
        return cls(connection, path, master)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, items: Sequence[Item]) -> list[NDArray[np.float32] | None]:
        """Embeddings `[T, d]` of the items, None where there is none.

        Raises:
            VaultError: An entry was changed, cut short, or belongs to something else.
        """
        names = [self._name(*item) for item in items]
        owners = {item.patient: self._name(item.patient) for item in items}
        with self._lock, _explained(self.path):
            sealed = dict(
                self._select("SELECT name, CAST(sealed AS BLOB) FROM entries WHERE name IN", names)
            )
            keys = self._keys(owners.values())
        found: list[NDArray[np.float32] | None] = []
        for item, name in zip(items, names, strict=True):
            owner = owners[item.patient]
            if name not in sealed:
                found.append(None)
                continue
            if owner not in keys:
                raise VaultError(f"{self.path}: an entry has lost its key", cure=_START_AGAIN)
            data = _open(keys[owner], sealed[name], _bound(item, name, owner), self.path)
            found.append(_unpack(data))
        return found

    def write(self, entries: Iterable[tuple[Item, NDArray[np.float32]]]) -> None:
        """Stores embeddings `[T, d]`: all of them durably, or none.

        Raises:
            VaultError: No room, or the file cannot be written. What was there stays.
        """
        entries = list(entries)
        with self._lock, _explained(self.path, sum(value.nbytes for _, value in entries)):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                owners = {item.patient: self._name(item.patient) for item, _ in entries}
                keys = self._keys(owners.values())
                for owner in owners.values():
                    if owner not in keys:
                        keys[owner] = self._new_key(owner)
                rows = []
                for item, value in entries:
                    name, owner = self._name(*item), owners[item.patient]
                    sealed = _seal(keys[owner], _pack(value), _bound(item, name, owner))
                    rows.append((name, owner, sealed))
                self._connection.executemany(
                    "INSERT OR REPLACE INTO entries (name, patient, sealed) VALUES (?, ?, ?)", rows
                )
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, a full disk among them.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def forget(self, patient: str) -> int:
        """Destroys a patient's key and embeddings; returns how many embeddings there were."""
        owner = self._name(patient)
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM patients WHERE name = ?", (owner,))
            count = self._connection.execute(
                "DELETE FROM entries WHERE patient = ?", (owner,)
            ).rowcount
            self._connection.execute("COMMIT")
            # Older pages, the key among them, would otherwise live on in the log.
            busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise VaultError(
                f"{self.path} is in use by another process; the patient's entries are deleted, but "
                "the write-ahead log still holds the old pages",
                cure="close the other process and forget the patient again",
            )
        return count

    def __len__(self) -> int:
        with self._lock, _explained(self.path):
            (count,) = self._connection.execute("SELECT count(*) FROM entries").fetchone()
        return int(count)

    def _name(self, *parts: str) -> bytes:
        return hmac.new(self._name_key, _joined(*(p.encode() for p in parts)), sha256).digest()

    def _new_key(self, owner: bytes) -> AESGCM:
        key = AESGCM.generate_key(256)
        wrapped = _seal(self._wrap, key, b"patient key" + owner)
        self._connection.execute("INSERT INTO patients VALUES (?, ?)", (owner, wrapped))
        return AESGCM(key)

    def _keys(self, owners: Iterable[bytes]) -> dict[bytes, AESGCM]:
        """Data keys of those patients that have one."""
        rows = self._select(
            "SELECT name, CAST(wrapped AS BLOB) FROM patients WHERE name IN", list(owners)
        )
        return {
            owner: AESGCM(_open(self._wrap, wrapped, b"patient key" + owner, self.path))
            for owner, wrapped in rows
        }

    def _select(self, query: str, names: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        for start in range(0, len(names), _QUERY_ROWS):
            part = names[start : start + _QUERY_ROWS]
            marks = ", ".join("?" * len(part))
            rows += self._connection.execute(f"{query} ({marks})", part).fetchall()
        return rows


def _master_key(file: Path, *, create: bool) -> bytes:
    """The master key from its file, made there if `create` and there is none.

    A variable may hold it only in tests: an environment is readable by every process of the user,
    is inherited, and ends in logs.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given is not None:
        if os.environ.get("FEDWARD_TESTING") != "1":
            raise VaultError(
                f"{KEY_VARIABLE} is set, but keys from the environment are for tests only",
                cure=f"unset it; the key lies in {file}",
            )
        return _checked(bytes.fromhex(given), KEY_VARIABLE)
    if not file.exists():
        if not create:
            raise VaultError(
                f"the vault's key {file} is lost",
                cure="restore the key from the backup, or remove the vault's folder: the "
                "embeddings are then encoded again from the shard",
            )
        _create_key(file)
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise VaultError(f"the vault's key {file} can be read by others", cure=f"chmod 600 {file}")
    return _checked(file.read_bytes(), str(file))


@contextmanager
def _one_opens(folder: Path) -> Iterator[None]:
    """Lets one process or thread at a time open the vault.

    While two put a new file into WAL mode together, SQLite refuses one at once instead of waiting.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise VaultError(
            f"cannot open the vault's folder {folder} ({error.strerror})",
            cure="give a folder that this user may read and write",
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _create_key(file: Path) -> None:
    """Makes a key, once even when several processes start together."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(os.urandom(_KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        os.link(fresh, file)
    except FileExistsError:
        pass
    except OSError as error:
        raise VaultError(
            f"cannot write the vault's key {file} ({error.strerror})",
            cure="give a folder on a disk with room that this user may write to",
        ) from None
    finally:
        fresh.unlink(missing_ok=True)


def _checked(key: bytes, origin: str) -> bytes:
    if len(key) != _KEY_BYTES:
        raise VaultError(
            f"{origin} is not a vault key ({len(key)} bytes, not {_KEY_BYTES})",
            cure="restore the key from the backup",
        )
    return key


def _check_key(connection: sqlite3.Connection, master: bytes, path: Path) -> None:
    """Compares the key with the mark that the vault's first opening left."""
    mark = _derive(master, b"mark")
    connection.execute("INSERT OR IGNORE INTO meta VALUES ('mark', ?)", (mark,))
    (stored,) = connection.execute("SELECT value FROM meta WHERE name = 'mark'").fetchone()
    if not hmac.compare_digest(mark, stored):
        raise VaultError(
            f"the key does not belong to {path}",
            cure="give the vault the key it was made with, or remove the vault's folder: the "
            "embeddings are then encoded again from the shard",
        )


@contextmanager
def _explained(path: Path, size: int = 0) -> Iterator[None]:
    """Turns SQLite's errors into what happened and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
            free = shutil.disk_usage(path.parent).free
            raise VaultError(
                f"cannot store {size / 1e6:.1f} MB of embeddings in {path} ({error}; "
                f"{free / 1e6:,.0f} MB are free); everything stored before is kept",
                cure="make room (or lift the quota) and start again: finished inputs are not "
                "encoded a second time",
            ) from None
        if isinstance(error, sqlite3.OperationalError):
            raise VaultError(
                f"cannot use {path}: {error}",
                cure="let one process at a time encode, and check who owns the folder",
            ) from None
        raise VaultError(f"{path} is damaged ({error})", cure=_START_AGAIN) from None


def _derive(master: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=b"fedward vault " + purpose).derive(master)


def _joined(*parts: bytes) -> bytes:
    """Injective concatenation: every part with its length."""
    return b"".join(struct.pack(">Q", len(part)) + part for part in parts)


def _bound(item: Item, name: bytes, owner: bytes) -> bytes:
    return _joined(name, owner, item.encoder.encode())


def _seal(key: AESGCM, data: bytes, bound: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + key.encrypt(nonce, data, bound)


def _open(key: AESGCM, sealed: bytes, bound: bytes, path: Path) -> bytes:
    try:
        return key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound)
    # A value cut below the length of nonce and tag is a ValueError.
    except (InvalidTag, ValueError):
        raise VaultError(f"{path}: an entry was changed or cut short", cure=_START_AGAIN) from None


def _pack(value: NDArray[np.float32]) -> bytes:
    tokens, width = value.shape
    return struct.pack(">II", tokens, width) + value.astype("<f4").tobytes()


def _unpack(data: bytes) -> NDArray[np.float32]:
    tokens, width = struct.unpack(">II", data[:8])
    return np.frombuffer(data, dtype="<f4", offset=8).reshape(tokens, width)

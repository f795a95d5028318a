"""What a backup of a site holds: files of its folder, as a tar inside a sealed file.

The last member of the tar is a manifest: SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from client.site.daemon.state import LEDGER, PAUSED
from client.site.encoders.vault import DATABASE, KEY_FILE
from deploy.site.evidence import HEAD, RECEIPTS
from deploy.site.sealing import CHUNK, BackupError, Header, Opening, Sealing

_MANIFEST = "manifest.json"
_STATE = (
    # The ledger first and its head after it: a head newer than the copy tells what is lacking.
    LEDGER,
    HEAD,
    RECEIPTS,
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
PLAIN = (*(f"state/{n}" for n in _STATE), *_ROOT, *(f"relay/{n}" for n in _RELAY))
VAULT = (f"state/vault/{DATABASE}", f"state/vault/{KEY_FILE}")


@dataclass(frozen=True)
class Contents:
    """What an archive holds.

    Attributes:
        files: SHA-256 by path inside the site's folder.
        ledger: ledger.jsonl; empty if there is none.
    """

    header: Header
    files: dict[str, str]
    ledger: bytes


class Hashing:
    """Reads through, and hashes."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self.sha256 = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sha256.update(data)
        return data


class Writer:
    """Takes in the files of a new archive; `files` has their SHA-256 by name."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.files: dict[str, str] = {}

    def add(self, name: str, source: IO[bytes], size: int, mode: int, modified: float) -> None:
        """Adds the first `size` bytes of a file; `modified` in seconds since 1970."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, mode & 0o777, int(modified)
        reader = Hashing(source)
        self._tar.addfile(info, reader)
        self.files[name] = reader.sha256.hexdigest()

    def add_manifest(self) -> None:
        manifest = json.dumps(self.files, indent=1).encode()
        info = tarfile.TarInfo(_MANIFEST)
        info.size = len(manifest)
        self._tar.addfile(info, io.BytesIO(manifest))


@contextmanager
def writing(out: IO[bytes], header: Header, passphrase: str) -> Iterator[Writer]:
    """An archive in `out`, complete when the block has ended well."""
    with (
        Sealing(out, header, passphrase) as sealed,
        tarfile.open(fileobj=sealed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        writer = Writer(tar)
        yield writer
        writer.add_manifest()


def inspect(archive: Path, passphrase: str) -> Contents:
    """Decrypts the whole archive and holds every file against the manifest; writes nothing.

    Raises:
        BackupError: Wrong passphrase; cut or changed; not as the manifest says.
    """
    ledger = b""

    def keep(name: str, source: Hashing, _: int) -> None:
        nonlocal ledger
        if name == f"state/{LEDGER}":
            ledger = source.read()

    header, files = read(archive, passphrase, keep)
    return Contents(header, files, ledger)


def read(
    archive: Path, passphrase: str, take: Callable[[str, Hashing, int], None]
) -> tuple[Header, dict[str, str]]:
    """Gives each file (name, content, mode) to `take`, which need not read it.

    Returns:
        The header, and the files as `Contents.files`.

    Raises:
        BackupError: As `inspect`; `take` may have had some files by then.
    """
    found: dict[str, str] = {}
    manifest: dict[str, str] | None = None
    with archive.open("rb") as file:
        stream = Opening(file, archive, passphrase)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None:
                        raise BackupError(f"{archive} holds a member that is no file")
                    if member.name == _MANIFEST:
                        manifest = json.loads(content.read())
                    elif member.name in (*PLAIN, *VAULT):  # no other name is ever written
                        reader = Hashing(content)
                        take(member.name, reader, member.mode)
                        while reader.read(CHUNK):  # what was not taken counts too
                            pass
                        found[member.name] = reader.sha256.hexdigest()
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

"""A file that only its passphrase opens, as one piece: the format of a site's backup.

One header line, JSON, and an encrypted stream. The key comes from the passphrase by scrypt
(RFC 7914); the stream is cut into chunks, each sealed with AES-256-GCM under a nonce of
`prefix | number | last?` (STREAM: Hoang, Reyhanitabar, Rogaway and Vizard 2015), with the header as
associated data. So neither chunks nor header can be changed, moved, dropped or cut off.
"""

from __future__ import annotations

import io
import os
import struct
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedwardError

CHUNK = 1 << 20  # bytes that are sealed at once
_TAG = 16
_HEADER_LIMIT = 4096

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

    @classmethod
    def new(cls, site: str) -> Header:
        """Of an archive that is made now; no other one has its key and nonces."""
        return cls(
            site=site,
            made=datetime.now(UTC),
            version=version("fedward"),
            salt=os.urandom(16).hex(),
            prefix=os.urandom(7).hex(),
        )

    def cipher(self, passphrase: str) -> AESGCM:
        scrypt = Scrypt(
            salt=bytes.fromhex(self.salt), length=32, n=self.cost, r=self.block, p=self.lanes
        )
        return AESGCM(scrypt.derive(passphrase.encode()))

    def nonce(self, number: int, *, last: bool) -> bytes:
        return bytes.fromhex(self.prefix) + struct.pack(">I?", number, last)


class Sealing(io.RawIOBase):
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
        while len(self._held) > CHUNK:  # the last chunk waits: it is marked
            self._seal(bytes(self._held[:CHUNK]), last=False)
            del self._held[:CHUNK]
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._seal(bytes(self._held), last=True)
        super().close()

    def _seal(self, chunk: bytes, *, last: bool) -> None:
        nonce = self._header.nonce(self._number, last=last)
        self._out.write(self._cipher.encrypt(nonce, chunk, self._bound))
        self._number += 1


class Opening(io.RawIOBase):
    """The stream that `Sealing` took in. Raises `BackupError` at the first chunk that is not as it
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
        self._ahead = source.read(CHUNK + _TAG)
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
        while self.read(CHUNK):
            pass

    def _open(self) -> bytes:
        chunk, self._ahead = self._ahead, self._source.read(CHUNK + _TAG)
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

"""Ed25519 identities of coordinator and sites, and signed envelopes between them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from common.errors import FedwardError, Refusal
from common.messages import Arrays, Envelope, Header, digest_arrays

H = TypeVar("H", bound=Header)


class Identity:
    """A private Ed25519 key in a file of mode 0600."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def open(cls, path: str | Path) -> Identity:
        """Loads the key, creating it on first use (safe when several processes start at once)."""
        path = Path(path)
        if not path.exists():
            _create(path)
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except ValueError:
            raise FedwardError(
                f"{path} is not a private key",
                cure="restore it from the backup, or remove it "
                "and give the new public key to your partners",
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise FedwardError(f"{path} is not an Ed25519 key")
        return cls(key)

    @property
    def public(self) -> str:
        """Public key, 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> bytes:
        """Signature of 64 bytes."""
        return self._key.sign(data)

    def seal(self, header: Header, arrays: Arrays | None = None) -> Envelope:
        """Binds arrays to the header by their digest and signs."""
        header = header.model_copy(update={"arrays_digest": digest_arrays(arrays)})
        data = header.canonical()
        return Envelope(header=data, signature=self.sign(data), arrays=arrays or {})


def _create(path: Path) -> None:
    """A fresh key, durable; of several processes the first one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(fresh)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # atomic, and fails when another process was first
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def verify(public: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made with the key whose public half is `public` (hex)."""
    try:
        _public_key(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=64)
def _public_key(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))


def open_envelope(envelope: Envelope, kind: type[H], publics: list[str]) -> H:
    """Checks signature, form and array digest, in this order.

    Args:
        publics: Hex public keys, any of which may have signed.

    Raises:
        Refusal: `signature-invalid` or `message-malformed`.
    """
    if not any(verify(public, envelope.header, envelope.signature) for public in publics):
        raise Refusal("signature-invalid", "the message is not signed by a known key")
    try:
        header = kind.model_validate(json.loads(envelope.header))
    except (ValidationError, ValueError, RecursionError):
        raise Refusal("message-malformed", "the header does not parse") from None
    if header.canonical() != envelope.header:
        raise Refusal("message-malformed", "the header is not canonical")
    if getattr(header, "arrays_digest", "") != digest_arrays(envelope.arrays):
        raise Refusal("message-malformed", "the arrays do not match their digest")
    return header

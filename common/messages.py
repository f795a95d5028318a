"""Typed requests of the coordinator and answers of a site, free of Flower.

Every request is signed by the coordinator, every answer by the site. The signature covers the
header and the digest of the arrays, so the relay in between can delay or drop, not change.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load, save

Arrays = dict[str, NDArray[Any]]
Kind = Literal["roster", "prepare", "initialise", "train", "evaluate"]
"""`roster`: which sites answer here. `prepare`: check study, encode, load the SLM. `initialise`:
the adapter that the study's seed gives (a function of public values). `train`: one charged round.
`evaluate`: one charged release on validation patients."""

Code = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
"""Why there is no answer, see docs/refusals; its form is all that an honest reader may rely on."""


class Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def canonical(self) -> bytes:
        """Bytes that are signed: JSON with sorted keys."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()


class Request(Header):
    """What the coordinator asks of one site.

    Attributes:
        site: Name in the roster; empty for `roster`, which asks a node for its sites.
        run: Identity of the run; the same study run twice spends twice.
        round: Round of `train` (from 1) or number of the release of `evaluate` (from 1).
        attempt: Counts retries of a round that was lost before the site charged it. Part of the
            digest, hence a new charge; a re-sent request keeps it and gets the stored answer.
        study: Canonical JSON of the study, in `prepare` only; elsewhere its hash names it.
        receipts: Heads of the sites' ledgers that the coordinator keeps, in `prepare` only.
    """

    kind: Kind
    run: str = Field(max_length=64, pattern=r"^[ -~]*$")
    site: str = ""
    study_hash: str = ""
    round: int = Field(default=0, ge=0)
    attempt: int = Field(default=0, ge=0)
    nonce: str = Field(default_factory=lambda: secrets.token_hex(16))
    code_hash: str = ""
    study: str | None = None
    receipts: tuple[dict[str, Any], ...] = ()
    arrays_digest: str = ""


class Answer(Header):
    """What a site returns: a charged release, or a function of public and ledger state.

    Attributes:
        request_digest: Binds the answer to the request.
        refusal: Stable code when the site declined; nothing else is said outside the hospital.
        body: Public values only, by kind; see `client/site/daemon`.
    """

    site: str
    request_digest: str
    refusal: Code | None = None
    body: dict[str, Any] = {}
    arrays_digest: str = ""


class Envelope(BaseModel):
    """A signed header with its arrays, as it travels."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    header: bytes
    signature: bytes
    arrays: Any = None

    def pack(self) -> bytes:
        """One byte string: three lengths, header, signature, safetensors."""
        body = save(dict(self.arrays)) if self.arrays else b""
        sizes = struct.pack(">III", len(self.header), len(self.signature), len(body))
        return sizes + self.header + self.signature + body

    @classmethod
    def unpack(cls, data: bytes) -> Envelope:
        """Inverse of `pack`.

        Raises:
            ValueError: The lengths do not add up.
        """
        if len(data) < 12:
            raise ValueError("envelope is shorter than its header")
        a, b, c = struct.unpack(">III", data[:12])
        if len(data) != 12 + a + b + c:
            raise ValueError("envelope lengths do not add up")
        body = data[12 + a + b :]
        return cls(
            header=data[12 : 12 + a],
            signature=data[12 + a : 12 + a + b],
            arrays=load(body) if body else {},
        )


def digest_arrays(arrays: Mapping[str, NDArray[Any]] | None) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes; empty string for no arrays."""
    if not arrays:
        return ""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        sha.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def roster_proof(request_digest: str) -> bytes:
    """What each site signs that answers to `roster`, so that no node can say it hosts another's.

    Args:
        request_digest: SHA-256 of the request, hex. Whoever asks chooses it, so the words in front
            are those of nothing else that a site signs (`common.roster` has its own).
    """
    return b"fedward hosted\0" + request_digest.encode()

"""The three files by which a hospital joins: invite, enrolment request, admission.

The coordinator's administrator sends an `Invite`; the hospital answers with an `EnrolmentRequest`,
which holds public keys only; the coordinator returns an `Admission` with the site's certificate.
Each file is signed by who wrote it and holds no secret: e-mail will do. What e-mail cannot give is
certainty about who wrote the first one: both sides compare `fingerprint` of the other's key over
the telephone.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from common.errors import FedwardError, explain
from common.identity import Identity, verify
from common.privacy.fields import Hash
from common.study import Name


def _no_port(host: str) -> str:
    """A colon belongs to an IPv6 address, not to a port."""
    if ":" in host:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError("no name and no address; a port is given apart") from None
    return host


Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]{1,253}$"), AfterValidator(_no_port)]


class EnrolmentError(FedwardError):
    """A file of the enrolment that cannot be used; nothing was changed."""

    code = "enrolment-invalid"


class Document(BaseModel, ABC):
    """A signed file: one JSON object `{kind, content, signature}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]

    def statement(self) -> bytes:
        """What is signed."""
        content = self.model_dump(mode="json")
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"fedward {self.kind}\0{canonical}".encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the statement, hex."""
        return hashlib.sha256(self.statement()).hexdigest()

    def write(self, path: Path, identity: Identity) -> None:
        """Signs and writes it."""
        signature = identity.sign(self.statement()).hex()
        content = self.model_dump(mode="json")
        path.write_text(
            json.dumps({"kind": self.kind, "content": content, "signature": signature}, indent=1)
        )

    @abstractmethod
    def signer(self) -> str:
        """Public key that must have signed; one that the file itself names proves only that its
        holder wrote it."""

    @classmethod
    def read(cls, path: Path, *, signer: str | None = None) -> Self:
        """Reads and checks it.

        Args:
            signer: Public key that must have signed, hex; by default the one that it names.

        Raises:
            EnrolmentError: Not such a file, changed, or signed by somebody else.
        """
        raw = _load(path, cls.kind)
        try:
            document = cls.model_validate(raw.get("content"))
            signature = bytes.fromhex(str(raw.get("signature")))
        except ValidationError as error:
            raise EnrolmentError(f"{path}: {explain(error)}", cure="ask for it again") from None
        except ValueError:
            raise EnrolmentError(f"{path} is not signed", cure="ask for it again") from None
        if not verify(signer or document.signer(), document.statement(), signature):
            raise EnrolmentError(
                f"{path} was changed, or somebody else signed it", cure="ask for it again"
            )
        return document


class Invite(Document):
    """What a hospital needs to reach a coordinator.

    Attributes:
        host, port: Of the coordinator's public TLS port.
        authority: Its certificate authority, PEM: the only one that the site will trust.
        coordinator: Its Ed25519 key, which signs every request.
        version: Of Fedward; both sides run the same one.
        bundle: SHA-256 of the code that it will ship; the site compares it with its own.
        nonce: Makes the invite usable once.
    """

    kind: ClassVar[str] = "invite"
    site: Name
    host: Host
    port: int = Field(ge=1, le=65535)
    authority: str
    coordinator: Hash
    version: str
    bundle: Hash
    nonce: Nonce
    expires: AwareDatetime

    def signer(self) -> str:
        return self.coordinator


class EnrolmentRequest(Document):
    """A hospital's public keys.

    Attributes:
        identity: Ed25519 key that signs the site's answers and ledger.
        signing_request: For the TLS key of its relay, PEM.
        node_key: Of its SuperNode, P-384 in OpenSSH's form.
    """

    kind: ClassVar[str] = "enrolment request"
    site: Name
    nonce: Nonce
    identity: Hash
    signing_request: str
    node_key: Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+$")]

    def signer(self) -> str:
        return self.identity


class Admission(Document):
    """The coordinator's answer. `request`: digest of the request that it answers."""

    kind: ClassVar[str] = "admission"
    site: Name
    request: Hash
    certificate: str
    coordinator: Hash

    def signer(self) -> str:
        return self.coordinator


class StudySignature(Document):
    """What lies beside a study file that a coordinator sends out: it means to run this one.

    Attributes:
        study: Hash of the study, which the person who reviews it compares.
    """

    kind: ClassVar[str] = "study signature"
    study: Hash
    coordinator: Hash

    def signer(self) -> str:
        return self.coordinator


def fingerprint(public: str) -> str:
    """A public key for reading aloud: 8 groups of 4 hex digits of its SHA-256 (128 bits)."""
    digits = hashlib.sha256(bytes.fromhex(public)).hexdigest()[:32]
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


def _load(path: Path, kind: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise EnrolmentError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise EnrolmentError(f"{path} is not JSON", cure=f"give the {kind} file") from None
    if not isinstance(raw, dict) or raw.get("kind") != kind:
        found = repr(raw.get("kind")) if isinstance(raw, dict) else "something else"
        raise EnrolmentError(f"{path} is no {kind} but {found}", cure=f"give the {kind} file")
    return raw

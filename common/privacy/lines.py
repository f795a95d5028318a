"""The lines of a ledger: events in the life of a site's patients, never epsilon.

A line is one JSON object. It names the SHA-256 of the whole line before it, and ends with the
site's Ed25519 signature over everything before the signature:

    {"previous":"…","at":"…","line":"released",…,"signature":"…"}

Schema 1 had no signatures; such a ledger stays readable for ever, and is continued under schema 2
after an `upgraded` line. Nothing here identifies a patient: the file can be handed to an auditor.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import PrivacyError
from common.privacy.events import ReleaseEvent
from common.privacy.fields import Hash, Signature, Time
from common.privacy.lifetime import Lifetime
from common.privacy.receipts import Receipt

START = "0" * 64
"""`previous` of the first line."""

_SIGNATURE = re.compile(rb',"signature":"([0-9a-f]{128})"\}$')


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Line(_Part):
    previous: Hash
    at: Time


class Genesis(_Line):
    """First line.

    Attributes:
        entropy: `seeded` where tests replaced the operating system's randomness; no audit accepts
            such a ledger as private.
        virtual: A virtual hospital of a simulation, whose split of patients follows from a seed.
        public_key: Of the site; None in schema 1, whose lines are not signed.
    """

    line: Literal["genesis"] = "genesis"
    ledger_schema: Literal[1, 2] = 2
    site: str
    entropy: Literal["os", "seeded"]
    virtual: bool = False
    public_key: Hash | None = None


class Upgraded(_Line):
    """A ledger of schema 1 goes on under schema 2: from here on every line is signed."""

    line: Literal["upgraded"] = "upgraded"
    ledger_schema: Literal[2] = 2
    public_key: Hash


class Software(_Line):
    """The daemon's version, and a hash of its code (`common.fingerprint.software_hash`)."""

    line: Literal["software"] = "software"
    version: str
    code_hash: Hash


class PolicyChanged(_Line):
    """The hospital's policy, from here on.

    Attributes:
        sha256: Of the policy's canonical form (`common.privacy.policy`).
        lifetime: Its caps, which every later approval and release is held to.
        unprotected: Whether it lets studies of mode `none` run.
        approvers: Who may approve and revoke, with their public keys.
    """

    line: Literal["policy-changed"] = "policy-changed"
    sha256: Hash
    lifetime: Lifetime | None = None
    unprotected: bool = False
    approvers: dict[str, Hash] = {}


class Reserve(_Part):
    """`count` releases of one kind that an approved study may make."""

    count: int = Field(ge=1)
    event: Annotated[ReleaseEvent, Field(discriminator="kind")]


class Decision(_Part):
    """What a person signed, and when: see `common.privacy.decisions`."""

    approver: str
    public_key: Hash
    at: Time
    signature: Signature


class StudyApproved(_Line):
    """The hospital let a study in and set aside all that it may release, spare rounds included.

    Attributes:
        reserved: Part of what the person signed (`reserve_hash`).
        patients_declared: The study's public constant, not a count.
        expires: No release at or after this time (ISO 8601, UTC); None is never.
        decision: Of a person; None in schema 1 and for virtual hospitals.
    """

    line: Literal["study-approved"] = "study-approved"
    study_hash: Hash
    name: str
    delta: float = Field(gt=0, lt=1)
    runs: int = Field(ge=1)
    reserved: tuple[Reserve, ...]
    patients_declared: int | None = None
    expires: Time | None = None
    decision: Decision | None = None


class StudyRevoked(_Line):
    """No further release; under an `rdp` cap, what was not released is free again."""

    line: Literal["study-revoked"] = "study-revoked"
    study_hash: Hash
    decision: Decision


class Released(_Line):
    """A charge: durable before the release, and spent whether or not the release came about."""

    line: Literal["released"] = "released"
    study_hash: Hash
    run: str
    round: int
    attempt: int
    request_digest: Hash
    event: Annotated[ReleaseEvent, Field(discriminator="kind")]


class Refused(_Line):
    """A signed request for a release that the site declined, and why."""

    line: Literal["refused"] = "refused"
    study_hash: str
    request: str = ""
    request_digest: Hash
    code: str


class PatientErased(_Line):
    """A patient's data were removed. The commitment is keyed by a secret of the site."""

    line: Literal["patient-erased"] = "patient-erased"
    commitment: Hash


class KeyRotated(_Line):
    """Later lines are signed by the new key, which proves itself by signing `previous`."""

    line: Literal["key-rotated"] = "key-rotated"
    public_key: Hash
    proof: Signature


class ReceiptGiven(_Line):
    """Someone outside keeps the head that `previous` names: no earlier line can be cut unseen."""

    line: Literal["receipt"] = "receipt"
    holder: str
    lines: int = Field(ge=1)


class Recovered(_Line):
    """An unfinished last line was moved to `ledger.torn`."""

    line: Literal["recovered"] = "recovered"
    torn_bytes: int
    torn_sha256: Hash


class Lost(_Part):
    """An approval among lost lines."""

    study_hash: Hash
    name: str
    delta: float = Field(gt=0, lt=1)
    runs: int = Field(ge=1)
    reserved: tuple[Reserve, ...]

    @property
    def reserve_hash(self) -> str:
        """See `reserve_hash`."""
        return reserve_hash(self.study_hash, self.delta, self.runs, self.reserved)


class Reconciled(_Line):
    """Lines that a receipt names existed and are lost (a restored backup). What they may have
    released is counted in full, on top of what this ledger counts: all that was still set aside at
    the last common line, and all that the lost lines approved. Every study is closed.

    Attributes:
        receipt: As it was shown; of this site, and genuine.
        lost: The approvals among the lost lines, in order; bound by `receipt.approvals_hash`.
    """

    line: Literal["reconciled"] = "reconciled"
    receipt: Receipt
    lost: tuple[Lost, ...]


Line = (
    Genesis
    | Upgraded
    | Software
    | PolicyChanged
    | StudyApproved
    | StudyRevoked
    | Released
    | Refused
    | PatientErased
    | KeyRotated
    | ReceiptGiven
    | Recovered
    | Reconciled
)
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="line")])


def reserve_hash(study_hash: str, delta: float, runs: int, reserved: tuple[Reserve, ...]) -> str:
    """What an approval sets aside, in one SHA-256."""
    fields = [study_hash, delta, runs, [reserve.model_dump(mode="json") for reserve in reserved]]
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def chained(before: str, reserve: str) -> str:
    """The approvals' chain with one more; it begins with `START`."""
    return hashlib.sha256(f"{before} {reserve}".encode()).hexdigest()


def body_of(line: Line) -> bytes:
    """The bytes that a signature covers."""
    return line.model_dump_json().encode()


def signed(body: bytes, signature: bytes) -> bytes:
    """A whole line, without its end of line."""
    return body[:-1] + b',"signature":"' + signature.hex().encode() + b'"}'


def split(raw: bytes) -> tuple[bytes, bytes | None]:
    """Body and signature of a whole line; None for a line of schema 1."""
    found = _SIGNATURE.search(raw)
    if found is None:
        return raw, None
    return raw[: found.start()] + b"}", bytes.fromhex(found[1].decode())


def parse(body: bytes) -> Line:
    """The line of a body.

    Raises:
        PrivacyError: No line known here; nothing is guessed, and nothing of it is repeated.
    """
    try:
        return _LINE.validate_json(body)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise PrivacyError(f"{where}: {first['msg']}") from None


def hash_of(raw: bytes) -> str:
    """What the next line names as `previous`."""
    return hashlib.sha256(raw).hexdigest()

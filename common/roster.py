"""The roster: which hospitals take part, signed by each of them.

A coordinator that writes its own roster can fill it with sites that it invented. So a roster counts
only when every hospital on it has signed the whole of it, after its people have compared the keys
with the other hospitals'; a daemon that is given one refuses studies with anybody else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedwardError, explain
from common.files import write_atomically
from common.identity import Identity, verify
from common.privacy.fields import Hash
from common.study import Name

FederationName = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[^\p{C}\p{Zl}\p{Zp}\[\]]*$")
]
"""Nothing that a terminal obeys: it is shown above the fingerprints that people compare."""

Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class RosterError(FedwardError):
    """A roster that cannot be used."""

    code = "roster-invalid"


class Roster(BaseModel):
    """Sites, their keys, and their signatures.

    Attributes:
        name: Of the federation.
        sites: Ed25519 public key by site.
        signatures: By site, over name and sites.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FederationName
    sites: dict[Name, Hash] = Field(min_length=1)
    signatures: dict[Name, Signature] = {}

    def statement(self) -> bytes:
        """What every hospital signs."""
        fields = {"name": self.name, "sites": self.sites}
        return (
            b"fedward roster\0" + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the statement, hex."""
        return hashlib.sha256(self.statement()).hexdigest()

    def signed(self, site: str, identity: Identity) -> Roster:
        """With the signature of `site`.

        Raises:
            RosterError: It does not list the site with this key.
        """
        if self.sites.get(site) != identity.public:
            raise RosterError(
                f"roster '{self.name}' does not list site '{site}' with its key",
                cure="ask the coordinator for a roster with it; `fedward site key` prints the key",
            )
        signature = identity.sign(self.statement()).hex()
        return self.model_copy(update={"signatures": {**self.signatures, site: signature}})

    def merged(self, other: Roster) -> Roster:
        """With the valid signatures of both.

        Raises:
            RosterError: They are rosters of different sites.
        """
        if other.digest != self.digest:
            raise RosterError("the signature is for another roster", cure="send out the new roster")
        both = [*self.signatures.items(), *other.signatures.items()]
        valid = {site: signature for site, signature in both if self._holds(site, signature)}
        return self.model_copy(update={"signatures": valid})

    def unsigned(self) -> list[str]:
        """Sites without a valid signature."""
        return sorted(s for s in self.sites if not self._holds(s, self.signatures.get(s, "")))

    def _holds(self, site: str, signature: str) -> bool:
        return bool(signature) and verify(
            self.sites.get(site, ""), self.statement(), bytes.fromhex(signature)
        )

    @classmethod
    def load(cls, path: str | Path) -> Roster:
        """Raises `RosterError` where the file is none, or two sites share a key."""
        path = Path(path)
        try:
            roster = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RosterError(f"cannot read the roster {path} ({error.strerror})") from None
        except ValidationError as error:
            raise RosterError(f"{path}: {explain(error)}") from None
        if len(set(roster.sites.values())) < len(roster.sites):
            raise RosterError(f"{path}: two sites have one key", cure="ask for a corrected roster")
        return roster

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        write_atomically(path, self.model_dump_json(indent=1), mode=0o644)

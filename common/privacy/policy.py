"""The hospital's policy: what its patients' data may be used for, and how much they may spend.

A TOML file of the hospital's own; nothing in it comes from a coordinator. Its canonical SHA-256
stands in the ledger, with its lifetime caps, from the moment the daemon first uses it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.errors import FedwardError, explain
from common.privacy.fields import Hash
from common.privacy.lifetime import Lifetime

SENTENCE = "Studies of mode none may release our patients' data without any protection, for ever."
"""What a policy must say to let studies without privacy run."""


class PolicyError(FedwardError):
    """A policy that cannot be used as written."""

    code = "policy-invalid"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerStudy(_Part):
    """The most that one study may cost any patient, by PLD, all its runs and spare rounds
    included."""

    epsilon: float = Field(gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)


class Policy(_Part):
    """What the hospital allows. The defaults allow nothing.

    Attributes:
        coordinators: Public keys whose requests are heard, hex.
        approvers: Who may approve and revoke studies: name to public key.
        lifetime: What training and validation patients may spend over all studies together. None
            (no cap) is for virtual hospitals only.
        study: What one study may cost at most; None: its part of the lifetime.
        modes: Modes of privacy that may run.
        without_privacy: `SENTENCE`, word for word, lets studies of mode `none` run too. They price
            the patients at infinity for ever; the caps then bound the other studies only.
        allow_batch_slack: Lets studies run on kernels that round a patient by the others in the
            pass (`privacy.batch_slack` above 0). What that adds to the sensitivity is measured, and
            a coordinator who makes adapters for it can exceed the measure.
        min_patients: Training patients without whom no study runs, whatever it declares.
        tasks: Risks that may be trained; None: those of an approved study.
        encoders, slms: SHA-256 of the encoders (`fedward site review` shows them) and language
            models that may run; None: those of an approved study.
        rounds_per_day: Training rounds of all studies in any 24 hours; None: no limit.
        release_slot: Seconds; answers to `train` and `evaluate` leave at multiples of it only, so
            that the time they took says little. None sends them when they are ready.
        approval_days: After so many days an approval expires.
    """

    coordinators: tuple[Hash, ...] = ()
    approvers: dict[str, Hash] = {}
    lifetime: Lifetime | None = None
    study: PerStudy | None = None
    modes: tuple[Literal["local"], ...] = ("local",)
    without_privacy: str | None = None
    allow_batch_slack: bool = False
    min_patients: int = Field(default=1, ge=1)
    tasks: tuple[str, ...] | None = None
    encoders: tuple[Hash, ...] | None = None
    slms: tuple[Hash, ...] | None = None
    rounds_per_day: int | None = Field(default=None, ge=1)
    release_slot: float | None = Field(default=None, gt=0, le=86400)
    approval_days: int = Field(default=365, ge=1, le=36500)

    @field_validator("without_privacy")
    @classmethod
    def _word_for_word(cls, text: str | None) -> str | None:
        if text is not None and text != SENTENCE:
            raise ValueError(f"to allow mode none, write exactly: {SENTENCE!r}")
        return text

    def allows(self, mode: str) -> bool:
        """Whether studies of this mode of privacy may run."""
        return self.without_privacy is not None if mode == "none" else mode in self.modes

    @property
    def sha256(self) -> str:
        """Hash of the canonical form: JSON with every default written out."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads a policy's TOML file.

        Raises:
            PolicyError: One message naming every wrong key.
        """
        path = Path(path)
        try:
            raw = tomllib.loads(path.read_text())
        except OSError as error:
            raise PolicyError(f"cannot read the policy {path} ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path} is not valid TOML: {error}") from None
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise PolicyError(f"{path}: {explain(error)}", cure="see docs/policy.md") from None

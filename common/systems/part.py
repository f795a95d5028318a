"""What all sections of a study are."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Part(BaseModel):
    """A section of a study: immutable, and an unknown key is an error, not ignored.

    Texts are plain: a person reads them on a terminal before they approve, and a control character
    could rewrite what stands there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, raw: Any) -> Any:
        for text in _texts(raw):
            if any(unicodedata.category(character) in ("Cc", "Cf", "Zl") for character in text):
                raise ValueError(f"a control character in {text!r}")
        return raw

    def needs_no_privacy(self) -> str | None:
        """Why what is chosen here can train in mode `none` alone, and the cure; None where it can
        in every mode."""
        return None


def _texts(raw: Any) -> Iterable[str]:
    """Strings of a section itself; those of sections within are theirs to check."""
    values = raw.values() if isinstance(raw, dict) else ()
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, str))

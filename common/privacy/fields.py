"""Types of fields that ledger lines, receipts and policies share."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator, Field


def _time(text: str) -> str:
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() != timedelta(0) or moment.isoformat(timespec="milliseconds") != text:
        raise ValueError("a time is ISO 8601, in UTC, to the millisecond")
    return text


Time = Annotated[str, AfterValidator(_time)]
"""As `2026-01-31T12:00:00.000+00:00`; as text, later times are greater."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256, or an Ed25519 public key."""

Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


def is_hash(text: str) -> bool:
    """Whether a text is a `Hash`."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")

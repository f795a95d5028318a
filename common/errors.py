"""The one family of errors that a person may see: what is wrong, where, and the cure."""

from __future__ import annotations

from pydantic import ValidationError


class FedwardError(Exception):
    """A mistake or condition that a user can mend.

    Attributes:
        code: Stable identifier, safe to send anywhere. The message may name files, rows and keys
            and therefore stays on the machine where it was raised.
    """

    code = "error"

    def __init__(self, message: str, *, cure: str = "") -> None:
        self.cure = cure
        super().__init__(f"{message}\n  cure: {cure}" if cure else message)


class StudyError(FedwardError):
    """A study file that cannot be run as written."""

    code = "study-invalid"


class ShardError(FedwardError):
    """A hospital folder that breaks the shard contract."""

    code = "shard-invalid"


class EncoderError(FedwardError):
    """An encoder that cannot be built, or an input that it cannot read."""

    code = "encoder-failed"


class VaultError(FedwardError):
    """Encrypted embeddings that cannot be read or written."""

    code = "vault-failed"


class ModelError(FedwardError):
    """A language model or adapter that cannot be loaded."""

    code = "model-invalid"


class PrivacyError(FedwardError):
    """Something that would break the privacy statement; nothing was released."""

    code = "privacy-refused"


class Refusal(FedwardError):
    """A request that a site declines. Only `code` leaves the hospital."""

    code = "refused"

    def __init__(self, code: str, message: str, *, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.code = code


def explain(error: ValidationError) -> str:
    """Every mistake of a validated file, by its key, in one line."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "file"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" (given: {given!r})" if isinstance(given, str | int | float) else ""
            lines.append(f"{where}: {message}{shown}")
    return "; ".join(lines)

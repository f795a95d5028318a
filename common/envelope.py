"""Envelopes in Flower messages, and the codes that travel instead of an error's text."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load, save

from common.messages import Code, Envelope, Kind

MESSAGE_TYPES: dict[Kind, str] = {
    "roster": "query",
    "prepare": "query",
    "initialise": "query",
    "train": "train",
    "evaluate": "evaluate",
}
"""Handler of the ClientApp that forwards a request of each kind; all of them do the same."""

_ENVELOPE, _ARRAYS, _ERROR = "envelope", "arrays", "error"
_CODE: TypeAdapter[str] = TypeAdapter(Code)


def to_record(envelope: Envelope) -> RecordDict:
    """Header and signature as bytes, arrays as one array of safetensors.

    One, because Flower makes two requests for each array, and it takes more of them to move a
    hundred small ones than to move their bytes; apart from the header, because equal arrays, as the
    same adapter for all sites, are kept and sent once.
    """
    record = RecordDict(
        {_ENVELOPE: ConfigRecord({"header": envelope.header, "signature": envelope.signature})}
    )
    if envelope.arrays:
        packed = np.frombuffer(save(dict(envelope.arrays)), dtype=np.uint8)
        record[_ARRAYS] = ArrayRecord({_ARRAYS: Array(packed)})
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of `to_record`.

    Raises:
        ValueError: The record is not of that shape.
    """
    try:
        header, signature = (
            bytes(record.config_records[_ENVELOPE][part])  # type: ignore[arg-type]
            for part in ("header", "signature")
        )
        arrays: dict[str, NDArray[Any]] = {}
        if _ARRAYS in record.array_records:
            arrays = load(_numpy(record.array_records[_ARRAYS][_ARRAYS]).tobytes())
        return Envelope(header=header, signature=signature, arrays=arrays)
    except Exception:  # numpy has many for bytes that are no array, MemoryError among them
        raise ValueError("message does not hold an envelope") from None


def _numpy(array: Array) -> NDArray[Any]:
    found: Any = array.numpy()
    if not isinstance(found, np.ndarray):  # numpy opens archives, too
        raise TypeError("not an array")
    return found


def error_record(code: str) -> RecordDict:
    """What the relay answers when it has no answer: a code, never an exception's text, which
    Flower would send to the coordinator verbatim."""
    return RecordDict({_ERROR: ConfigRecord({"code": code})})


def error_code(message: Message) -> str | None:
    """The code of a message that brings no envelope: the relay's own, or `flower-<n>`. Nobody
    signed it: what has not the form of a code is `relay-failed`."""
    if message.has_error():
        return f"flower-{message.error.code}"
    if _ERROR in message.content:
        try:
            return _CODE.validate_python(message.content[_ERROR].get("code"))
        except ValidationError:
            return "relay-failed"
    return None


def request_message(envelope: Envelope, kind: Kind, node: int, *, seconds: float) -> Message:
    """A message for `node` that lives for `seconds`."""
    return Message(
        to_record(envelope), dst_node_id=node, message_type=MESSAGE_TYPES[kind], ttl=seconds
    )

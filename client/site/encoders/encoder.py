"""What every encoder is: frozen, deterministic, identified by all that decides its output."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.site.shard import Shard

Embedding = NDArray[np.float32]
Input = TypeVar("Input", contravariant=True)


class Described(Protocol):
    """What all encoders tell about themselves.

    Attributes:
        fingerprint: Hex hash of everything that changes the output. The vault keeps embeddings of
            different fingerprints apart for ever.
        dim: Width d of an embedding.
        tokens: Most tokens T of one input; 1 when pooled.
        description: One line for the run's summary: public, hence never a path.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def description(self) -> str: ...


class InputEncoder(Described, Protocol[Input]):
    """Encodes single inputs: a note (str) or an image (PIL)."""

    def encode(self, inputs: Sequence[Input]) -> list[Embedding]:
        """Embeddings `[t, d]` float32, 0 <= t <= tokens; t = 0 means that there is nothing in it.

        The result for an input does not depend on its neighbours in the list.
        """
        ...


@runtime_checkable
class RecordEncoder(Described, Protocol):
    """Encodes what a whole record has in the tables; cheap, so all records at once."""

    def encode_records(self, shard: Shard, records: pl.DataFrame) -> tuple[Embedding, Any]:
        """`[N, d]` float32 and presence `[N]` bool of these rows of the shard's records."""
        ...

    def input_digest(self, shard: Shard) -> str:
        """Hash of the tables that are read: a new export is encoded anew."""
        ...


Encoder = InputEncoder[Any] | RecordEncoder


def fingerprint(*modules: ModuleType | object, **facts: Any) -> str:
    """Hash of the source text of `modules` (module, or any object's own) and of `facts`.

    The source stands in the hash so that nobody has to remember to count a version up.
    """
    sources = [Path(inspect.getfile(m)).read_text() for m in modules]  # type: ignore[arg-type]
    text = json.dumps([sources, facts], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def file_digest(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content, by file name."""
    digests = {}
    for file in sorted(files):
        with file.open("rb") as stream:
            digest = sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        digests[file.name] = digest.hexdigest()
    return digests


def unit_norm(vector: NDArray[Any]) -> Embedding:
    """The vector scaled to L2 norm 1 along its last axis; zero stays zero."""
    norm = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.divide(vector, norm, out=np.zeros_like(vector), where=norm > 0).astype(np.float32)

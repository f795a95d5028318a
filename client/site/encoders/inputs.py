"""Encoding the single inputs of records (notes, images, ready vectors) and pooling them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.site.encoders.encoder import Embedding, InputEncoder
from client.site.encoders.pooling import UNNORMALISED, pool, weighted_sum, weights
from client.site.encoders.registry import Precomputed
from client.site.encoders.vault import Item, Vault
from client.site.shard import Shard, decode_image
from common.errors import EncoderError, ShardError
from common.study import Source

_TABLE = {"text": "notes", "image": "images", "embedding": "embeddings"}
_BATCH = 64
_COMMIT_SECONDS = 1.0
"""A killed encode loses at most the inputs of this time, or the one input that takes longer."""


def encode_inputs(
    name: str,
    source: Source,
    encoder: InputEncoder[Any] | Precomputed,
    shard: Shard,
    vault: Vault,
    report: Callable[[int, int], None],
) -> tuple[Embedding, NDArray[np.bool_]]:
    """Embeddings of each record's visible inputs, pooled.

    Each input is encoded once, whichever records see it; a file or text that occurs twice, once.
    Where the source has several tokens, they are those of the latest note or image, or the latest
    precomputed rows; of one hour, the order is that of the content's hash.

    Args:
        name: Of the source; precomputed vectors are found by it.
        report: Told how many inputs of how many are done.

    Returns:
        ``x`` `[N, T, d]` float32 and mask `[N, T]`, rows as in the shard's records.

    Raises:
        ShardError, EncoderError, VaultError: See `encode_site`.
    """
    n = shard.records.height
    x_NTd = np.zeros((n, encoder.tokens, encoder.dim), dtype=np.float32)
    mask_NT = np.zeros((n, encoder.tokens), dtype=bool)
    table: pl.DataFrame | None = getattr(shard, _TABLE[source.modality])
    if table is None:
        report(0, 0)
        return x_NTd, mask_NT
    visible = _visible(name, source, table, shard.records)
    needed = visible.select("input", "patient_id").unique().sort("input").rows()
    identities: dict[int, str] = {}
    embeddings: dict[int, Embedding] = {}
    report(0, len(needed))
    if isinstance(encoder, Precomputed):
        for row, _ in needed:
            embeddings[row] = _vector(shard, row, encoder.dim)
            identities[row] = sha256(embeddings[row].tobytes()).hexdigest()
    else:
        for row, identity, embedding in _encoded(encoder, shard, source, needed, vault):
            embeddings[row], identities[row] = embedding, identity
            report(len(embeddings), len(needed))
    report(len(needed), len(needed))
    combine = weighted_sum if source.pooling in UNNORMALISED else pool
    for (record,), rows in visible.group_by("record", maintain_order=True):
        # Inputs without content (a note without words) are as good as not there. The sum goes in
        # the order of time and content, so that the order of the table means nothing.
        chosen = sorted(
            (hours, identities[row], row)
            for row, hours in rows.select("input", "hours").iter_rows()
            if len(embeddings[row])
        )
        if chosen and source.tokens > 1:
            latest = chosen[-encoder.tokens :] if isinstance(encoder, Precomputed) else chosen[-1:]
            tokens_td = np.concatenate([embeddings[row] for _, _, row in latest])
            x_NTd[record, : len(tokens_td)], mask_NT[record, : len(tokens_td)] = tokens_td, True
        elif chosen:
            share = weights(np.array([hours for hours, _, _ in chosen]), source.pooling)
            x_NTd[record], mask_NT[record] = combine(
                [embeddings[row] for _, _, row in chosen], share, encoder.tokens
            )
    return x_NTd, mask_NT


def _visible(name: str, source: Source, table: pl.DataFrame, records: pl.DataFrame) -> pl.DataFrame:
    """Which inputs a record may see: columns record, input (row numbers), patient_id, hours."""
    inputs = table.with_columns(input=pl.int_range(pl.len()))
    if source.modality == "text" and source.categories:
        inputs = inputs.filter(pl.col("category").is_in(source.categories))
    if source.modality == "embedding":
        inputs = inputs.filter(pl.col("source") == name)
    return (
        records.select("patient_id", "stay_id", "cutoff_hours", record=pl.int_range(pl.len()))
        .join(inputs.select("input", "stay_id", "hours"), on="stay_id")
        .filter(pl.col("hours") <= pl.col("cutoff_hours"))
        .select("record", "input", "patient_id", "hours")
        .sort("record", "input")
    )


def _encoded(
    encoder: InputEncoder[Any],
    shard: Shard,
    source: Source,
    needed: Sequence[tuple[int, str]],
    vault: Vault,
) -> Iterator[tuple[int, str, Embedding]]:
    """Row, content hash and embedding of each input, from the vault or encoded and stored."""
    read, encode_one = _MODALITIES[source.modality]
    for start in range(0, len(needed), _BATCH):
        batch = needed[start : start + _BATCH]
        contents = {row: read(shard, row) for row, _ in batch}
        identities = {row: sha256(content).hexdigest() for row, content in contents.items()}
        items = [
            Item(encoder.fingerprint, patient, f"{source.modality} {identities[row]}")
            for row, patient in batch
        ]
        fresh: dict[str, Embedding] = {}
        with _Pending(vault) as pending:
            for item, (row, _), value in zip(items, batch, vault.read(items), strict=True):
                identity = identities[row]
                if value is None:
                    if identity not in fresh:
                        fresh[identity] = encode_one(encoder, shard, row, contents[row])
                    value = fresh[identity]
                    pending.add(item, value)
                yield row, identity, value


class _Pending:
    """Encoded inputs on their way to the vault; what is finished is kept, whatever happens next."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._entries: list[tuple[Item, Embedding]] = []
        self._last = time.monotonic()

    def add(self, item: Item, value: Embedding) -> None:
        self._entries.append((item, value))
        if time.monotonic() - self._last > _COMMIT_SECONDS:
            self._store()

    def _store(self) -> None:
        entries, self._entries = self._entries, []
        if entries:
            self._vault.write(entries)
        self._last = time.monotonic()

    def __enter__(self) -> _Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self._store()


def _note(shard: Shard, row: int) -> bytes:
    assert shard.notes is not None
    return str(shard.notes["text"][row]).encode()


def _encode_note(encoder: InputEncoder[Any], shard: Shard, row: int, content: bytes) -> Embedding:
    place = f"{shard.path / 'notes.parquet'}, row {row}"
    return _finite(encoder.encode([content.decode()])[0], place)


def _encode_image(encoder: InputEncoder[Any], shard: Shard, row: int, content: bytes) -> Embedding:
    place = shard.image_place(row)
    return _finite(encoder.encode([decode_image(content, place)])[0], place)


_Read = Callable[[Shard, int], bytes]
_EncodeOne = Callable[[InputEncoder[Any], Shard, int, bytes], Embedding]
_MODALITIES: Mapping[str, tuple[_Read, _EncodeOne]] = {
    "text": (_note, _encode_note),
    "image": (Shard.image_bytes, _encode_image),
}


def _vector(shard: Shard, row: int, dim: int) -> Embedding:
    assert shard.embeddings is not None
    vector = shard.embeddings["vector"][row].to_numpy()
    if len(vector) != dim:
        raise ShardError(
            f"{shard.path / 'embeddings.parquet'}, row {row}: the vector has {len(vector)} "
            f"numbers, the study declares dim = {dim}",
            cure="declare the width that the hospitals' vectors have",
        )
    return np.array(vector[None], dtype=np.float32)


def _finite(embedding: Embedding, place: str) -> Embedding:
    if not np.isfinite(embedding).all():
        raise EncoderError(
            f"{place}: the encoder gives a number that is not finite",
            cure="remove the input, or use another encoder",
        )
    return np.asarray(embedding, dtype=np.float32)

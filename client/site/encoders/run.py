"""Encoding a hospital's records for a study: shard and vault in, two populations of tensors out."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from client.site.encoders.dataset import Dataset
from client.site.encoders.encoder import Embedding, RecordEncoder, unit_norm
from client.site.encoders.inputs import encode_inputs
from client.site.encoders.pooling import UNNORMALISED
from client.site.encoders.registry import build_encoder
from client.site.encoders.vault import Item, Vault
from client.site.shard import Shard
from common.errors import StudyError
from common.study import Study


@dataclass(frozen=True)
class EncodeProgress:
    """How far a source is: inputs (records, for series and tables) done of all there are."""

    source: str
    done: int
    total: int


@dataclass(frozen=True)
class Populations:
    """A hospital's patients, split once and for ever.

    Attributes:
        train: Patients that may train.
        validation: Patients that never do.
        remarks: What this shard lacks of the study. For the hospital's own eyes.
    """

    train: Dataset
    validation: Dataset
    remarks: tuple[str, ...] = ()


def encode_site(
    study: Study,
    shard: Shard,
    vault: Vault,
    *,
    population_key: bytes,
    on_progress: Callable[[EncodeProgress], None] = lambda _: None,
) -> Populations:
    """Encodes all records of a shard, taking from the vault what it holds already.

    Only inputs with ``hours <= cutoff_hours`` of their record are ever read. What a shard lacks is
    absent (a source) or unknown (a task): hospitals differ. The result is a function of shard,
    study and `population_key`; the vault's state and the order of an input table change nothing.
    Tokens of images, texts and precomputed embeddings are scaled to norm 1 (before pooling, where
    it is `UNNORMALISED`); those of series and tables are bounded by their encoders. Records
    without any source are left out (under `complete_records_only`, those that lack one), and
    patients who have no other: a function of each patient's own records.

    Args:
        population_key: The site's lasting secret: HMAC-SHA256(key, patient_id), as a fraction,
            below `evaluation.validation_fraction` means validation.
        on_progress: Called at least once per source, in the caller's thread.

    Raises:
        StudyError: The shard has none of the study's tasks; an unknown series.
        ShardError: An image that cannot be read; vectors of another width than the study's.
        EncoderError: An encoder that cannot be built, or that fails on an input.
        VaultError: The vault cannot be read or written.
    """
    labels, remarks = _labels(study, shard)
    inputs: dict[str, torch.Tensor] = {}
    present: dict[str, torch.Tensor] = {}
    for name, source in study.sources.items():
        report = _reporter(name, on_progress)
        encoder = build_encoder(source)
        if isinstance(encoder, RecordEncoder):
            x_NTd, mask_NT = _encode_records(encoder, shard, vault, report)
        else:
            x_NTd, mask_NT = encode_inputs(name, source, encoder, shard, vault, report)
        if source.modality in ("image", "text", "embedding") and source.pooling not in UNNORMALISED:
            # Like the series' caps: no source may spend all of a patient's clipped norm.
            x_NTd = unit_norm(x_NTd)
        inputs[name], present[name] = torch.from_numpy(x_NTd), torch.from_numpy(mask_NT)
        if not mask_NT.any():
            remarks.append(f"source '{name}' is absent in every record")
    rows = _kept(study, present, remarks)
    records = shard.records[rows]
    whole = Dataset(
        rows_of_patient=_rows_of_patient(records),
        inputs={name: x_NTd[rows] for name, x_NTd in inputs.items()},
        present={name: mask_NT[rows] for name, mask_NT in present.items()},
        labels=labels[rows],
        record_ids=records["record_id"].to_list(),
    )
    apart = validates(records, population_key, study.evaluation.validation_fraction)
    return Populations(
        train=whole.subset(np.flatnonzero(~apart)),
        validation=whole.subset(np.flatnonzero(apart)),
        remarks=tuple(remarks),
    )


def _labels(study: Study, shard: Shard) -> tuple[torch.Tensor, list[str]]:
    """Labels `[N, K]` int8 (1 true, 0 false, -1 unknown); a remark per task without a column."""
    missing = [task for task in study.tasks if task not in shard.tasks]
    if len(missing) == len(study.tasks):
        raise StudyError(
            f"{shard.path / 'records.parquet'} has no label of study '{study.name}' "
            f"(y_{', y_'.join(missing)}); it has {', '.join(f'y_{t}' for t in shard.tasks)}",
            cure="name tasks after the shard's label columns, or add the columns",
        )
    columns = [
        shard.records[f"y_{task}"].cast(pl.Int8).fill_null(-1).to_numpy()
        if task in shard.tasks
        else np.full(shard.records.height, -1, dtype=np.int8)
        for task in study.tasks
    ]
    remarks = [f"task '{task}' has no column here: unknown in every record" for task in missing]
    return torch.from_numpy(np.stack(columns, axis=1)), remarks


def _kept(study: Study, present: dict[str, torch.Tensor], remarks: list[str]) -> NDArray[np.int64]:
    """Numbers of the records that the study takes; a remark on those that it leaves out."""
    there_SN = np.stack([mask_NT.any(dim=1).numpy() for mask_NT in present.values()])
    if not study.complete_records_only:
        rows = np.flatnonzero(there_SN.any(axis=0))
        if empty := there_SN.shape[1] - len(rows):
            remarks.append(f"{empty} of {there_SN.shape[1]} records have no source and are skipped")
        return rows
    rows = np.flatnonzero(there_SN.all(axis=0))
    if len(rows) < there_SN.shape[1]:
        remarks.append(
            f"{there_SN.shape[1] - len(rows)} of {there_SN.shape[1]} records lack a source and are "
            "left out (complete_records_only)"
        )
    return rows


def _rows_of_patient(records: pl.DataFrame) -> list[NDArray[np.int64]]:
    """Rows of each patient, patients in the order of their first record."""
    rows = (
        records.with_row_index("row")
        .group_by("patient_id", maintain_order=True)
        .agg(pl.col("row").cast(pl.Int64))["row"]
    )
    return [row.to_numpy() for row in rows]


def validates(records: pl.DataFrame, key: bytes, fraction: float) -> NDArray[np.bool_]:
    """Whether each patient `[P]` validates, patients in the order of their first record."""
    patients = records.unique("patient_id", keep="first", maintain_order=True)
    if "population" in records.columns:
        return (patients["population"] == "validation").to_numpy()
    shares = [_share(key, patient) for patient in patients["patient_id"]]
    return np.array(shares) < fraction


def _share(key: bytes, patient: str) -> float:
    digest = hmac.new(key, patient.encode(), sha256).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _encode_records(
    encoder: RecordEncoder, shard: Shard, vault: Vault, report: Callable[[int, int], None]
) -> tuple[Embedding, NDArray[np.bool_]]:
    """Embeddings `[N, 1, d]` and mask `[N, 1]`; an absent one is kept as `[0, d]`."""
    records, digest = shard.records, encoder.input_digest(shard)
    items = [
        Item(encoder.fingerprint, patient, f"record {record} {digest}")
        for record, patient in records.select("record_id", "patient_id").iter_rows()
    ]
    total = len(items)
    report(0, total)
    found = vault.read(items)
    gone = [row for row, value in enumerate(found) if value is None]
    if gone:
        report(total - len(gone), total)
        x, present = encoder.encode_records(shard, records[gone])
        fresh = [x[index : index + int(there)] for index, there in enumerate(present)]
        vault.write((items[row], value) for row, value in zip(gone, fresh, strict=True))
        for row, value in zip(gone, fresh, strict=True):
            found[row] = value
    report(total, total)
    mask = np.array([value is not None and len(value) == 1 for value in found], dtype=bool)
    stacked = np.zeros((total, 1, encoder.dim), dtype=np.float32)
    if mask.any():
        stacked[mask] = np.stack([value for value in found if value is not None and len(value)])
    return stacked, mask[:, None]


def _reporter(
    name: str, on_progress: Callable[[EncodeProgress], None]
) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(EncodeProgress(name, done, total))

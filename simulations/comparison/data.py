"""The patients of a comparison: every arm holds out the same ones, in every arrangement.

The split is written into copies of the shards (`population` of the records), so that pooled
training holds out the patients that the hospitals held out.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.site.shard import Shard
from common.errors import FedwardError
from simulations.comparison.suite import Arrangement
from simulations.merge import at_once, merge, with_split

POOLED = "pooled"
_DECLARED = 0.9  # of the training patients there are: a public round number lies below them


@dataclass(frozen=True)
class Hospitals:
    """The hospitals of one arrangement.

    Attributes:
        shards: Folder of each.
        declared: Training patients that each declares.
        vaults: Folder of each one's encoded records.
    """

    shards: dict[str, Path]
    declared: dict[str, int]
    vaults: dict[str, Path]


class Cohort:
    """Shards by seed, arrangement and share of training patients, made on first use.

    Args:
        shards: The hospitals as they are.
        held_out: Share of the patients that validate.
        folder: Receives the copies and the encoded records.
    """

    def __init__(self, shards: Mapping[str, Path], held_out: float, folder: Path) -> None:
        self._shards, self._held_out, self._folder = dict(shards), held_out, folder

    def hospitals(self, arrangement: Arrangement, seed: int, ratio: float = 1.0) -> Hospitals:
        """The hospitals of an arrangement; processes may ask at the same time."""
        kind = POOLED if arrangement == POOLED else "sites"
        base = self._folder / f"seed-{seed}" / kind
        with locked(base / ".lock"):
            whole = {n: base / "shards" / n for n in self._names(kind)}
            if not all((path / "shard.toml").exists() for path in whole.values()):
                self._write(kind, seed, whole)
            shards = whole
            if ratio < 1:
                shards = {n: base / f"shards-{ratio:g}" / n for n in whole}
                for name, path in shards.items():
                    if not (path / "shard.toml").exists():
                        _thin(whole[name], path, ratio, seed)
        return Hospitals(
            shards,
            {name: declared(_training(path)) for name, path in shards.items()},
            {name: base / "vaults" / name for name in shards},
        )

    def held_out(self, seed: int, tasks: Sequence[str]) -> tuple[NDArray[np.int8], int]:
        """Labels `[N, K]` (1 true, 0 false, -1 unknown) of every held-out record, also of those
        without any source, and the number of their patients; the same in every arrangement."""
        columns, patients = [f"y_{task}" for task in tasks], 0
        found: list[NDArray[np.int8]] = []
        for path in self.hospitals("federated", seed).shards.values():
            records = Shard.open(path).records.filter(pl.col("population") == "validation")
            patients += records["patient_id"].n_unique()
            labels = [
                records[c].cast(pl.Int8).fill_null(-1).to_numpy()
                if c in records.columns
                else np.full(records.height, -1, dtype=np.int8)
                for c in columns
            ]
            found.append(np.stack(labels, axis=1))
        return np.concatenate(found), patients

    def _names(self, kind: str) -> list[str]:
        return [POOLED] if kind == POOLED else list(self._shards)

    def _write(self, kind: str, seed: int, dest: Mapping[str, Path]) -> None:
        def validates(hospital: str, patient: str) -> bool:
            return _share(f"hold out\0{seed}\0{hospital}\0{patient}") < self._held_out

        if kind == POOLED:
            merge(self._shards, dest[POOLED], POOLED, validates)
        else:
            for name, path in self._shards.items():
                with_split(path, dest[name], validates)


def declared(patients: int) -> int:
    """What a hospital of so many training patients declares."""
    return max(1, int(_DECLARED * patients))


def _thin(shard: Path, dest: Path, ratio: float, seed: int) -> None:
    """The same shard with a share of its training patients; the larger share holds the smaller."""
    records = pl.read_parquet(shard / "records.parquet")
    keep = [
        population == "validation" or _share(f"keep\0{seed}\0{_own(patient)}") < ratio
        for population, patient in records.select("population", "patient_id").iter_rows()
    ]
    records = records.filter(pl.Series(keep))
    with at_once(dest) as making:
        for item in shard.iterdir():
            if item.name == "records.parquet":
                records.write_parquet(making / item.name)
            elif item.suffix == ".parquet":
                rows = pl.read_parquet(item)
                rows.filter(pl.col("stay_id").is_in(records["stay_id"].implode())).write_parquet(
                    making / item.name
                )
            else:
                (making / item.name).symlink_to(item.resolve())


def _own(patient: str) -> str:
    """A patient's id as in the hospital's own shard: `merge` puts the hospital before it."""
    return patient.rpartition("/")[2]


def _training(shard: Path) -> int:
    records = pl.read_parquet(shard / "records.parquet", columns=["patient_id", "population"])
    return records.filter(pl.col("population") == "train")["patient_id"].n_unique()


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def fingerprint(shards: Mapping[str, Path]) -> str:
    """Hash of the shards' tables and of name, size and time of their images (contents would take
    minutes): another export makes other cells."""
    digest = hashlib.sha256()
    for name, path in sorted(shards.items()):
        shard = Shard.open(path)
        digest.update(name.encode())
        for table in sorted(shard.path.glob("*.parquet")):
            with table.open("rb") as file:
                digest.update(table.name.encode() + hashlib.file_digest(file, "sha256").digest())
        for image in [] if shard.images is None else sorted(shard.images["path"].unique()):
            with suppress(OSError):  # one that is not there is told by whoever wants to read it
                about = (shard.path / image).stat()
                digest.update(f"{image}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One command at a time writes into a folder; the kernel ends the claim with the process.

    Raises:
        FedwardError: Another command is at it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            raise FedwardError(
                f"another command writes into {folder}",
                cure="wait for its end, or give another folder by --out",
            ) from None
        yield


@contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)

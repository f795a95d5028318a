"""Checkpoints that a crash cannot tear: written beside, synced, renamed.

A checkpoint is a folder `round-<n>` with `arrays.safetensors` (adapter and optimizer) and
`state.json` (everything else, and the digest of the arrays). Appearing under its name is atomic;
the last two are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from common.errors import FedwardError
from common.files import sync_folder
from common.messages import Arrays, digest_arrays

KEPT = 2
PARTS = ("adapter", "optimizer", "average")


class CheckpointError(FedwardError):
    """A checkpoint that does not belong to this run, or cannot be read."""

    code = "checkpoint-invalid"


@dataclass(frozen=True)
class Checkpoint:
    """All that the coordinator needs to go on after `round`.

    Attributes:
        round: Last round that was asked of the sites, lost ones included.
        completed: How many of them were aggregated.
        adapter, optimizer, average: Arrays after that round.
        history: Public values that the report needs (ε, bytes, evaluations), JSON.
    """

    study_hash: str
    run: str
    round: int
    completed: int
    adapter: Arrays
    optimizer: Arrays = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    average: Arrays = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Makes the checkpoint durable under `folder`, then drops older ones."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"round-{self.round:06d}"
        arrays = {
            f"{part}:{key}": array for part in PARTS for key, array in getattr(self, part).items()
        }
        state = {
            "study_hash": self.study_hash,
            "run": self.run,
            "round": self.round,
            "completed": self.completed,
            "history": self.history,
            "arrays_digest": digest_arrays(arrays),
        }
        temporary = folder / f".{name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _durable(temporary / "arrays.safetensors", save(arrays))
        _durable(temporary / "state.json", json.dumps(state, indent=1).encode())
        sync_folder(temporary)
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)  # of an earlier attempt at the same round
        os.rename(temporary, final)
        sync_folder(folder)
        for old in sorted(folder.glob("round-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        for torn in folder.glob(".round-*"):
            shutil.rmtree(torn, ignore_errors=True)

    @classmethod
    def latest(cls, folder: Path, *, study_hash: str) -> Checkpoint | None:
        """The newest whole checkpoint; None when there is none.

        Raises:
            CheckpointError: It belongs to another study, or none of those present can be read.
        """
        found = sorted(folder.glob("round-*"), reverse=True)
        for path in found:
            try:
                state = json.loads((path / "state.json").read_bytes())
                arrays = load((path / "arrays.safetensors").read_bytes())
                if digest_arrays(arrays) != state["arrays_digest"]:
                    raise ValueError("arrays do not match their digest")
            except Exception:  # a torn disk: the one before may be whole
                continue
            if state["study_hash"] != study_hash:
                raise CheckpointError(
                    f"{path} belongs to study {state['study_hash'][:12]}, not {study_hash[:12]}",
                    cure="resume with the same study and overrides, or choose another --out",
                )
            part = {
                kind: {
                    key.partition(":")[2]: array
                    for key, array in arrays.items()
                    if key.startswith(f"{kind}:")
                }
                for kind in PARTS
            }
            return cls(
                study_hash,
                state["run"],
                state["round"],
                state["completed"],
                **part,
                history=state["history"],
            )
        if found:
            raise CheckpointError(
                f"no checkpoint under {folder} can be read",
                cure="restore the folder, or start over",
            )
        return None


def _durable(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

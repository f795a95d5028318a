"""A look into AdaCoMed: its weights over training (the paper's Figure 6), and the representations
of both pathways (Figure 2). Of held-out records, hence for simulations only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file

from client.site.encoders.dataset import Dataset
from client.site.encoders.run import encode_site
from client.site.encoders.vault import Vault
from client.site.model.fusion.adacomed import AdaCoMed
from client.site.model.system import build, load_adapter
from client.site.shard import Shard
from common.errors import StudyError
from common.messages import Arrays
from common.study import Study
from simulations.comparison.data import Hospitals

if TYPE_CHECKING:  # which imports this module
    from simulations.comparison.execute import Job

_RECORDS = 400


class Trace:
    """Mean and spread of w_large over held-out records, round by round.

    Attributes:
        points: `{"round", "mean", "low", "high"}` (5th and 95th percentile); empty for a study that
            has no such weights.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        options = study.model.adacomed
        self._has = options is not None and options.form == "adaptive"
        self.points: list[dict[str, float]] = []

    def of(self, hospitals: Hospitals) -> Callable[[int, Arrays], None] | None:
        """What to call after each round."""
        if not self._has:
            return None
        data = held_out(self._study, hospitals)
        model = _model(self._study, data)

        def look(number: int, adapter: Arrays) -> None:
            load_adapter(model, adapter)
            with torch.no_grad():
                both = model.collaborate(model.read(data.inputs, data.present), data.present)
            w = both.w_BP[both.here_BP.all(dim=1), 0].numpy()
            if len(w):
                low, high = np.quantile(w, [0.05, 0.95])
                self.points.append(
                    {
                        "round": number,
                        "mean": float(w.mean()),
                        "low": float(low),
                        "high": float(high),
                    }
                )

        return look


def check_maps(arms: Iterable[str], jobs: Iterable[Job]) -> None:
    """Raises:
    StudyError: One of the arms has not two pathways, so that there is no map of them.
    """
    for job in (j for j in jobs if j.cell.row.name in set(arms)):
        options = job.study.model.adacomed
        if (
            job.cell.row.arm.kind != "system"
            or options is None
            or options.form not in ("adaptive", "logit-ensemble")
        ):
            raise StudyError(
                f"maps: arm '{job.cell.row.name}' has no large and small pathway to draw",
                cure="name arms of AdaCoMed with both, or take it out of maps",
            )


def representations(
    study: Study, hospitals: Hospitals, adapter: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Both pathways' z of up to 400 held-out records that each has something of: `[2, N, d]`, and
    the label of the study's first task `[N]`."""
    data = held_out(study, hospitals)
    model = _model(study, data)
    load_adapter(model, load_file(adapter))
    with torch.no_grad():
        z_BPd, _, here_BP = model.represent(model.read(data.inputs, data.present), data.present)
    whole = here_BP.all(dim=1)
    return z_BPd[whole].transpose(0, 1).numpy(), data.labels[whole, 0].numpy()


def held_out(study: Study, hospitals: Hospitals) -> Dataset:
    """Up to 400 held-out records, shared evenly among the hospitals."""
    parts = []
    for name, path in hospitals.shards.items():
        with Vault.open(hospitals.vaults[name]) as vault:
            site = encode_site(study, Shard.open(path), vault, population_key=b"by shard")
        parts.append(site.validation)
    count = _RECORDS // len(parts)
    return Dataset(
        rows_of_patient=[],
        inputs={s: torch.cat([p.inputs[s][:count] for p in parts]) for s in study.sources},
        present={s: torch.cat([p.present[s][:count] for p in parts]) for s in study.sources},
        labels=torch.cat([p.labels[:count] for p in parts]),
        record_ids=[],
    )


def _model(study: Study, data: Dataset) -> AdaCoMed:
    model = build(study, {s: x.shape[-1] for s, x in data.inputs.items()}).eval()
    assert isinstance(model, AdaCoMed)
    return model

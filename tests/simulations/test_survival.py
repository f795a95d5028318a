"""AdaCoMed's fourth task: survival from embeddings that a hospital made elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.site.shard import write_shard
from common.study import Study, resolve
from simulations.inline import run_inline
from simulations.preflight import check

PATIENTS, DECLARED = 160, 100


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """CT, slides and record of a made-up kidney clinic, all of which tell who lives."""
    rng = np.random.default_rng(0)
    lives = rng.random(PATIENTS) < 0.6
    vectors = {
        source: rng.normal(size=(PATIENTS, dim)) + np.where(lives, 0.3, -0.3)[:, None]
        for source, dim in (("ct", 512), ("wsi", 1024), ("clinical", 4096))
    }
    stays = [f"s{n}" for n in range(PATIENTS)]
    write_shard(
        tmp_path / "clinic",
        meta={"name": "clinic", "hospital": "clinic", "dataset": "made up"},
        records=pl.DataFrame(
            {
                "record_id": [f"r{n}" for n in range(PATIENTS)],
                "patient_id": [f"p{n}" for n in range(PATIENTS)],
                "stay_id": stays,
                "cutoff_hours": 24.0,
                "age": 60.0,
                "sex": "F",
                "y_vital_12": lives,
            }
        ),
        embeddings=pl.concat(
            pl.DataFrame(
                {
                    "stay_id": stays,
                    "hours": 1.0,
                    "source": source,
                    "vector": (v / np.linalg.norm(v, axis=1, keepdims=True)).tolist(),
                }
            )
            for source, v in vectors.items()
        ),
    )
    return tmp_path / "clinic"


@pytest.mark.parametrize("private", [True, False])
def test_the_ready_study_learns_survival(hospital: Path, tmp_path: Path, private: bool) -> None:
    study = Study.load("adacomed-survival")
    check(study, {"clinic": hospital})
    settled = resolve(study, sites={"clinic": None}, rounds=3, private=private)
    assert settled.federation.sites["clinic"].patients_declared == DECLARED
    report = run_inline(settled, {"clinic": hospital}, tmp_path / "out")
    assert report.simulation_exact is not None
    auroc = report.simulation_exact.tasks["vital_12"].auroc
    assert auroc is not None
    assert auroc > 0.7

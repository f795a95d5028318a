"""Patches and sentences on their way from a hospital's files into the fusion, under privacy."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional

from client.site.encoders.registry import dimensions
from client.site.model.fusion.llama_fusion import LlamaFusion
from client.site.model.fusion.m_llm import MLlmModel
from client.site.model.fusion.uni_mlm import UniMlm
from client.site.model.system import adapter_state, build
from client.site.shard import write_shard
from common.study import Study, resolve
from simulations.inline import run_inline

PATIENTS = 40
TEXTS = ("No edema.", "Fever since two days. Cough.", "Edema. Cough. Fever. Pain. Unrest.")
SYSTEMS: list[tuple[dict[str, Any], type]] = [
    ({"system": "llama-fusion"}, LlamaFusion),
    (
        {"system": "llama-fusion", "llama_fusion": {"fusion": "mixed", "pooling": "mean"}},
        LlamaFusion,
    ),
    ({"system": "llama-fusion", "llama_fusion": {"fusion": "transchex"}}, LlamaFusion),
    ({"system": "m-llm"}, MLlmModel),
    ({"system": "uni-mlm"}, UniMlm),
]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Notes of one to five sentences, images of every second patient, three slide vectors."""
    rng = np.random.default_rng(0)
    stays = [f"s{n}" for n in range(PATIENTS)]
    write_shard(
        tmp_path / "a",
        meta={"name": "a", "hospital": "a", "dataset": "made up"},
        records=pl.DataFrame(
            {
                "record_id": [f"r{n}" for n in range(PATIENTS)],
                "patient_id": [f"p{n}" for n in range(PATIENTS)],
                "stay_id": stays,
                "cutoff_hours": 24.0,
                "age": rng.uniform(20, 90, PATIENTS),
                "sex": "F",
                "y_death": rng.random(PATIENTS) < 0.4,
            }
        ),
        notes=pl.DataFrame(
            {
                "stay_id": stays,
                "hours": 1.0,
                "category": "Admission",
                "text": [TEXTS[n % 3] for n in range(PATIENTS)],
            }
        ),
        images=pl.DataFrame(
            {
                "stay_id": stays[::2],
                "hours": 2.0,
                "path": [f"images/{s}.png" for s in stays[::2]],
                "view": "AP",
            }
        ),
        embeddings=pl.DataFrame(
            {
                "stay_id": [s for s in stays for _ in range(3)],
                "hours": [1.0, 2.0, 3.0] * PATIENTS,
                "source": "slide",
                "vector": rng.normal(size=(3 * PATIENTS, 5)).tolist(),
            }
        ),
        files={f"images/{s}.png": png(n) for n, s in enumerate(stays[::2])},
    )
    return tmp_path / "a"


def protocol(model: dict[str, Any]) -> Study:
    return resolve(
        Study.model_validate(
            {
                "name": "tokens",
                "sources": {
                    "note": {"modality": "text", "encoder": "hashed-text", "tokens": 4},
                    "xray": {"modality": "image", "encoder": "image-descriptor", "tokens": 9},
                    "slide": {
                        "modality": "embedding",
                        "encoder": "precomputed",
                        "dim": 5,
                        "tokens": 2,
                    },
                    "age": {"modality": "table", "encoder": "demographics"},
                },
                "tasks": {"death": {"prevalence": 0.4}},
                "model": model,
                "training": {"steps_per_round": 3},
                "privacy": {"sample_rate": 0.4, "delta": 1e-3},
                "evaluation": {"bins": 4},
                "federation": {"rounds": 2, "sites": {"a": {"patients_declared": 20}}},
            }
        )
    )


@pytest.mark.parametrize(
    ("model", "system"), SYSTEMS, ids=["early", "mixed", "transchex", "m-llm", "uni-mlm"]
)
def test_a_private_run_trains_on_all_tokens(hospital, tmp_path, monkeypatch, model, system):
    torch.set_num_threads(1)
    study = protocol(model)
    seen: dict[str, list[int]] = {name: [] for name in study.sources}
    predict = system.predict

    def watched(self: Any, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Any:
        # Sites also try their kernels on random tokens, of any length. What fills up a pass
        # is present and all zeros.
        dummy_B = torch.stack([~x.flatten(1).any(1) for x in inputs.values()]).all(0)
        length_BT, mask_BT = inputs["note"].norm(dim=-1), present["note"].float()
        real = torch.allclose(length_BT[~dummy_B], mask_BT[~dummy_B], atol=1e-4)
        if torch.is_grad_enabled() and real:
            for name, mask_BT in present.items():
                assert inputs[name].shape[:2] == mask_BT.shape
                seen[name] += mask_BT[~dummy_B].sum(1).tolist()
        return predict(self, inputs, present)

    monkeypatch.setattr(system, "predict", watched)
    report = run_inline(study, {"a": hospital}, tmp_path / "out")
    assert {name: set(counts) - {0} for name, counts in seen.items()} == {
        "note": {1, 2, 4},
        "xray": {9},
        "slide": {2},
        "age": {1},
    }
    assert 0 in seen["xray"]  # every second patient has none
    assert report.rounds == 2
    (site,) = report.sites
    assert site.steps == 6
    assert site.epsilon is not None
    assert 0 < site.epsilon <= study.privacy.epsilon
    before = adapter_state(build(study, dimensions(study)))
    after = load_file(tmp_path / "out" / "adapter" / "projectors.safetensors")
    projectors = [name for name in before if name.startswith(("projectors.", "encoders."))]
    assert len(projectors) >= len(study.sources)
    for name in projectors:
        assert np.isfinite(after[name]).all()
        assert not np.array_equal(after[name], before[name])


def gradient_norm(model: Any, tokens: int, seed: int) -> float:
    """Of one record's loss to all parameters, with so many similar image tokens of norm 1."""
    g = torch.Generator().manual_seed(seed)
    similar = torch.randn(1, 1, 150, generator=g)
    inputs = {
        "note": functional.normalize(torch.randn(1, 1, 512, generator=g), dim=-1),
        "xray": functional.normalize(similar + torch.randn(1, tokens, 150, generator=g), dim=-1),
    }
    model.zero_grad()
    goal = model.objective(inputs, {n: torch.ones(x.shape[:2]).bool() for n, x in inputs.items()})
    functional.softplus(-goal.logits_BVK).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.stack([grad.norm() for grad in gradients]).norm())


@pytest.mark.parametrize("system", ["uni-mlm", "llama-fusion", "m-llm", "adacomed"])
def test_many_tokens_of_norm_1_spend_no_more_than_one(system):
    """Every system takes means of tokens, so their number is no lever on the clipped norm."""
    torch.set_num_threads(1)
    sources = {
        "note": {"modality": "text", "encoder": "hashed-text"},
        "xray": {"modality": "image", "encoder": "image-descriptor", "tokens": 16},
    }
    model = build(
        Study.model_validate(
            {"name": "t", "sources": sources, "tasks": {"death": {}}, "model": {"system": system}}
        ),
        {"note": 512, "xray": 150},
    )
    if system == "m-llm":  # its head starts at 0, and no gradient would reach the tokens
        torch.nn.init.normal_(model.head.weight, std=0.1)
    one, many = (np.mean([gradient_norm(model, t, s) for s in range(10)]) for t in (1, 16))
    # Measured for uni-mlm: 1.042, since the mean of its logits gives 16 of 17 parts to one source.
    assert 0.5 * one < many < (1.05 if system == "uni-mlm" else 1.03) * one

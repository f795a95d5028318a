"""A small model with every form of trainable layer, patients with several records, and the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.sampler import PatientSampler

torch.set_num_threads(1)

SOURCES = {"xray": (1, 24), "note": (3, 10), "lab": (1, 7)}  # name -> tokens, features
TASKS = 3
HIDDEN = 16


class TinyFusion(nn.Module):
    """Projectors, a frozen Llama with LoRA, mean over present tokens, frozen output rows."""

    def __init__(self, lora: bool = True, layer_norm: bool = False) -> None:
        super().__init__()
        self.projectors = nn.ModuleDict({s: nn.Linear(d, HIDDEN) for s, (_, d) in SOURCES.items()})
        self.norm = nn.LayerNorm(HIDDEN) if layer_norm else nn.Identity()
        self.kind = nn.Embedding(len(SOURCES), HIDDEN) if layer_norm else None
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        self.slm = LlamaModel(config).requires_grad_(False)
        if lora:
            self.slm = get_peft_model(
                self.slm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
            )
            for name, p in self.slm.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.3)
        self.register_buffer("rows", torch.randn(TASKS, HIDDEN))

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        tokens, masks = [], []
        for source in SOURCES:
            token = self.projectors[source](inputs[source])
            tokens.append(token * present[source][..., None])
            masks.append(present[source])
        x, mask = self.norm(torch.cat(tokens, 1)), torch.cat(masks, 1)[..., None]
        if self.kind is not None:
            numbers = [torch.full_like(m, i, dtype=torch.long) for i, m in enumerate(masks)]
            x = x + self.kind(torch.cat(numbers, 1))
        x = self.slm(inputs_embeds=x.to(self.slm.dtype)).last_hidden_state.to(x.dtype)
        pooled = (x * mask).sum(1) / mask.sum(1).clamp(min=1)
        return pooled @ self.rows.T.to(x.dtype)


def masked_bce(
    model: nn.Module, inputs: dict[str, Tensor], present: dict[str, Tensor], labels: Tensor
) -> Tensor:
    logits = model(inputs, present)
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels.clamp(min=0).to(logits.dtype), reduction="none"
    )
    return (losses * (labels >= 0)).sum(1) / TASKS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def row_loss() -> Callable[..., Tensor]:
    return masked_bce


@pytest.fixture
def make_model() -> Callable[..., TinyFusion]:
    return TinyFusion


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    def make(
        patients: int = 12, most_records: int = 5, dtype: torch.dtype = torch.float32
    ) -> Dataset:
        counts = [1 + i % most_records for i in range(patients)]
        bounds, n = np.cumsum([0, *counts]), sum(counts)
        return Dataset(
            rows_of_patient=[np.arange(bounds[i], bounds[i + 1]) for i in range(patients)],
            inputs={s: 3 * torch.randn(n, t, d, dtype=dtype) for s, (t, d) in SOURCES.items()},
            present={s: torch.rand(n, t) < 0.8 for s, (t, _) in SOURCES.items()},
            labels=torch.randint(-1, 2, (n, TASKS), dtype=torch.int8),
            record_ids=[f"r{i}" for i in range(n)],
        )

    return make


@pytest.fixture
def clipped_sum() -> Callable[..., Tensor]:
    """The engine's clipped sum over a given draw, as one float64 vector."""

    def compute(
        clipper: PatientClipper,
        model: nn.Module,
        dataset: Dataset,
        chosen: Sequence[np.ndarray],
        micro_batch: int = 4,
        row_loss: Callable[..., Tensor] = masked_bce,
    ) -> Tensor:
        k = clipper.rows_per_patient
        sampler = PatientSampler(dataset.rows_of_patient, 1.0, k, Entropy.seeded(0))
        clipper.begin()
        for batch in sampler.pack(chosen, micro_batch, pad=True):
            rows = batch.gather(dataset, torch.device("cpu"))
            with clipper.capture():
                losses = row_loss(model, *rows)
                loss = (losses * batch.weights.flatten().to(losses.dtype)).sum()
            clipper.add(loss, batch.valid)
        sums = clipper.sums
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert len(sums) == len(trainable)
        return torch.cat([sums[p].flatten() for p in trainable])

    return compute


@pytest.fixture
def brute_force() -> Callable[..., list[Tensor]]:
    """Each patient's gradient by plain autograd, one patient at a time, unclipped."""

    def compute(
        model: nn.Module,
        dataset: Dataset,
        chosen: Sequence[np.ndarray],
        row_loss: Callable[..., Tensor] = masked_bce,
    ) -> list[Tensor]:
        trainable = [p for p in model.parameters() if p.requires_grad]
        gradients = []
        for rows in chosen:
            of = torch.from_numpy(rows)
            loss = row_loss(
                model,
                {s: x[of] for s, x in dataset.inputs.items()},
                {s: m[of] for s, m in dataset.present.items()},
                dataset.labels[of],
            ).mean()
            parts = torch.autograd.grad(loss, trainable, materialize_grads=True)
            gradients.append(torch.cat([g.flatten().double() for g in parts]))
        return gradients

    return compute


@pytest.fixture(scope="session")
def ward(ward_module: ModuleType) -> ModuleType:
    return ward_module

"""What every system of the papers is to the rest of the house."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch of B records.

    Attributes:
        logits_BK: One logit per task, float32.
        auxiliary_B: What the system adds to a record's loss beside classification, weighted as it
            enters; None where there is nothing. A function of that record and public values alone.
    """

    logits_BK: Tensor
    auxiliary_B: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What is trained: V predictions of each record, and their shares in its loss.

    Attributes:
        logits_BVK: Logits of each prediction.
        share_BV: Factor of each one's classification loss; a function of the record alone.
        auxiliary_B: As in `Prediction`.
    """

    logits_BVK: Tensor
    share_BV: Tensor
    auxiliary_B: Tensor | None = None


NO_SLM: Mapping[str, Any] = {"name": "none", "revision": None, "sha256": "", "embedded": True}
"""`slm_description` of a system that stands on no language model."""


class RiskModel(nn.Module):
    """A system of the papers: frozen and trainable modules between embeddings and logits.

    `forward(inputs, present) -> Prediction` takes embeddings `[B, T, d]` float32 and masks `[B, T]`
    by source. What it says of a record depends on that record alone, and every trainable layer runs
    in every pass, absent sources masked.

    Attributes:
        slm: The language model, possibly wrapped by peft; None where the system has none.
        slm_description: See `Slm.describe`; `NO_SLM` without one.
        designated: Vocabulary entry of each task; empty where logits come from a head.
        dims: Width of each source's embedding, in token order.
        classification_weight: Factor of the classification loss beside `auxiliary_B`.
        logits: What a logit is, for who rebuilds the model.
    """

    slm: nn.Module | None
    slm_description: Mapping[str, Any]
    designated: list[int]
    dims: dict[str, int]
    classification_weight: float = 1.0
    logits: str = "of the system's head; positive at >= 0"

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records."""
        raise NotImplementedError

    def objective(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Objective:
        """What training sees of B records: by default what `forward` predicts, with share 1."""
        said = self(inputs, present)
        share_B1 = torch.ones_like(said.logits_BK[:, :1])
        return Objective(said.logits_BK[:, None], share_B1, said.auxiliary_B)

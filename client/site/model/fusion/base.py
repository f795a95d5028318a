"""What every system of the papers is to the rest of the house."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch of B records.

    Attributes:
        logits_BK: One logit per task, float32.
        reconstruction_B: Sum over present sources of ||e - e_hat||_2, or None without decoders.
    """

    logits_BK: Tensor
    reconstruction_B: Tensor | None = None


class RiskModel(nn.Module):
    """A frozen SLM and the trainable modules before, in and behind it.

    `forward(inputs, present) -> Prediction` takes embeddings `[B, T, d]` float32 and masks `[B, T]`
    by source. What it says of a record depends on that record alone.

    Attributes:
        slm: The language model, possibly wrapped by peft.
        slm_description: See `Slm.describe`.
        designated: Vocabulary entry of each task.
        dims: Width of each source's embedding, in token order.
    """

    slm: nn.Module
    slm_description: dict[str, Any]
    designated: list[int]
    dims: dict[str, int]

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records."""
        raise NotImplementedError

"""What every system of the papers is to the rest of the house."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from client.site.model.fusion.linear_start import LinearStart


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

    A system is its `predict`; `forward` and `objective` are what the house calls. What it says of a
    record depends on that record alone, and every trainable layer runs in every pass, absent
    sources masked.

    Attributes:
        slm: The language model, possibly wrapped by peft; None where the system has none.
        slm_description: See `Slm.describe`; `NO_SLM` without one.
        designated: Vocabulary entry of each task; empty where logits come from a head.
        dims: Width of each source's embedding, in token order.
        classification_weight: Factor of the classification loss beside `auxiliary_B`.
        deaf_to: Sources that the options switch off; a linear start leaves them out.
        logits: What a logit is, for who rebuilds the model.
        linear_start: The linear start, where the study asks for one.
    """

    slm: nn.Module | None
    slm_description: Mapping[str, Any]
    designated: list[int]
    dims: dict[str, int]
    classification_weight: float = 1.0
    deaf_to: frozenset[str] = frozenset()
    logits: str = "of the system's head; positive at >= 0"
    linear_start: LinearStart | None

    def __init__(self) -> None:
        super().__init__()
        self.linear_start = None

    def predict(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """The system's own forward pass.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        raise NotImplementedError

    def views(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Objective:
        """What training sees: by default what `predict` says, with share 1."""
        said = self.predict(inputs, present)
        share_B1 = torch.ones_like(said.logits_BK[:, :1])
        return Objective(said.logits_BK[:, None], share_B1, said.auxiliary_B)

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records. Arguments as of `predict`."""
        if self.linear_start is None:
            return self.predict(inputs, present)
        read, empty = self.linear_start(inputs, present)
        said = self.predict(read, present)
        logits_BK = said.logits_BK - self.predict(empty, present).logits_BK
        return replace(said, logits_BK=self.linear_start.gain * logits_BK)

    def objective(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Objective:
        """What is trained on B records. Arguments as of `predict`."""
        if self.linear_start is None:
            return self.views(inputs, present)
        read, empty = self.linear_start(inputs, present)
        goal = self.views(read, present)
        logits_BVK = goal.logits_BVK - self.views(empty, present).logits_BVK
        return replace(goal, logits_BVK=self.linear_start.gain * logits_BVK)

    def read(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """What the system itself gets to read, for who looks into it."""
        return inputs if self.linear_start is None else self.linear_start(inputs, present)[0]

    def halvings(self, layer: str) -> int:
        """How often the gradient of a trainable layer is halved in the clipped vector."""
        if self.linear_start is None or layer.startswith("linear_start."):
            return 0
        return self.linear_start.options.body_halvings

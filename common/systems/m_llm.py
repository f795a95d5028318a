"""Options of M-LLM (Thiyagarajan, "Multimodal Large Language Models for Automated Diagnosis and
Clinical Decision Support").

The paper fixes no number; every default is ours, sized for the embedded encoders.
`docs/fidelity/m_llm.md` says what a model of the paper's size needs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.systems.part import Part

Group = Literal["text", "image", "structured"]
"""The paper's three streams (section 3.1)."""


class MLlm(Part):
    """See `client.site.model.fusion.m_llm`.

    Attributes:
        width: D, of every token in the shared space.
        heads: Of both attentions; divides `width`.
        dense_width: Hidden layer of the dense network for structured sources (section 3.5).
        feedforward_width: Hidden layer of the cross-attention transformer module (3.6).
        alignment_weight: Of the contrastive loss between a record's own modalities (3.8).
        temperature: tau of that loss.
        prototypes: How many public random directions are its negatives.
        explainability_weight: Of the loss that makes attention weights tell what acted (3.8).
        without: Streams that are masked as if no record had them (ablation, 4.4).
        groups: Stream of a source where its modality does not tell it, e.g. slide tokens encoded
            elsewhere: `{ "slide" = "image" }`. Others follow `modality`: image, text, and
            everything else structured.
    """

    width: int = Field(default=64, ge=2, le=4096)
    heads: int = Field(default=4, ge=1, le=64)
    dense_width: int = Field(default=64, ge=1, le=16384)
    feedforward_width: int = Field(default=128, ge=1, le=16384)
    alignment_weight: float = Field(default=0.01, ge=0, le=1e3)
    temperature: float = Field(default=0.07, ge=0.01, le=10)
    prototypes: int = Field(default=64, ge=1, le=65536)
    explainability_weight: float = Field(default=0.1, ge=0, le=1e3)
    without: tuple[Group, ...] = ()
    groups: dict[str, Group] = {}

    @model_validator(mode="after")
    def _sound(self) -> MLlm:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(set(self.without)) != len(self.without):
            raise ValueError("'without' names a stream twice")
        if len(self.without) == 3:
            raise ValueError("'without' leaves no stream; name at most two")
        return self

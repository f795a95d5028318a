"""Options of the fusion of text and vision layers of a LLaMA (Gapp et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.systems.part import Part


class LlamaFusion(Part):
    """See `client.site.model.fusion.llama_fusion`; LoRA on the blocks is `model.lora`.

    Attributes:
        fusion: `early`: cross layers on the embeddings, beside the encoders, added to their
            outputs. `late`: after the encoders. `mixed`: both. `transchex`: the paper's baseline,
            late, without feed-forward, its head on text token 0.
        text_layers, vision_layers: First blocks of the language model that encode a side; all of
            them where it has fewer. The paper takes 3, TransCheX 2.
        cross_layers: Cross layers in a row. The paper does not say; TransCheX has 2.
        cross_width: Width of queries, keys and values, all heads together. The paper's is the
            language model's own (4096), without a bottleneck.
        heads: Attention heads of a cross layer; the paper has 32.
        feed_forward_width: Inner width of a cross layer's SwiGLU, 8/3 of `cross_width` as LLaMA
            has it (11008 at 4096). `transchex` has none.
        head_width: Width between the head's two dense layers; the paper's is 4096.
        pooling: What of a side enters the head: its `last` token that is present (the paper's), or
            the `mean` of those that are. `transchex` reads text token 0 whatever this says.
        vision: Sources on the vision side; empty takes those of modality `image`. All others stand
            on the text side.
    """

    fusion: Literal["early", "late", "mixed", "transchex"] = "early"
    text_layers: int = Field(default=3, ge=1, le=128)
    vision_layers: int = Field(default=3, ge=1, le=128)
    cross_layers: int = Field(default=2, ge=1, le=32)
    cross_width: int = Field(default=32, ge=2, le=16384)
    heads: int = Field(default=4, ge=1, le=256)
    feed_forward_width: int = Field(default=88, ge=1, le=65536)
    head_width: int = Field(default=64, ge=1, le=16384)
    pooling: Literal["last", "mean"] = "last"
    vision: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> LlamaFusion:
        if self.cross_width % self.heads:
            raise ValueError(
                f"'cross_width' {self.cross_width} does not divide into {self.heads} 'heads'"
            )
        if len(set(self.vision)) != len(self.vision):
            raise ValueError("'vision' names a source twice")
        return self

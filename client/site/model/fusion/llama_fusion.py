"""Fusion of text and vision layers of a LLaMA (Gapp et al. 2024, "Multimodal Medical Disease
Classification with LLaMA II"), and TransCheX, its baseline.

A record has two sides, text and vision. Tokens of each run through the first blocks of a frozen
language model; cross layers (`llama_cross`) carry what one side knows to the other; a small head
reads both. What differs from the paper, and why, stands in `docs/fidelity/llama_fusion.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from client.site.model.fusion.base import Prediction, RiskModel
from client.site.model.fusion.llama_cross import (
    OTHER,
    CrossLayer,
    CrossStack,
    LlamaHalf,
    Sides,
    TransChexHalf,
)
from client.site.model.fusion.sources import sides_of
from client.site.model.slm import Slm
from common.study import Lora, Study
from common.systems.llama_fusion import LlamaFusion as Options

EPS = 1e-6  # of the trainable RMSNorms, LLaMA's own


class LlamaFusion(RiskModel):
    """Text and vision blocks, cross layers, head.

    With E the blocks of a side, X a row of cross layers, t and v the tokens of both sides:

    * early: E(t) + X(t, v), E(v) + X(v, t);
    * late: X(E(t), E(v)), X(E(v), E(t));
    * mixed: late after early, with cross layers of its own;
    * transchex: late, each cross layer without feed-forward.

    Then the language model's last norm, the last present token of each side, their sum s, and
    logits = W2 tanh(W1 s + b1) + b2. TransCheX has no norm there, and s is text token 0, a
    trainable one that is always present; its blocks see the whole sequence, where the others are
    causal as the language model is, so that token 0 is not blind. Vision then enters through the
    cross layers alone.

    Both sides run through the same frozen blocks, each with LoRA of its own where the study asks
    for it: h = W x + (alpha / r) B A x, equation (2), B = 0 at the start. The language model's
    rotary positions are kept: a token's position is its place in the side's sequence, whoever is
    absent. Absent tokens are seen by nobody and never pooled. Where a record lacks a side, that
    side and the cross layers add zero. Where the *study* has no source for a side, neither is
    built.

    Args:
        sides: Side -> its sources, in token order; a side without sources is left out.
        dims: Width d_s of each source's embedding, in token order.
        tasks: Number K of logits.
        seed: Draws everything trainable; part of the study.
    """

    scale: Tensor

    def __init__(
        self,
        slm: Slm,
        options: Options,
        sides: Mapping[str, Sequence[str]],
        dims: Mapping[str, int],
        tasks: int,
        *,
        lora: Lora | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.options = options
        self.dims = dict(dims)
        self.sides = {side: tuple(names) for side, names in sides.items()}
        self.slm_description = slm.describe()
        self.designated = []
        width = slm.hidden_size
        available = int(slm.causal.config.num_hidden_layers)
        self.depth = {
            "text": min(options.text_layers, available),
            "vision": min(options.vision_layers, available),
        }
        # Tokens start at the size of the language model's own, for embeddings of norm 1.
        some = torch.linspace(0, slm.vocabulary - 1, min(slm.vocabulary, 1024)).long()
        scale = slm.tokens(some).square().mean().sqrt()
        self.register_buffer("scale", scale, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projectors = {n: nn.Linear(d, width) for n, d in dims.items()}
            for projector in projectors.values():
                nn.init.normal_(projector.weight)
                nn.init.zeros_(projector.bias)
            self.projectors = nn.ModuleDict(projectors)
            self.start = nn.Embedding(1, width) if self._transchex else None
            self.early = self._cross(width) if options.fusion in ("early", "mixed") else None
            self.late = self._cross(width) if options.fusion != "early" else None
            self.dense = nn.Linear(width, options.head_width)
            self.classify = nn.Linear(options.head_width, tasks)
            nn.init.zeros_(self.classify.bias)
            self.slm, self.vision_blocks = self._blocks_with_lora(slm, lora)
        self.to(scale.device)

    @property
    def _transchex(self) -> bool:
        return self.options.fusion == "transchex"

    def _cross(self, width: int) -> CrossStack | None:
        o = self.options
        if set(self.sides) != set(OTHER):
            return None
        layers = []
        for index in range(o.cross_layers):
            if self._transchex:
                # Nobody would read the vision side of the last layer.
                asking = ("text",) if index == o.cross_layers - 1 else ("text", "vision")
                halves = {s: TransChexHalf(width, o.cross_width, o.heads) for s in asking}
                layers.append(CrossLayer(halves, nn.Identity()))
            else:
                inner = o.feed_forward_width
                both = {s: LlamaHalf(width, o.cross_width, o.heads, inner, EPS) for s in OTHER}
                layers.append(CrossLayer(both, nn.RMSNorm(width, eps=EPS)))
        return CrossStack(layers)

    def _blocks_with_lora(
        self, slm: Slm, lora: Lora | None
    ) -> tuple[nn.Module, nn.ModuleDict | None]:
        """The language model, its first blocks with LoRA for the text side, and blocks of the
        vision side that share its frozen weights (no second copy) and have LoRA of their own."""
        if lora is None:
            return slm.causal, None
        from peft import LoraConfig, get_peft_model, inject_adapter_in_model

        common: dict[str, Any] = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(lora.targets),
            "lora_dropout": 0.0,
            "bias": "none",
        }
        causal: Any = slm.causal
        wrapped: nn.Module = causal
        vision = None
        if "vision" in self.sides:
            blocks = causal.get_decoder().layers[: self.depth["vision"]]
            shared = {id(p): p for p in blocks.parameters()}
            vision = nn.ModuleDict({"layers": copy.deepcopy(blocks, shared)})
        if "text" in self.sides:
            only = list(range(self.depth["text"]))
            config = LoraConfig(**common, task_type="CAUSAL_LM", layers_to_transform=only)
            wrapped = get_peft_model(causal, config)
        if vision is not None:
            inject_adapter_in_model(LoraConfig(**common), vision)
        for part in (wrapped, vision):
            for name, parameter in part.named_parameters() if part is not None else ():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        return wrapped, vision

    @property
    def _stack(self) -> Any:
        """The language model's blocks, last norm and rotary positions."""
        slm: Any = self.slm
        return (slm.get_base_model() if hasattr(slm, "peft_config") else slm).get_decoder()

    def _blocks(self, side: str) -> nn.ModuleList:
        if side == "vision" and self.vision_blocks is not None:
            blocks: Any = self.vision_blocks["layers"]
        else:
            blocks = self._stack.layers
        kept: nn.ModuleList = blocks[: self.depth[side]]
        return kept

    def _tokens(
        self, side: str, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[B, T, H]` of a side, and which of them are present `[B, T]`."""
        tokens, masks = [], []
        if self.start is not None and side == "text":
            some_BT = next(iter(present.values()))
            first_B1 = torch.zeros(len(some_BT), 1, dtype=torch.long, device=some_BT.device)
            tokens.append(self.scale * self.start(first_B1))
            masks.append(torch.ones_like(first_B1, dtype=torch.bool))
        for name in self.sides[side]:
            # An absent value is never read, and its token, a constant, never seen.
            e_BTd = torch.where(present[name].unsqueeze(-1), inputs[name], 0.0)
            tokens.append(self.scale * self.projectors[name](e_BTd))
            masks.append(present[name])
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1)

    def _encoded(self, side: str, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """What the blocks of a side make of its tokens, `[B, T, H]`."""
        size = mask_BT.shape[1]
        itself_TT = torch.eye(size, dtype=torch.bool, device=mask_BT.device)
        seen_BTT = mask_BT[:, None, :] | itself_TT
        if not self._transchex:
            seen_BTT = seen_BTT.tril()
        h_BTH = x_BTH.to(self._stack.norm.weight.dtype)
        positions_1T = torch.arange(size, device=x_BTH.device)[None]
        rotary = self._stack.rotary_emb(h_BTH, positions_1T)
        bias_BTT = torch.zeros(seen_BTT.shape, dtype=h_BTH.dtype, device=h_BTH.device)
        bias_B1TT = bias_BTT.masked_fill(~seen_BTT, torch.finfo(h_BTH.dtype).min)[:, None]
        for block in self._blocks(side):
            h_BTH = block(
                h_BTH,
                attention_mask=bias_B1TT,
                position_ids=positions_1T,
                position_embeddings=rotary,
            )
        return h_BTH.to(x_BTH.dtype)

    def _pooled(self, x: Sides, masks: Sides) -> Tensor:
        """s of the class's text, `[B, H]`."""
        if self._transchex:
            return x["text"][:, 0]
        pooled = []
        for side, x_BTH in x.items():
            mask_BT = masks[side]
            normed_BTH = self._stack.norm(x_BTH.to(self._stack.norm.weight.dtype)).to(x_BTH.dtype)
            place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            last_B1 = torch.where(mask_BT, place_T, -1).amax(dim=1, keepdim=True)
            if self.options.pooling == "last":
                share_BT = (place_T == last_B1).to(x_BTH.dtype)
            else:
                share_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1).to(x_BTH.dtype)
            pooled.append((share_BT[:, :, None] * normed_BTH).sum(dim=1))
        return torch.stack(pooled).sum(0)

    def predict(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        both = {side: self._tokens(side, inputs, present) for side in self.sides}
        tokens, masks = {s: x for s, (x, _) in both.items()}, {s: m for s, (_, m) in both.items()}
        x: Sides = {side: self._encoded(side, *both[side]) for side in self.sides}
        if self.early is not None:
            nothing = {side: torch.zeros_like(value) for side, value in tokens.items()}
            crossed = self.early(tokens, masks, otherwise=nothing)
            x = {side: x[side] + crossed[side] for side in x}
        if self.late is not None:
            x = self.late(x, masks, otherwise=x)
        hidden_Bh = torch.tanh(self.dense(self._pooled(x, masks)))
        return Prediction(self.classify(hidden_Bh))


def build(study: Study, dims: Mapping[str, int], slm: Slm | None) -> RiskModel:
    """The model of a study with system `llama-fusion`.

    Raises:
        StudyError: As `sides_of`.
    """
    options = study.model.llama_fusion
    assert slm is not None
    assert options is not None
    sides = sides_of(study, options)
    dims = {name: dims[name] for name in study.sources}
    return LlamaFusion(
        slm, options, sides, dims, len(study.tasks), lora=study.model.lora, seed=study.seed
    )

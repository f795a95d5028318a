"""Cross layers between two sides of a record: queries of one, keys and values of the other.

Gapp et al. 2024 ("Multimodal Medical Disease Classification with LLaMA II"), equation (1):
Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V. All trainable, from `nn.Linear` and norms only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Sides = Mapping[str, Tensor]
OTHER = {"text": "vision", "vision": "text"}


class CrossAttention(nn.Module):
    """Equation (1), several heads, from width H to width C.

    Args:
        width: H.
        cross_width: C, all heads together.
        bias: BERT's linear maps have one, LLaMA's none.
    """

    def __init__(self, width: int, cross_width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, cross_width, bias=bias)
        self.k = nn.Linear(width, cross_width, bias=bias)
        self.v = nn.Linear(width, cross_width, bias=bias)

    def forward(self, x_BTH: Tensor, y_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        """`x` asks, the tokens of `y` that are present answer -> `[B, T, C]`."""
        q_BNTD, k_BNSD, v_BNSD = (
            value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for value in (self.q(x_BTH), self.k(y_BSH), self.v(y_BSH))
        )
        scores_BNTS = q_BNTD @ k_BNSD.mT * q_BNTD.shape[-1] ** -0.5
        # Finite, so that where nobody answers there is no NaN; `CrossStack` drops the result.
        hidden_B11S, least = ~mask_BS[:, None, None], torch.finfo(scores_BNTS.dtype).min
        weights_BNTS = scores_BNTS.masked_fill(hidden_B11S, least).softmax(-1)
        return (weights_BNTS @ v_BNSD).transpose(1, 2).flatten(-2)


class LlamaHalf(nn.Module):
    """One direction of the paper's cross layer: RMSNorm(SwiGLU(O Attention) + x).

    The paper's code, with C = H, has no residual around the attention alone, and normalises after
    the sum; both are kept.
    """

    def __init__(self, width: int, cross_width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.attention = CrossAttention(width, cross_width, heads, bias=False)
        self.o = nn.Linear(cross_width, cross_width, bias=False)
        self.gate = nn.Linear(cross_width, inner, bias=False)
        self.up = nn.Linear(cross_width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(
        self, x_BTH: Tensor, asked_BTH: Tensor, answering_BSH: Tensor, mask_BS: Tensor
    ) -> Tensor:
        """Updates `x` `[B, T, H]` by what `asked`, its normalised form, finds on the other side."""
        a_BTC = self.o(self.attention(asked_BTH, answering_BSH, mask_BS))
        return self.norm(self.down(functional.silu(self.gate(a_BTC)) * self.up(a_BTC)) + x_BTH)


class TransChexHalf(nn.Module):
    """One direction of TransCheX' mixed layer: LayerNorm(dense(Attention) + x), as in BERT."""

    def __init__(self, width: int, cross_width: int, heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, cross_width, heads, bias=True)
        self.dense = nn.Linear(cross_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(
        self, x_BTH: Tensor, asked_BTH: Tensor, answering_BSH: Tensor, mask_BS: Tensor
    ) -> Tensor:
        """See `LlamaHalf.forward`."""
        return self.norm(self.dense(self.attention(asked_BTH, answering_BSH, mask_BS)) + x_BTH)


class CrossLayer(nn.Module):
    """Both directions, from the same inputs.

    Args:
        halves: Side -> the direction whose queries are that side's. A side without one leaves the
            layer as it came.
        norm: Applied to what both directions ask and answer; one for both sides, as in the paper's
            code.
    """

    def __init__(self, halves: Mapping[str, nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.halves = nn.ModuleDict(halves)

    def forward(self, x: Sides, masks: Sides) -> Sides:
        """Side -> `[B, T, H]`, of which rows without both sides mean nothing."""
        normed = {side: self.norm(value) for side, value in x.items()}
        updated = {
            side: half(x[side], normed[side], normed[OTHER[side]], masks[OTHER[side]])
            for side, half in self.halves.items()
        }
        return {**x, **updated}


class CrossStack(nn.Module):
    """Cross layers in a row; a record that lacks a side keeps `otherwise` instead."""

    def __init__(self, layers: Sequence[CrossLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Sides, masks: Sides, *, otherwise: Sides) -> Sides:
        """Side -> `[B, T, H]`."""
        crossed = x
        for layer in self.layers:
            crossed = layer(crossed, masks)
        both_B11 = (masks["text"].any(1) & masks["vision"].any(1))[:, None, None]
        return {side: torch.where(both_B11, crossed[side], otherwise[side]) for side in x}

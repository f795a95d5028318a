"""The two attentions of M-LLM; equations (1) to (7) stand in `m_llm`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.systems.m_llm import Group, MLlm

Streams = dict[Group, tuple[Tensor, Tensor]]
"""Tokens `[B, T, D]` and mask `[B, T]` of each stream."""
Maps = dict[Group, tuple[Tensor, Tensor]]
"""Weights `[B, H, Q, T]` and values `[B, T, H, E]` of each stream that is read."""


class Catm(nn.Module):
    """Cross-attention transformer module, equations (2) and (3)."""

    def __init__(self, options: MLlm) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.after_attention, self.after_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feedforward = dense(width, options.feedforward_width, width)

    def forward(self, streams: Streams) -> tuple[Tensor, Maps]:
        """Text tokens that have read the other streams `[B, Q, D]`, and the maps."""
        text_BQD, asks_BQ = streams["text"]
        query_BQHE = _split(self.query(text_BQD), self.heads)
        maps: Maps = {}
        moved_BQD = torch.zeros_like(text_BQD)
        others = {m: stream for m, stream in streams.items() if m != "text"}
        for m, (x_BTD, mask_BT) in others.items():
            value_BTHE = _split(self.value(x_BTD), self.heads)
            seen_BQT = asks_BQ[:, :, None] & mask_BT[:, None]
            weights_BHQT = _attend(query_BQHE, _split(self.key(x_BTD), self.heads), seen_BQT)
            maps[m] = weights_BHQT, value_BTHE
            moved_BQD = moved_BQD + torch.einsum(
                "bhqt,bthe->bqhe", weights_BHQT, value_BTHE
            ).flatten(2)
        count_B = count(mask_BT.any(1) for _, mask_BT in others.values())
        moved_BQD = self.out(moved_BQD / count_B[:, None, None])
        y_BQD = self.after_attention(text_BQD + moved_BQD)
        return self.after_feedforward(y_BQD + self.feedforward(y_BQD)), maps


class Readout(nn.Module):
    """Attention of a learned query to every stream, equation (4)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Embedding(1, width)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, streams: Streams) -> Maps:
        first = next(iter(streams.values()))[1]
        only_B1 = torch.zeros(len(first), 1, dtype=torch.long, device=first.device)
        query_B1HE = _split(self.query(only_B1), self.heads)
        maps: Maps = {}
        for m, (x_BTD, mask_BT) in streams.items():
            key_BTHE = _split(self.key(x_BTD), self.heads)
            weights_BH1T = _attend(query_B1HE, key_BTHE, mask_BT[:, None])
            maps[m] = weights_BH1T, _split(self.value(x_BTD), self.heads)
        return maps


def _attend(query_BQHE: Tensor, key_BTHE: Tensor, seen_BQT: Tensor) -> Tensor:
    """Softmax over the keys that a query sees, `[B, H, Q, T]`; 0 for all others."""
    scores = torch.einsum("bqhe,bthe->bhqt", query_BQHE, key_BTHE) * query_BQHE.shape[-1] ** -0.5
    seen = seen_BQT[:, None]
    return torch.where(
        seen, scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1), 0.0
    )


def weigh(weights_BH1T: Tensor, value_BTHE: Tensor) -> Tensor:
    """Each token's own part of what one query reads, heads side by side: `[B, T, D]`."""
    return (weights_BH1T[:, :, 0].mT[..., None] * value_BTHE).flatten(2)


def _split(x_BTD: Tensor, heads: int) -> Tensor:
    return x_BTD.unflatten(-1, (heads, -1))


def count(some: Iterable[Tensor]) -> Tensor:
    """How many of the masks hold, per record, at least 1: `[B]`."""
    return torch.stack(list(some)).sum(0).clamp(min=1)


def dense(inside: int, hidden: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside))

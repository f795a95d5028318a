"""AdaCoMed's two pathways: from the embeddings of a record to one vector.

Each returns that vector `[B, w]` and whether the record has any of its sources, `[B]`. Letters as
in `adacomed`: B records, T tokens of a source, M modalities, C = 2^M - 1 experts, t and w the
widths of a modality's token and of a pathway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional

Group = Sequence[str]
"""The sources of one modality."""


class ModalityNetworks(nn.Module):
    """Proj_1 ... Proj_M of eq. (1): per modality an MLP over its sources side by side.

    A source stands with the mean of its present tokens, an absent one with zeros, which move and
    train no weight.
    """

    def __init__(
        self, groups: Sequence[Group], dims: Mapping[str, int], width: int, layers: int
    ) -> None:
        super().__init__()
        self.groups = groups
        self.networks = nn.ModuleList(
            mlp(sum(dims[source] for source in group), width, width, layers=layers)
            for group in groups
        )

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A token per modality `[B, M, t]`, 0 where absent, and which are present `[B, M]`."""
        tokens, masks = [], []
        for group, network in zip(self.groups, self.networks, strict=True):
            here_B = torch.stack([present[source].any(dim=1) for source in group]).any(dim=0)
            means = [_mean(inputs[source], present[source]) for source in group]
            token_Bt = network(torch.cat(means, dim=-1))
            tokens.append(torch.where(here_B[:, None], token_Bt, 0.0))
            masks.append(here_B)
        return torch.stack(tokens, dim=1), torch.stack(masks, dim=1)


class SelfAttention(nn.Module):
    """SelfAttn of eq. (1), over the modality tokens of one record, then residual and LayerNorm.

    The published code has no token axis, so it attends over the records of the batch.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BMt: Tensor, mask_BM: Tensor) -> Tensor:
        """h `[B, M, t]`: present tokens attend to present ones, absent tokens become 0."""
        query, key, value = (
            layer(tokens_BMt).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # An absent token sees itself, which keeps its softmax finite.
        itself_MM = torch.eye(mask_BM.shape[1], dtype=torch.bool, device=mask_BM.device)
        seen_B1MM = (mask_BM[:, None, :] | itself_MM)[:, None]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1MM)
        h_BMt = self.norm(tokens_BMt + self.out(mixed.transpose(1, 2).flatten(2)))
        return torch.where(mask_BM[:, :, None], h_BMt, 0.0)


class MixtureOfModalityExperts(nn.Module):
    """The large pathway, eqs. (1) and (2): one expert per non-empty set of modalities.

    An expert reads the tokens of its set. One that names an absent modality is masked before the
    router's softmax; with no modality at all, e_large is 0.
    """

    def __init__(self, networks: ModalityNetworks, token: int, width: int, heads: int) -> None:
        super().__init__()
        modalities = len(networks.groups)
        self.networks = networks
        self.attention = SelfAttention(token, heads)
        self.sets = [
            list(chosen)
            for size in range(1, modalities + 1)
            for chosen in combinations(range(modalities), size)
        ]
        self.router = nn.Linear(modalities * token, len(self.sets))
        self.experts = nn.ModuleList(mlp(len(s) * token, token, width) for s in self.sets)

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """e_large of eq. (2)."""
        tokens_BMt, mask_BM = self.networks(inputs, present)
        h_BMt = self.attention(tokens_BMt, mask_BM)
        open_BC = torch.stack([mask_BM[:, chosen].all(dim=1) for chosen in self.sets], dim=1)
        scores_BC = self.router(h_BMt.flatten(1))
        lowest = torch.finfo(scores_BC.dtype).min
        share_BC = torch.where(open_BC, scores_BC, lowest).softmax(dim=-1)
        share_BC = torch.where(open_BC, share_BC, 0.0)
        said_BCw = torch.stack(
            [
                expert(h_BMt[:, chosen].flatten(1))
                for chosen, expert in zip(self.sets, self.experts, strict=True)
            ],
            dim=1,
        )
        return (share_BC[:, :, None] * said_BCw).sum(dim=1), mask_BM.any(dim=1)


class JoinedModalities(nn.Module):
    """The modalities' tokens side by side; with a network behind, the small model."""

    def __init__(self, networks: ModalityNetworks, fusion: nn.Module | None = None) -> None:
        super().__init__()
        self.networks = networks
        self.fusion = nn.Identity() if fusion is None else fusion

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """e_small, or the `[B, M t]` of the concatenation."""
        tokens_BMt, mask_BM = self.networks(inputs, present)
        return self.fusion(tokens_BMt.flatten(1)), mask_BM.any(dim=1)


def mlp(inputs: int, hidden: int, outputs: int, *, layers: int = 2) -> nn.Module:
    if layers == 1:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _mean(e_BTd: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the present tokens, `[B, d]`; 0 where none is."""
    total_Bd = torch.where(mask_BT[:, :, None], e_BTd, 0.0).sum(dim=1)
    return total_Bd / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)

"""M-LLM (Thiyagarajan, sections 3.1-3.9): clinical text queries images and structured data.

The paper prints no equation; its sentences became these, for one record. Streams m are text, image
and structured, each the tokens of its sources side by side; `w^h` is the h-th of H parts of width
E = D / H, and every sum and mean runs over what is present.

(1) Encoding, 3.3-3.5: x_t = LN(W_s e_t + b_s) for text and image, where e_t comes from a frozen
    ViT or biomedical language model; x_t = LN(W'_s GELU(W_s e_t + b_s) + b'_s) for structured data.
(2) Cross-attention, 3.7: text token q weighs the tokens t of m in {image, structured} by
    A^hm_qt = softmax_t((W_Q x_q)^h · (W_K x_t)^h / sqrt(E)).
(3) Cross-attention transformer module (CATM), 3.6:
    y_q = LN(x_q + W_O mean_m concat_h Σ_t A^hm_qt (W_V x_t)^h), f_q = LN(y_q + FFN(y_q)).
(4) Final representation, 3.7: a learned query r reads all three streams, f_t for text and x_t
    for the others: a^hm_t = softmax_t(r^h · (U_K x_t)^h / sqrt(E)), and token t gives
    c_t = concat_h a^hm_t (U_V x_t)^h / number of streams.
(5) Classification head: logits = b + Σ_m Σ_t C c_t. So C c_t is, exactly, what token t adds.
(6) Contrastive loss, 3.8, with z_m the mean of x_t over stream m scaled to length 1, public unit
    vectors p and s(u, v) = exp(u·v / tau): mean over ordered pairs of streams (m, n) of
    -log(s(z_m, z_n) / (s(z_m, z_n) + Σ_p s(z_m, p))).
(7) Explainability loss, 3.8: mean over attention maps of 1 - cos(w, e + QUIET · w), where w_t is
    the weight that a heat map shows of token t, and e_t the length of what that token did. For the
    read-out w_t = mean_h a^hm_t and e_t = |C c_t|; for the CATM, with A averaged over the text
    tokens, w_t = mean_h A^hm_t and e_t = |W_O concat_h A^hm_t (W_V x_t)^h|.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.site.model.fusion.base import NO_SLM, Prediction, RiskModel
from client.site.model.fusion.m_llm_attention import (
    Catm,
    Maps,
    Readout,
    Streams,
    count,
    dense,
    weigh,
)
from client.site.model.fusion.sources import streams_of
from client.site.model.slm import Slm
from common.study import Study
from common.systems.m_llm import Group, MLlm

QUIET = 1e-2
"""Effects this small (in logits, or standard deviations of a token) need no explanation: keeps (7)
smooth where tokens do nothing, as in an untrained model."""


class MLlmModel(RiskModel):
    """The model of equations (1) to (7).

    Args:
        groups: Stream of each source, in token order; keys as in `dims`.
        tasks: Number K of logits.
        seed: Draws the first weights and the negatives of (6); part of the study.
        drawn_head: The head starts at random instead of at 0: a linear start reads through it.
    """

    negatives_PD: Tensor

    def __init__(
        self,
        options: MLlm,
        dims: Mapping[str, int],
        groups: Mapping[str, Group],
        tasks: int,
        *,
        seed: int,
        drawn_head: bool = False,
    ) -> None:
        super().__init__()
        self.options, self.groups, self.dims = options, dict(groups), dict(dims)
        self.slm, self.slm_description, self.designated = None, NO_SLM, []
        self.deaf_to = frozenset(name for name, m in groups.items() if m in options.without)
        drawn_PD = torch.randn(
            options.prototypes, options.width, generator=torch.Generator().manual_seed(seed)
        )
        self.register_buffer("negatives_PD", functional.normalize(drawn_PD), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders = nn.ModuleDict(
                {name: _encoder(d, groups[name], options) for name, d in dims.items()}
            )
            # A layer that no source of the study could reach would never run, and is not built.
            crosses = "text" in groups.values() and len(set(groups.values())) > 1
            self.catm = Catm(options) if crosses else None
            self.readout = Readout(options.width, options.heads)
            self.head = nn.Linear(options.width, tasks, bias=False)
            self.intercept = nn.Embedding(1, tasks)
        # The untrained model says 0 of every record, and the head's first step is a linear model's.
        if not drawn_head:
            nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.intercept.weight)

    def predict(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        streams = self._encode(inputs, present)
        attended, read, added = self._fuse(streams)
        first = next(iter(inputs.values()))
        only_B = torch.zeros(len(first), dtype=torch.long, device=first.device)
        added_BTK = torch.cat([*added.values()], dim=1).to(first.dtype)
        logits_BK = self.intercept(only_B) + added_BTK.sum(1)
        weighted = []
        if self.options.alignment_weight:
            loss_B = alignment(streams, self.negatives_PD, self.options.temperature)
            weighted.append(self.options.alignment_weight * loss_B)
        if self.options.explainability_weight:
            loss_B = self._explainability(streams, attended, read, added)
            weighted.append(self.options.explainability_weight * loss_B)
        auxiliary_B = torch.stack(weighted).sum(0).to(first.dtype) if weighted else None
        return Prediction(logits_BK, auxiliary_B)

    @torch.no_grad()
    def attention(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Attention weights, for heat maps: `[B, heads, queries, keys]`.

        `catm.image` and `catm.structured` are A of (2), with text tokens as queries;
        `readout.<stream>` are a of (4), with one query. Tokens stand in the order of the study's
        sources. Weights sum to 1 over the keys, or are 0 where query or keys are absent.
        """
        attended, read, _ = self._fuse(self._encode(self.read(inputs, present), present))
        return {f"catm.{m}": weights for m, (weights, _) in attended.items()} | {
            f"readout.{m}": weights for m, (weights, _) in read.items()
        }

    @torch.no_grad()
    def contributions(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What each token adds to the logits, C c_t of (5): source -> `[B, T_s, K]`.

        With the intercept they sum to the logits. From a linear start each is what the token adds
        beyond the same token with nothing in it, times the gain, and they sum to the logits alone.
        A text token speaks for itself and for what it read in images and structured data by (2).
        """
        if self.linear_start is None:
            return self._contributions(inputs, present)
        read, empty = self.linear_start(inputs, present)
        nothing = self._contributions(empty, present)
        return {
            name: self.linear_start.gain * (added_BTK - nothing[name])
            for name, added_BTK in self._contributions(read, present).items()
        }

    def _contributions(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        _, _, added = self._fuse(self._encode(inputs, present))
        parts: dict[str, Tensor] = {}
        for stream, added_BTK in added.items():
            names = [name for name, group in self.groups.items() if group == stream]
            lengths = [present[name].shape[1] for name in names]
            parts.update(zip(names, added_BTK.split(lengths, dim=1), strict=True))
        return {name: parts[name] for name in self.groups}

    def _encode(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Streams:
        """Equation (1). Absent tokens enter the layers as zeros, whatever stands there."""
        tokens: dict[Group, list[Tensor]] = {}
        masks: dict[Group, list[Tensor]] = {}
        for name, encoder in self.encoders.items():
            group, mask_BT = self.groups[name], present[name]
            if name in self.deaf_to:
                mask_BT = torch.zeros_like(mask_BT)
            e_BTd = torch.where(mask_BT[..., None], inputs[name], 0.0)
            tokens.setdefault(group, []).append(encoder(e_BTd))
            masks.setdefault(group, []).append(mask_BT)
        return {m: (torch.cat(tokens[m], dim=1), torch.cat(masks[m], dim=1)) for m in tokens}

    def _fuse(self, streams: Streams) -> tuple[Maps, Maps, dict[Group, Tensor]]:
        """Equations (2) to (5): maps of the CATM, maps of the read-out, added logits."""
        attended: Maps = {}
        if self.catm is not None:
            fused_BTD, attended = self.catm(streams)
            streams = {**streams, "text": (fused_BTD, streams["text"][1])}
        read = self.readout(streams)
        count_B = count(mask_BT.any(1) for _, mask_BT in streams.values())
        added = {
            m: self.head(weigh(weights_BHQT, value_BTHE) / count_B[:, None, None])
            for m, (weights_BHQT, value_BTHE) in read.items()
        }
        return attended, read, added

    def _explainability(
        self, streams: Streams, attended: Maps, read: Maps, added: dict[Group, Tensor]
    ) -> Tensor:
        """Equation (7) -> `[B]`. A map of one token has nothing to tell and does not count."""
        maps = [(m, weights, added[m]) for m, (weights, _) in read.items()]
        for m, (weights_BHQT, value_BTHE) in attended.items():
            assert self.catm is not None
            # Absent queries are rows of 0, which scale both sides of a cosine alike.
            mean_BH1T = weights_BHQT.mean(2, keepdim=True)
            maps.append((m, mean_BH1T, self.catm.out(weigh(mean_BH1T, value_BTHE))))
        losses, counted = [], []
        for m, weights_BH1T, effect_BTX in maps:
            loss_B = unfaithfulness(weights_BH1T.mean(1).squeeze(1), effect_BTX)
            counts_B = (streams[m][1].sum(1) > 1) & (weights_BH1T.sum((1, 2, 3)) > 0)
            losses.append(torch.where(counts_B, loss_B, 0.0))
            counted.append(counts_B)
        return torch.stack(losses).sum(0) / count(counted)


def alignment(streams: Streams, negatives_PD: Tensor, temperature: float) -> Tensor:
    """Equation (6) -> `[B]`; 0 where a record has one stream or none."""
    z, some = {}, {}
    for m, (x_BTD, mask_BT) in streams.items():
        total_BD = torch.where(mask_BT[..., None], x_BTD, 0.0).sum(1)
        z[m], some[m] = functional.normalize(total_BD, dim=1), mask_BT.any(1)
    losses, counted = [negatives_PD.new_zeros(len(next(iter(some.values()))))], []
    for m, n in permutations(streams, 2):
        own_B1 = (z[m] * z[n]).sum(1, keepdim=True) / temperature
        others_BP = z[m] @ negatives_PD.T / temperature
        loss_B = torch.logsumexp(torch.cat([own_B1, others_BP], 1), 1) - own_B1[:, 0]
        counted.append(some[m] & some[n])
        losses.append(torch.where(counted[-1], loss_B, 0.0))
    return torch.stack(losses).sum(0) / (count(counted) if counted else 1)


def unfaithfulness(weights_BT: Tensor, effect_BTX: Tensor) -> Tensor:
    """One attention map's term of equation (7) -> `[B]`.

    Args:
        weights_BT: What the heat map shows; 0 for absent tokens.
        effect_BTX: What each token did, as a vector of any width; 0 for absent tokens.
    """
    did_BT = torch.linalg.vector_norm(effect_BTX, dim=-1) + QUIET * weights_BT
    return 1 - functional.cosine_similarity(weights_BT, did_BT, dim=1)


def _encoder(dim: int, group: Group, options: MLlm) -> nn.Sequential:
    """Equation (1) for one source."""
    width = options.width
    if group == "structured":
        return dense(dim, options.dense_width, width).append(nn.LayerNorm(width))
    return nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width))


def build(study: Study, dims: Mapping[str, int], slm: Slm | None) -> MLlmModel:
    """The M-LLM of a study.

    Raises:
        StudyError: As `streams_of`.
    """
    options = study.model.m_llm
    assert options is not None
    groups, drawn = streams_of(study, options), study.model.linear_start is not None
    return MLlmModel(options, dims, groups, len(study.tasks), seed=study.seed, drawn_head=drawn)

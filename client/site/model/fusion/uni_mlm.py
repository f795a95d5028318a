"""UNI-MLM with jointly trained projectors (Björkdahl et al. 2024, section II-C).

Per source s a one-layer encoder maps the embedding e_s to tokens of a frozen SLM; the tokens stand
in one sequence; K designated vocabulary entries, drawn once per study, give the logits, which are
averaged over the tokens that are present.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.site.model.fusion.base import Prediction, RiskModel
from client.site.model.slm import Slm
from common.study import Model

COLLINEAR = 0.9


class UniMlm(RiskModel):
    """Projectors before a frozen SLM.

    A token is `base_s + a_s W_s e`: `base_s` is the (frozen) embedding of a vocabulary entry drawn
    for the source, and W_s starts at zero. The paper starts from a random W instead; from zero the
    first gradients are those of a linear model in e, which under clipping and noise is worth more
    than random features. The base stands for the bias, which would add the same constant to every
    patient's gradient norm and spend the clipping norm on nothing.

    a_s is set so that the Jacobian of the scaled logits to `W_s e` has norm `token_scale` (root
    mean square over tasks) at the start: every source then spends the clipped norm by its
    embedding's size, whatever the SLM. The larger `logit_gain`, the smaller the tokens' excursions
    for the same logit, and the closer the SLM stays to its linear response.

    What the base tokens alone would say, for the same set of present sources, is subtracted
    (Zhao et al. 2021 call it contextual calibration): an untrained model says 0 of every record,
    and a missing source does not shift it. Absent tokens are
    attended by nobody, and their own output is left out of the average: they add no gradient and
    dilute nothing.

    Args:
        dims: Width d_s of each source's embedding, in token order.
        tasks: Number K of designated entries.
        seed: Draws designated entries and base tokens; part of the study.
    """

    base_SH: Tensor
    head_KH: Tensor
    scale_S: Tensor
    base_MK: Tensor

    def __init__(
        self,
        slm: Slm,
        config: Model,
        dims: Mapping[str, int],
        tasks: int,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.dims = dict(dims)
        self.slm_description = slm.describe()
        public = torch.Generator().manual_seed(seed)
        head_VH = slm.causal.get_output_embeddings().weight.detach()
        self.designated = designate(head_VH, tasks, public)
        base_SH = slm.tokens(torch.randperm(slm.vocabulary, generator=public)[: len(dims)])
        self.register_buffer("base_SH", base_SH, persistent=False)
        self.register_buffer("head_KH", head_VH[self.designated].clone(), persistent=False)
        self.softcap = getattr(slm.causal.config, "final_logit_softcapping", None)
        projectors = {n: nn.Linear(d, slm.hidden_size, bias=False) for n, d in dims.items()}
        decoders = {n: nn.Linear(slm.hidden_size, d) for n, d in dims.items()}
        for projector in projectors.values():
            nn.init.zeros_(projector.weight)
        for decoder in decoders.values():
            bound = decoder.in_features**-0.5
            nn.init.uniform_(decoder.weight, -bound, bound, generator=public)
            nn.init.zeros_(decoder.bias)
        self.projectors = nn.ModuleDict(projectors)
        self.decoders = nn.ModuleDict(decoders if config.decoder else {})
        self.slm = self._with_lora(slm, config, seed)
        self.to(base_SH.device)
        self.register_buffer("scale_S", self._calibrated_scales(), persistent=False)
        self.register_buffer("base_MK", self._base_logits(), persistent=False)

    @staticmethod
    def _with_lora(slm: Slm, config: Model, seed: int) -> nn.Module:
        if config.lora is None:
            return slm.causal
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            target_modules=list(config.lora.targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = get_peft_model(slm.causal, lora)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return wrapped.eval()

    @property
    def _decoder_stack(self) -> nn.Module:
        """The SLM's blocks, without its head."""
        slm: Any = self.slm
        stack: nn.Module = (slm.get_base_model() if self.config.lora else slm).get_decoder()
        return stack

    def _calibrated_scales(self) -> Tensor:
        """a_s of the class's text, `[S]`: a function of SLM and study alone."""
        x_1SH = self.base_SH[None].clone().requires_grad_()
        every_1S = torch.ones(x_1SH.shape[:2], dtype=torch.bool, device=x_1SH.device)
        logits_K = self._mean_logits(x_1SH, every_1S)[0]
        squared_S = torch.zeros(len(self.dims), device=x_1SH.device)
        for logit in logits_K:
            (slope_1SH,) = torch.autograd.grad(logit, x_1SH, retain_graph=True)
            squared_S += slope_1SH[0].square().sum(-1) / len(logits_K)
        slope_S = self.config.logit_gain * squared_S.sqrt()
        return self.config.token_scale / slope_S.clamp(min=1e-6)

    @torch.no_grad()
    def _base_logits(self) -> Tensor:
        """Averaged logits of the base tokens for each of the 2^S sets of sources, `[2^S, K]`."""
        sources = len(self.dims)
        codes = torch.arange(2**sources, device=self.base_SH.device)
        masks_MS = (codes[:, None] >> torch.arange(sources, device=codes.device)) & 1 == 1
        parts = [
            self._mean_logits(self.base_SH.expand(len(some), -1, -1), some)
            for some in masks_MS.split(64)
        ]
        return torch.cat(parts)

    def _mean_logits(self, x_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        """Designated logits averaged over present tokens, `[B, K]`; 0 where none is present."""
        dtype = self.head_KH.dtype
        hidden_BSH = self._decoder_stack(
            inputs_embeds=x_BSH.to(dtype),
            attention_mask=_attention(mask_BS, dtype),
            position_ids=torch.arange(x_BSH.shape[1], device=x_BSH.device)[None],
            use_cache=False,
        ).last_hidden_state
        # Only K rows of the head are needed: the same logits, up to 3 times faster.
        logits_BSK = (hidden_BSH @ self.head_KH.T).float()
        if self.softcap:
            logits_BSK = self.softcap * torch.tanh(logits_BSK / self.softcap)
        count_B1 = mask_BS.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(mask_BS[:, :, None], logits_BSK, 0.0).sum(dim=1) / count_B1

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        tokens, masks, errors = [], [], []
        code_B = torch.zeros((), dtype=torch.long, device=self.base_SH.device)
        for index, (name, projector) in enumerate(self.projectors.items()):
            e_BTd, mask_BT = inputs[name], present[name]
            code_BTH, kept = projector(e_BTd), mask_BT.unsqueeze(-1)
            moved_BTH = torch.where(kept, self.scale_S[index] * code_BTH, 0.0)
            tokens.append(self.base_SH[index] + moved_BTH)
            masks.append(mask_BT)
            code_B = code_B + (mask_BT.any(dim=1).long() << index)
            if self.decoders:
                gap_BTd = torch.where(kept, e_BTd - self.decoders[name](code_BTH), 0.0)
                errors.append((gap_BTd.square().sum((1, 2)) + 1e-12).sqrt())
        mean_BK = self._mean_logits(torch.cat(tokens, dim=1), torch.cat(masks, dim=1))
        logits_BK = self.config.logit_gain * (mean_BK - self.base_MK[code_B])
        return Prediction(logits_BK, torch.stack(errors).sum(0) if errors else None)


def designate(head_VH: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Draws `count` vocabulary entries at random whose logits can differ.

    Training pushes the rows of entries that never occur onto one direction (cosine .999 between
    any two was measured), and tasks designated to such entries could not be told apart. An entry
    within `COLLINEAR` of one already drawn is therefore drawn again.

    Args:
        head_VH: Output embedding.

    Returns:
        Distinct entries; where the head holds fewer directions than that, any distinct ones.
    """
    order = torch.randperm(len(head_VH), generator=generator).tolist()
    chosen: list[int] = []
    kept = torch.empty(0, head_VH.shape[1])
    for entry in order:
        row_1H = functional.normalize(head_VH[entry].float().cpu()[None], dim=-1)
        if (kept @ row_1H.T).abs().le(COLLINEAR).all():
            chosen.append(entry)
            kept = torch.cat([kept, row_1H])
        if len(chosen) == count:
            return chosen
    return chosen + [entry for entry in order if entry not in chosen][: count - len(chosen)]


def _attention(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive causal mask `[B, 1, S, S]`: present keys only, and every token sees itself.

    The diagonal keeps an absent token's softmax finite; nobody else sees that token.
    """
    size = mask_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=mask_BS.device).tril()
    itself_SS = torch.eye(size, dtype=torch.bool, device=mask_BS.device)
    seen_BSS = causal_SS & (mask_BS[:, None, :] | itself_SS)
    bias = torch.zeros(seen_BSS.shape, dtype=dtype, device=mask_BS.device)
    return bias.masked_fill(~seen_BSS, torch.finfo(dtype).min)[:, None]

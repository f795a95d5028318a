"""UNI-MLM (Björkdahl et al. 2024, section II-C).

Per source s a one-layer encoder maps the embedding e_s to tokens of a frozen SLM; the tokens stand
in one sequence; K designated vocabulary entries, drawn once per study, give the logits, which are
averaged over the tokens that are present.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.site.model.fusion.base import Objective, Prediction, RiskModel
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

    logits = "mean over present tokens of the designated entries' logits; positive at >= 0"

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
        self.classification_weight = config.beta if config.decoder else 1.0
        # L enters over K with the asymmetric loss, and over S from projectors in isolation: what
        # stands beside it in equation (5) has to be divided by the same.
        over_tasks = tasks if config.loss == "asl" else 1
        over_sources = len(dims) if config.projectors == "isolated" else 1
        self.reconstruction_weight = 1 / (over_tasks * over_sources)
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

    def _token_logits(self, x_BSH: Tensor, seen_BSS: Tensor, position_S: Tensor) -> Tensor:
        """Designated logits of every token, `[B, S, K]`; `seen_BSS` says who attends to whom."""
        dtype = self.head_KH.dtype
        hidden_BSH = self._decoder_stack(
            inputs_embeds=x_BSH.to(dtype),
            attention_mask=_additive(seen_BSS, dtype),
            position_ids=position_S[None],
            use_cache=False,
        ).last_hidden_state
        # Only K rows of the head are needed: the same logits, up to 3 times faster.
        logits_BSK = (hidden_BSH @ self.head_KH.T).float()
        return self.softcap * torch.tanh(logits_BSK / self.softcap) if self.softcap else logits_BSK

    @torch.no_grad()
    def _untrained(self, masks: Sequence[Tensor], seen_BTT: Tensor, position_T: Tensor) -> Tensor:
        """Designated logits `[B, T, K]` of base tokens in the place of records' own, before any
        training: what `base_MK` holds for one token per source."""
        lengths = torch.tensor([mask.shape[1] for mask in masks], device=seen_BTT.device)
        x_TH = torch.repeat_interleave(self.base_SH, lengths, dim=0)
        slm: Any = self.slm
        with slm.disable_adapter() if self.config.lora else nullcontext():
            return self._token_logits(x_TH.expand(len(seen_BTT), -1, -1), seen_BTT, position_T)

    def _mean_logits(self, x_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        """Designated logits averaged over present tokens, `[B, K]`; 0 where none is present."""
        position_S = torch.arange(x_BSH.shape[1], device=x_BSH.device)
        return _mean(self._token_logits(x_BSH, _causal(mask_BS), position_S), mask_BS)

    def predict(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        tokens, error_B = self._tokens(inputs, present)
        masks = [present[name] for name in self.projectors]
        mask_BT = torch.cat(masks, dim=1)
        mean_BK = self._mean_logits(torch.cat(tokens, dim=1), mask_BT)
        if mask_BT.shape[1] == len(masks):
            code_B = sum(mask.any(dim=1).long() << index for index, mask in enumerate(masks))
            base_BK = self.base_MK[code_B]
        else:
            position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            base_BK = _mean(self._untrained(masks, _causal(mask_BT), position_T), mask_BT)
        return Prediction(self.config.logit_gain * (mean_BK - base_BK), error_B)

    def views(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Objective:
        """Isolated: one prediction per source, from its own tokens alone, as if the others were not
        in the sequence; each with a share of 1/S, absent ones with none."""
        if self.config.projectors == "joint":
            return super().views(inputs, present)
        tokens, error_B = self._tokens(inputs, present)
        masks = [present[name] for name in self.projectors]
        lengths = [mask.shape[1] for mask in masks]
        device = self.base_SH.device
        source_T = torch.repeat_interleave(torch.tensor(lengths, device=device))
        position_T = torch.cat([torch.arange(n, device=device) for n in lengths])
        seen_BTT = _causal(torch.cat(masks, dim=1)) & (source_T[:, None] == source_T)
        logits_BTK = self._token_logits(torch.cat(tokens, dim=1), seen_BTT, position_T)
        own = [_mean(x, m) for x, m in zip(logits_BTK.split(lengths, dim=1), masks, strict=True)]
        if len(position_T) == len(masks):
            base = [self.base_MK[1 << index] for index in range(len(masks))]
        else:
            base_BTK = self._untrained(masks, seen_BTT, position_T)
            base = [_mean(x, m) for x, m in zip(base_BTK.split(lengths, dim=1), masks, strict=True)]
        views = [said - untrained for said, untrained in zip(own, base, strict=True)]
        share_BS = torch.stack([mask.any(dim=1) for mask in masks], dim=1).float() / len(masks)
        return Objective(self.config.logit_gain * torch.stack(views, dim=1), share_BS, error_B)

    def _tokens(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Tokens of each source, `[B, T_s, H]`, and where there are decoders the weighted sum of
        their L_rec, `[B]`: the L2 norm of e - dec(enc(e)) over all tokens that are present."""
        tokens, errors = [], []
        for index, (name, projector) in enumerate(self.projectors.items()):
            e_BTd, kept_BT1 = inputs[name], present[name].unsqueeze(-1)
            code_BTH = projector(e_BTd)
            moved_BTH = torch.where(kept_BT1, self.scale_S[index] * code_BTH, 0.0)
            tokens.append(self.base_SH[index] + moved_BTH)
            if self.decoders:
                gap_BTd = torch.where(kept_BT1, e_BTd - self.decoders[name](code_BTH), 0.0)
                errors.append((gap_BTd.square().sum((1, 2)) + 1e-12).sqrt())
        return tokens, self.reconstruction_weight * torch.stack(errors).sum(0) if errors else None


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


def _mean(logits_BTK: Tensor, mask_BT: Tensor) -> Tensor:
    """Average over present tokens, `[B, K]`; 0 where none is present."""
    count_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask_BT[:, :, None], logits_BTK, 0.0).sum(dim=1) / count_B1


def _causal(mask_BS: Tensor) -> Tensor:
    """Who sees whom, `[B, S, S]`: earlier present tokens, and every token itself.

    The diagonal keeps an absent token's softmax finite; nobody else sees that token.
    """
    size = mask_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=mask_BS.device).tril()
    itself_SS = torch.eye(size, dtype=torch.bool, device=mask_BS.device)
    return causal_SS & (mask_BS[:, None, :] | itself_SS)


def _additive(seen_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as it is added to attention scores, `[B, 1, S, S]`."""
    bias = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
    return bias.masked_fill(~seen_BSS, torch.finfo(dtype).min)[:, None]

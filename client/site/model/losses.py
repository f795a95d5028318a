"""Losses of UNI-MLM (Björkdahl et al. 2024), one value per record.

Each is a sum over tasks of functions of one record alone: nothing of another record enters, so a
patient's gradient is defined and can be clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from client.site.model.fusion.base import RiskModel
from common.study import Study

UNKNOWN = -1


def class_averaged(
    logits_BK: Tensor, labels_BK: Tensor, prevalence_K: Tensor, *, weighted: bool = True
) -> Tensor:
    """Class-averaged cross-entropy -> `[B]`; its best threshold is logit 0 for balanced classes.

    Weighted: equations (2) and (4). The paper's w = n / (2K #{y_k = c}) becomes 1 / (2K p_c) with
    the *public* prevalence p: counts of the site would leak (and the paper prints the count of
    class 1 for both classes). p is the share among labelled records, where the paper's n counts
    all: a task that is rarely labelled weighs less here.

    Not weighted: the prior is added to the logit instead (Menon et al. 2021, logit adjustment),
    which balances the classes without making single gradients large, and so spends less of the
    clipping norm on the rare class.

    Args:
        labels_BK: 1 true, 0 false, -1 unknown (contributes nothing).
    """
    tasks = logits_BK.shape[1]
    if weighted:
        positive, negative = 0.5 / prevalence_K, 0.5 / (1 - prevalence_K)
    else:
        positive = negative = torch.ones_like(prevalence_K)
        logits_BK = logits_BK + torch.logit(prevalence_K)
    plus = positive * F.logsigmoid(logits_BK)
    minus = negative * F.logsigmoid(-logits_BK)
    return -_masked_sum(plus, minus, labels_BK) / tasks


def asymmetric(
    logits_BK: Tensor, labels_BK: Tensor, *, margin: float = 0.05, gamma: float = 4.0
) -> Tensor:
    """Asymmetric loss, equations (3) and (4), one leading minus -> `[B]`.

    L+ = (1 - phi) log phi; L- = p_m^gamma log(1 - p_m) with p_m = max(phi - margin, 0).
    """
    phi = torch.sigmoid(logits_BK)
    plus = torch.sigmoid(-logits_BK) * F.logsigmoid(logits_BK)
    shifted = (phi - margin).clamp(min=0)
    minus = shifted**gamma * torch.log1p(-shifted.clamp(max=1 - 1e-6))
    return -_masked_sum(plus, minus, labels_BK)


def _masked_sum(plus_BK: Tensor, minus_BK: Tensor, labels_BK: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=plus_BK.dtype, device=plus_BK.device)
    known = torch.where(labels_BK == 1, plus_BK, minus_BK)
    return torch.where(labels_BK == UNKNOWN, zero, known).sum(dim=1)


RowLoss = Callable[[Any, dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]


def row_loss(study: Study) -> RowLoss:
    """The study's loss as a function `(model, inputs, present, labels_BK) -> [B]`.

    The asymmetric loss is divided by K, which (2) has in its weights and (3) has not, so that a
    learning rate fits both. What the system adds stands beside it: with decoders, equation (5) of
    UNI-MLM, reconstruction + beta * classification.
    """
    m = study.model
    prevalence = torch.tensor([t.prevalence for t in study.tasks.values()])

    def loss(
        model: RiskModel,
        inputs: dict[str, Tensor],
        present: dict[str, Tensor],
        labels_BK: Tensor,
    ) -> Tensor:
        goal = model.objective(inputs, present)
        rows, views, tasks = goal.logits_BVK.shape
        logits_NK = goal.logits_BVK.flatten(0, 1)
        labels_NK = labels_BK[:, None].expand(rows, views, tasks).flatten(0, 1)
        if m.loss == "asl":
            sum_N = asymmetric(logits_NK, labels_NK, margin=m.asl_margin, gamma=m.asl_gamma)
            value_N = sum_N / tasks
        else:
            public = prevalence.to(logits_NK.device)
            value_N = class_averaged(logits_NK, labels_NK, public, weighted=m.class_weights)
        value_B = (goal.share_BV * value_N.view(rows, views)).sum(dim=1)
        value_B = model.classification_weight * value_B
        return value_B if goal.auxiliary_B is None else goal.auxiliary_B + value_B

    return loss

"""A start from which any system first learns what a linear model would, for training by DP-SGD.

From random weights a deep model's clipped gradients are spread over all of its layers and its noise
over all of its parameters; on real patients that cost .06 to .14 of AUROC at ε = 8 beside logistic
regression (docs/results.md). This is what UNI-MLM does here before its language model, for whatever
system stands behind:


* In place of an embedding e of source s the system reads `b_s + a_s U_s W_s e`: b_s a random
  direction (length `_LENGTH`), U_s `[d_s, r]` random and orthonormal, both frozen; W_s `[r, d_s]`
  is trained and starts at 0.
* What the system says of the same sources with nothing in them (b_s alone) is subtracted (Zhao et
  al. 2021: contextual calibration), and the difference is scaled by a gain. At the start every
  record's logits are 0, the gradients of the system's own layers cancel, and those of W_s are the
  ones of a linear model in e.
* a_s and the gain are such that the logits' Jacobian to W_s e has norm 1 (root mean square over
  tasks) for every source, and that |W_s e| = 1 moves the system's input by at most `excursion` of
  its length: the smaller, the longer it stays in its linear response.
* The system's own layers train along, with their part of the clipped vector halved `body_halvings`
  times (`RiskModel.halvings`): the gain would otherwise let them fill it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import StudyError

if TYPE_CHECKING:
    from client.site.model.fusion.base import RiskModel
    from common.study import LinearStart as Options

_LENGTH = 10.0  # far above what layers' epsilons or biases are sensitive to
_SMALLEST = 1e-9  # of a slope: below it, a source says nothing


class LinearStart(nn.Module):
    """b_s, U_s and W_s of every source.

    Args:
        options: rank r, excursion.
        dims: Width d_s of each source's embedding; any other source passes as it is.
        seed: Draws b_s and U_s; part of the study.

    Attributes:
        gain: Factor on the system's calibrated logits; set by `fit`.
    """

    gain: Tensor
    scale_S: Tensor

    def __init__(self, options: Options, dims: Mapping[str, int], *, seed: int) -> None:
        super().__init__()
        self.options = options
        public = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        for name, d in dims.items():
            rank = min(options.rank, d)
            lift_dr, _ = torch.linalg.qr(torch.randn(d, rank, generator=public))
            base_d = functional.normalize(torch.randn(d, generator=public), dim=0) * _LENGTH
            self.register_buffer(f"lift_{name}", lift_dr, persistent=False)
            self.register_buffer(f"base_{name}", base_d, persistent=False)
            linear = nn.Linear(d, rank, bias=False)
            nn.init.zeros_(linear.weight)
            self.maps[name] = linear
        self.register_buffer("gain", torch.ones(()), persistent=False)
        self.register_buffer("scale_S", torch.ones(len(dims)), persistent=False)

    def fit(self, model: RiskModel) -> None:
        """Sets the gain and every a_s: functions of the untrained model and the study alone.

        Raises:
            StudyError: A source whose input the untrained model's logits do not hang on.
        """
        names = list(self.maps)
        x = {n: self.base(n)[None, None].clone().requires_grad_() for n in names}
        others = {n: self.gain.new_zeros(1, 1, d) for n, d in model.dims.items() if n not in x}
        present = {n: self.gain.new_ones((1, 1), dtype=torch.bool) for n in model.dims}
        with torch.enable_grad():
            logits_K = model.predict({**x, **others}, present).logits_BK[0]
            squared_S = torch.zeros(len(names), device=logits_K.device)
            for logit in logits_K:
                slopes = torch.autograd.grad(
                    logit, list(x.values()), retain_graph=True, materialize_grads=True
                )
                of_source = dict(zip(names, slopes, strict=True))
                squared_S += torch.stack(
                    [(s_11d[0, 0] @ self.lift(n)).square().sum() for n, s_11d in of_source.items()]
                )
        slope_S = (squared_S / len(logits_K)).sqrt()
        for name, slope in zip(names, slope_S.tolist(), strict=True):
            if not slope > _SMALLEST:
                raise StudyError(
                    f"source '{name}' does not move the untrained {type(model).__name__}, so it "
                    "has no linear start",
                    cure="leave model.linear_start out, or the source",
                )
        self.gain = 1 / (self.options.excursion * _LENGTH * slope_S.min())
        self.scale_S = 1 / (self.gain * slope_S)

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the system reads of B records, and what it reads of sources with nothing in them:
        source -> `[B, T_s, d_s]` each."""
        read, empty = dict(inputs), dict(inputs)
        for name, linear in self.maps.items():
            e_BTd = torch.where(present[name][..., None], inputs[name], 0.0)
            read[name] = self._moved(name, linear(e_BTd))
            empty[name] = self.base(name).expand_as(e_BTd)
        return read, empty

    @torch.no_grad()
    def constants(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the system reads of public records that lack nothing: without a gradient, and past
        the hooks that book the patients' passes."""
        return {
            name: self._moved(
                name, functional.linear(e_BTd, self.maps.get_parameter(f"{name}.weight"))
            )
            for name, e_BTd in inputs.items()
        }

    def _moved(self, name: str, mapped_BTr: Tensor) -> Tensor:
        """b_s + a_s U_s W_s e, from W_s e."""
        scale = self.scale_S[list(self.maps).index(name)]
        return self.base(name) + scale * (mapped_BTr @ self.lift(name).T)

    def base(self, name: str) -> Tensor:
        """b_s `[d]`."""
        return self.get_buffer(f"base_{name}")

    def lift(self, name: str) -> Tensor:
        """U_s `[d, r]`."""
        return self.get_buffer(f"lift_{name}")

"""The clipped sum of a step, by book-keeping: one backward pass, a proven bound.

Book-keeping (Bu et al., ICML 2023) keeps each trainable layer's input and takes one backward pass
to the layers' *outputs*; per-patient norms follow from both (`layers`), and the sum of the clipped
gradients from one weighted product per layer. k records of a patient are k times as many tokens of
one gradient, so clipping is exact per patient.

Claim. Let S be the float64 sum over the sampled patients. If rows are independent (below), removing
a patient p from the site moves S by at most C·(1 + slack) in L2 norm. Proof: with
n = sqrt(Σ_layers bound) and m = sqrt(Σ_layers mass²), p is scaled by

    c = min(1, C / max(n·(1 + 2^-30), κ·m)),    κ = 2^-10,

so the exact contribution has norm c·‖G‖ ≤ C, and c·m ≤ C/κ. The computed S differs from the exact
sum by at most γ_N·Σ_p c·m ≤ γ_N·B·C/κ, for B patients and N additions on the way to any element;
twice that (with p and without) is the slack. The term κ·m binds only where a patient's tokens
cancel to a thousandth of their mass; without it an adapter could cancel c·Σ‖g‖‖x‖ ≫ C to C in the
norm and leave its rounding in the sum.

A model may have the gradients of some layers halved a number of times (`halvings`, public): G is
then the vector of what is left, and what is added to the parameters is again that, times the share.

The claim holds for any weights: nothing about the adapter is assumed. Rows are independent if no
layer mixes patients, in the model or in the kernels that run it: `row_deviation` measures this on
the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client.site.training.layers import CoveredLayer, covered_layers, total_bound
from common.errors import PrivacyError

_KAPPA = 2.0**-10
_MARGIN = 1 + 2.0**-30
_UNIT = 2.0**-53
_SMALL = 1 << 18  # elements of a layer's tokens that are kept in float64: 2 MiB

_Flow = tuple[Tensor, Tensor]  # a layer's input and output gradient, [rows, ..., d]


@dataclass
class _Capture:
    """One call of a layer: what went in and what came out, unmodified since."""

    x: Tensor
    y: Tensor
    versions: tuple[int, int]


class PatientClipper:
    """Accumulates Σ_p clip(G_p) over the micro-batches of a step.

    Attributes:
        total: All sums of a step as one float64 vector; `sums` are views of it.

    Use: `begin()`, then per micro-batch `with capture(): loss = ...` and `add(loss, valid)`; the
    sums are then in `sums`.

    Args:
        model: Its trainable parameters must lie in covered layers.
        max_grad_norm: C.
        rows_per_patient: k; patient p owns the rows p·k ... (p+1)·k - 1 of every pass.

    Raises:
        PrivacyError: As `covered_layers`.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, rows_per_patient: int) -> None:
        self.layers: list[CoveredLayer] = covered_layers(model)
        self.max_grad_norm = max_grad_norm
        self.rows_per_patient = rows_per_patient
        self.tokens_per_patient = 0
        self.total = _one_vector(self.layers)
        self._captures: dict[str, list[_Capture]] = {}
        self._converted: dict[str, tuple[_Flow, tuple[Tensor, ...]]] = {}
        self._recording = False
        halvings: Callable[[str], int] = getattr(model, "halvings", lambda layer: 0)
        self._shares = {layer.name: 2.0 ** -halvings(layer.name) for layer in self.layers}
        self._hooks = [
            layer.module.register_forward_hook(self._recorder(layer), with_kwargs=True)
            for layer in self.layers
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @property
    def sums(self) -> dict[nn.Parameter, Tensor]:
        """parameter -> float64 clipped sum of the step so far, of the parameter's shape."""
        return {
            p: layer.sums[key]
            for layer in self.layers
            for key, p in layer.trainable(layer.module).items()
        }

    @property
    def shares(self) -> dict[nn.Parameter, float]:
        """parameter -> what its gradient was multiplied by before clipping, a power of two."""
        return {
            p: self._shares[layer.name]
            for layer in self.layers
            for p in layer.trainable(layer.module).values()
        }

    def begin(self) -> None:
        """Forget the last step."""
        self.total.zero_()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record the layers' inputs and outputs of one forward pass."""
        self._captures.clear()
        self._converted.clear()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def add(self, loss: Tensor, valid: Tensor) -> None:
        """Add a micro-batch.

        Args:
            loss: Scalar: Σ_rows weight · row loss of the captured pass, rows in patient order.
            valid: [P] bool, which patients exist. Others, and those with any non-finite input,
                output gradient or norm, contribute exactly zero.

        Raises:
            PrivacyError: A layer that did not run, or ran over something else than the rows.
        """
        patients = len(valid)
        flows = self.backward(loss, patients * self.rows_per_patient)
        factors = self.clip_factors(flows, valid.to(loss.device))[:, None, None]
        kept = factors > 0
        every = bool(kept.all())
        for layer, flow in zip(self.layers, flows, strict=True):
            x, g = self._tokens(layer, flow, patients)
            if not every:  # 0 · NaN is NaN: dropped patients must be absent, not scaled to zero
                x = x.where(kept, 0.0) if x.is_floating_point() else x
                g = g.where(kept, 0.0)
            layer.accumulate(x, g * factors)
        self._converted.clear()

    def rounding_slack(self, patients: int, micro_batch: int) -> float:
        """The slack of the claim, in units of C, for a site of `patients` patients.

        Valid once the factors of one micro-batch were computed: it tells how many tokens there are.
        """
        additions = micro_batch * self.tokens_per_patient + patients // micro_batch + 8
        additions += max(layer.additions for layer in self.layers)
        return 2 * additions * _UNIT / (1 - additions * _UNIT) * patients / _KAPPA

    def _recorder(self, layer: CoveredLayer) -> Callable[..., None]:
        def record(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> None:
            if not self._recording:
                return
            x = inputs[0] if inputs else named["input"]
            seen = _Capture(x, output, (x._version, output._version))
            self._captures.setdefault(layer.name, []).append(seen)

        return record

    def backward(self, loss: Tensor, rows: int) -> list[_Flow]:
        """Input and output gradient of each layer, [rows, ..., d], by one backward pass, the latter
        times the layer's share. Uses of a layer that ran several times stand beside each other, as
        more tokens of the row: its gradient is the sum over all of them."""
        uses = [self._checked(layer, rows) for layer in self.layers]
        outputs = [capture.y for captures in uses for capture in captures]
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        self._captures.clear()
        flows = []
        for layer, captures in zip(self.layers, uses, strict=True):
            xs = [capture.x.detach() for capture in captures]
            share = self._shares[layer.name]
            gs = [
                torch.zeros_like(capture.y) if g is None else g if share == 1 else g * share
                for capture, g in zip(captures, gradients, strict=False)
            ]
            flows.append((xs[0], gs[0]) if len(xs) == 1 else layer.beside(xs, gs))
        return flows

    def clip_factors(self, flows: list[_Flow], valid: Tensor) -> Tensor:
        """[P] float64 factors c of the claim; 0 for patients that are not valid or not finite."""
        tokens = (
            self._tokens(layer, flow, len(valid))
            for layer, flow in zip(self.layers, flows, strict=True)
        )
        squared, mass = total_bound(self.layers, tokens)
        divisor = torch.maximum(squared.sqrt() * _MARGIN, mass.sqrt() * (_KAPPA * _MARGIN))
        factors = (self.max_grad_norm / divisor).clamp(max=1.0)
        return torch.where(valid & torch.isfinite(divisor), factors, 0.0)

    def _tokens(self, layer: CoveredLayer, flow: _Flow, patients: int) -> tuple[Tensor, ...]:
        """`layer.tokens`, which norm and sum both need: small ones, of which there are many, are
        kept in between, large ones would hold too much memory."""
        seen = self._converted.get(layer.name)
        if seen is not None and seen[0] is flow and len(seen[1][1]) == patients:
            return seen[1]
        tokens = layer.tokens(*flow, patients)
        self.tokens_per_patient = max(self.tokens_per_patient, tokens[1].shape[1])
        if tokens[0].numel() + tokens[1].numel() <= _SMALL:
            self._converted[layer.name] = flow, tokens
        return tokens

    def _checked(self, layer: CoveredLayer, rows: int) -> list[_Capture]:
        captures = self._captures.get(layer.name)
        if captures is None:
            raise PrivacyError(
                f"{layer.name} did not run in this pass",
                cure="call every trainable layer on every pass; multiply by the presence mask",
            )
        for capture in captures:
            if capture.versions != (capture.x._version, capture.y._version):
                raise PrivacyError(
                    f"{layer.name}: its input or output was changed in place after it ran",
                    cure="use out-of-place operations around trainable layers",
                )
            if not capture.y.requires_grad:
                raise PrivacyError(
                    f"{layer.name} ran without recording its gradient",
                    cure="switch gradient checkpointing off, and torch.no_grad around it",
                )
            if not capture.x.shape[0] == capture.y.shape[0] == rows:
                raise PrivacyError(
                    f"{layer.name} saw {capture.x.shape[0]} rows where the pass has {rows}: tokens "
                    "were flattened into rows, or rows were dropped",
                    cure="keep the rows as dimension 0: [rows, tokens, features]",
                )
        return captures


def _one_vector(layers: list[CoveredLayer]) -> Tensor:
    """Moves the sums of all layers into one vector, so that one draw can noise them all: the
    systems of the papers have up to a hundred small parameters."""
    values = [value for layer in layers for value in layer.sums.values()]
    total = torch.cat([value.flatten() for value in values])
    parts = iter(total.split([value.numel() for value in values]))
    for layer in layers:
        layer.sums = {key: next(parts).view(value.shape) for key, value in layer.sums.items()}
    return total

"""Layers whose per-patient gradient is proven bounded, and the refusal of all others.

For a layer, patient p and that patient's tokens t (every position of every chosen record), the
gradient is a sum of outer products G = Σ_t g_t x_tᵀ of output gradients g_t and features x_t. Both
are captured as the exact values of the finite numbers they are; from there on float64.

`bound` returns, per patient, an **upper bound** of ‖G‖_F² that holds in spite of rounding, and the
square of the mass m = Σ_t ‖x_t‖·‖g_t‖, on which all rounding errors depend. With u = 2^-53 and
γ_n = n·u / (1 − n·u) (Higham 2002, §3.1):

* Gram: ‖G‖² = Σ_{s,t} (x_s·x_t)(g_s·g_t). An inner product errs by at most γ_d·‖x_s‖‖x_t‖, the
  sum of n² products by γ_{n²}, all by at most γ_{d_x + d_g + n² + 2} · Σ_{s,t} ‖x_s‖‖x_t‖‖g_s‖‖g_t‖
  = γ · m². In float32 this term is 10^9 times larger, and it is all that remains where an adapter
  makes a patient's near-identical records cancel: 15 to 1,290·C were released (measured).
* Materialised: the computed Ĝ errs by at most γ_n · m in Frobenius norm (Higham, eq. 3.13).

Products of float32 numbers are exact in float64, and four of them can neither overflow nor
underflow it. Constants are doubled, which covers the rounding of the bound itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import PrivacyError

_UNIT = 2.0**-53
_CHUNK = 1 << 23  # float64 elements of one temporary: 64 MiB


class CoveredLayer:
    """A trainable layer of a kind whose bound is proven.

    Attributes:
        name: Its path in the model.
        module: The layer.
        sums: parameter name -> float64 sum of the clipped patients' gradients; the accumulator of
            one step.
    """

    kind: type[nn.Module]
    feature_dims = 1  # trailing dimensions of the input that belong to one token

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: Any = module
        self.sums = {
            key: torch.zeros_like(value, dtype=torch.float64, memory_format=torch.contiguous_format)
            for key, value in module.named_parameters(recurse=False)
            if value.requires_grad
        }

    @staticmethod
    def reason_against(module: Any) -> str | None:
        """Why this module, though of a covered kind, cannot be proven."""
        return None

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        """Features and output gradients as [patients, n, d] float64, n tokens per patient."""
        raise NotImplementedError

    def beside(self, xs: Sequence[Tensor], gs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Input and output gradient of several uses of the layer as those of one: their tokens,
        [rows, n, ...], one use after the other."""
        rows = len(gs[0])
        features = xs[0].shape[xs[0].dim() - self.feature_dims :]
        return (
            torch.cat([x.reshape(rows, -1, *features) for x in xs], dim=1),
            torch.cat([g.reshape(rows, -1, *self._outputs(g)) for g in gs], dim=1),
        )

    def _outputs(self, g: Tensor) -> tuple[int, ...]:
        """Trailing dimensions of one token's output."""
        return tuple(g.shape[g.dim() - max(1, self.feature_dims) :])

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """([P] upper bound of ‖G‖², [P] m²); non-finite where any input of the patient is."""
        raise NotImplementedError

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        """Add Σ_t g_t x_tᵀ over all patients, their g already scaled by the clip factors."""
        raise NotImplementedError

    def _grouped(self, values: Tensor, patients: int, features: int) -> Tensor:
        return values.detach().reshape(patients, -1, features).to(torch.float64)


class LinearLayer(CoveredLayer):
    """y = W x + b. The bias is the weight of one more feature that is always 1."""

    kind = nn.Linear

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self._weight = self.sums.get("weight")
        self._bias = self.sums.get("bias")

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        return (
            self._grouped(captured, patients, self.module.in_features),
            self._grouped(output_gradient, patients, self.module.out_features),
        )

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        n, d_x, d_g = x.shape[1], x.shape[2], g.shape[2]
        weight, bias = float(self._weight is not None), float(self._bias is not None)
        lengths = torch.linalg.vector_norm(x, dim=2).square_().mul_(weight).add_(bias).sqrt_()
        mass = (lengths * torch.linalg.vector_norm(g, dim=2)).sum(1)
        if n == 1:  # one token cannot cancel: ‖G‖ = m
            return mass.square() * (1 + 4 * (d_x + d_g + 8) * _UNIT), mass.square()
        if n * (d_x + d_g) <= d_x * d_g:
            gamma = 2 * (d_x + d_g + n * n + 16) * _UNIT
            squared = torch.cat(
                [
                    ((xs @ xs.mT).mul_(weight).add_(bias) * (gs @ gs.mT)).sum((1, 2))
                    for xs, gs in _chunks(x, g, n * n)
                ]
            )
            return squared.clamp(min=0) + gamma * mass.square(), mass.square()
        gamma = 2 * (n + d_x * d_g + 16) * _UNIT
        norm = torch.cat(
            [
                torch.hypot(
                    torch.linalg.vector_norm(gs.mT @ xs, dim=(1, 2)).mul_(weight),
                    torch.linalg.vector_norm(gs.sum(1), dim=1).mul_(bias),
                )
                for xs, gs in _chunks(x, g, d_x * d_g)
            ]
        )
        return (norm * (1 + gamma) + gamma * mass).square(), mass.square()

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        g = g.flatten(0, 1)
        if self._weight is not None:
            self._weight.addmm_(g.T, x.flatten(0, 1))
        if self._bias is not None:
            self._bias.add_(g.sum(0))


class NormLayer(CoveredLayer):
    """y = w ⊙ x̂ + b with x̂ normalised within the token: the gradient of w is Σ_t g_t ⊙ x̂_t."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.feature_dims = len(self.module.normalized_shape)

    def _normalised(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        features = math.prod(self.module.normalized_shape)
        return (
            self._grouped(self._normalised(captured.detach()), patients, features),
            self._grouped(output_gradient, patients, features),
        )

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        gamma = 2 * (x.shape[1] + x.shape[2] + 16) * _UNIT
        terms = torch.cat([x * g, g], dim=2) if "bias" in self.sums else x * g
        mass = torch.linalg.vector_norm(terms, dim=2).sum(1)
        norm = torch.linalg.vector_norm(terms.sum(1), dim=1)
        return (norm * (1 + gamma) + gamma * mass).square(), mass.square()

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        shape = self.module.normalized_shape
        if "weight" in self.sums:
            self.sums["weight"].add_((x * g).sum((0, 1)).view(shape))
        if "bias" in self.sums:
            self.sums["bias"].add_(g.sum((0, 1)).view(shape))


class LayerNormLayer(NormLayer):
    kind = nn.LayerNorm

    def _normalised(self, values: Tensor) -> Tensor:
        return functional.layer_norm(values, self.module.normalized_shape, eps=self.module.eps)


class RMSNormLayer(NormLayer):
    kind = nn.RMSNorm

    def _normalised(self, values: Tensor) -> Tensor:
        return functional.rms_norm(values, self.module.normalized_shape, eps=self.module.eps)


class EmbeddingLayer(CoveredLayer):
    """y = W[i]: a linear layer of one-hot features, whose Gram entries are exactly 0 or 1."""

    kind = nn.Embedding
    feature_dims = 0

    @staticmethod
    def reason_against(module: Any) -> str | None:
        return "max_norm rewrites the table" if module.max_norm is not None else None

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        index = captured.detach().reshape(patients, -1)
        g = self._grouped(output_gradient, patients, self.module.embedding_dim)
        if self.module.padding_idx is not None:
            g = torch.where((index == self.module.padding_idx)[:, :, None], 0.0, g)
        return index, g

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        n = g.shape[1]
        gamma = 2 * (g.shape[2] + n * n + 16) * _UNIT
        mass = torch.linalg.vector_norm(g, dim=2).sum(1)
        squared = torch.cat(
            [
                ((xs[:, :, None] == xs[:, None, :]) * (gs @ gs.mT)).sum((1, 2))
                for xs, gs in _chunks(x, g, n * n)
            ]
        )
        return squared.clamp(min=0) + gamma * mass.square(), mass.square()

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        self.sums["weight"].index_add_(0, x.flatten(), g.flatten(0, 1))


_COVERED: dict[type[nn.Module], type[CoveredLayer]] = {
    rule.kind: rule for rule in (LinearLayer, LayerNormLayer, RMSNormLayer, EmbeddingLayer)
}
_CURES: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str]] = [
    (nn.MultiheadAttention, "build attention from four nn.Linear, or freeze it"),
    (nn.modules.conv._ConvNd, "freeze it, or apply nn.Linear to unfolded patches"),
    (nn.modules.batchnorm._BatchNorm, "use nn.LayerNorm, which does not mix patients"),
    (nn.GroupNorm, "use nn.LayerNorm, or freeze it"),
    (nn.RNNBase, "freeze it, or use a transformer of nn.Linear"),
]


def covered_layers(model: nn.Module) -> list[CoveredLayer]:
    """The trainable layers of a model, each with its proof. Errors as in `covered_modules`."""
    return [_COVERED[type(module)](name, module) for name, module in covered_modules(model)]


def covered_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the trainable layers, or the refusal of the model.

    Raises:
        PrivacyError: A trainable parameter outside a covered layer, one that two layers share or
            that is not float32; statistics over the batch; active dropout; nothing to train. The
            message names the layer, the reason and the cure.
    """
    covered: list[tuple[str, nn.Module]] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        _refuse_mixing(name, module)
        trainable = {k: p for k, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not trainable:
            continue
        rule = _COVERED.get(type(module))
        if rule is None or not set(trainable) <= {"weight", "bias"}:
            raise _uncovered(name, module, trainable)
        if reason := rule.reason_against(module):
            raise PrivacyError(f"{name}: {reason}, so its gradient has no bound", cure="freeze it")
        for key, parameter in trainable.items():
            path = f"{name}.{key}"
            if (other := owners.setdefault(id(parameter), path)) != path:
                raise PrivacyError(
                    f"{path} is the same tensor as {other}: a tied gradient has no proven bound",
                    cure="untie them (tie_word_embeddings = false), or freeze them",
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise PrivacyError(
                    f"{path} is {parameter.dtype}: steps and noise would be rounded to it",
                    cure="keep trainable parameters in float32; frozen ones may be bfloat16",
                )
        covered.append((name, module))
    if not covered:
        raise PrivacyError("the model has no trainable parameter", cure="unfreeze the adapter")
    return covered


def _refuse_mixing(name: str, module: nn.Module) -> None:
    norms = nn.modules.batchnorm._NormBase
    if isinstance(module, norms) and (module.training or module.running_mean is None):
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if not instance or module.track_running_stats:
            raise PrivacyError(
                f"{name} ({type(module).__name__}) computes statistics over the batch: one "
                "patient changes another's gradient, or a buffer, unbounded",
                cure="use nn.LayerNorm, or put it into eval() with running statistics",
            )
    if not module.training:
        return
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        raise PrivacyError(f"{name}: dropout {module.p} is active", cure="set dropout to 0")
    rate = getattr(module, "attention_dropout", 0.0)
    if isinstance(rate, float) and rate > 0:
        raise PrivacyError(
            f"{name}: attention_dropout {rate} is active", cure="set attention_dropout to 0"
        )


def _uncovered(name: str, module: nn.Module, trainable: Iterable[str]) -> PrivacyError:
    kind, keys = type(module).__name__, ", ".join(trainable)
    where = f"{name or 'the model itself'} ({kind}): trainable {keys}"
    if "dora" in kind.lower() or "magnitude" in name:
        return PrivacyError(
            f"{where}: DoRA normalises the whole weight, so its gradient is no sum over tokens",
            cure="use plain LoRA (use_dora = false)",
        )
    for kinds, cure in _CURES:
        if isinstance(module, kinds):
            return PrivacyError(f"{where}: no bound is proven for this layer", cure=cure)
    return PrivacyError(
        f"{where}: no bound is proven for this layer",
        cure="hold each trainable tensor in nn.Linear, nn.LayerNorm, nn.RMSNorm or nn.Embedding "
        "(nn.Embedding(1, d) for a lone vector), or freeze it",
    )


def _chunks(x: Tensor, g: Tensor, per_patient: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Patients in groups whose temporaries of `per_patient` elements each stay small."""
    size = max(1, _CHUNK // per_patient)
    return zip(x.split(size), g.split(size), strict=True)

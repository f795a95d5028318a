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
* One token: ‖G‖ = m cannot cancel; the computed m² errs by at most γ_{d_x + 2·d_g + 8} · m².
* Materialised: the computed Ĝ errs by at most γ_n · m in Frobenius norm (Higham, eq. 3.13).
* Weight norm: a fixed linear map of the gradient of W; see `WeightNormLayer`.

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
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

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
        additions: On the way to an element of `sums`, besides those over tokens and patients.
    """

    kind: type[nn.Module]
    keys = frozenset({"weight", "bias"})  # the parameters that the proof is about
    feature_dims = 1  # trailing dimensions of the input that belong to one token
    additions = 0

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: Any = module
        self.sums = {
            key: torch.zeros_like(value, dtype=torch.float64, memory_format=torch.contiguous_format)
            for key, value in self.trainable(module).items()
        }

    @classmethod
    def trainable(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """What the layer trains, by the path from the layer."""
        own = module._parameters.items()
        return {key: p for key, p in own if p is not None and p.requires_grad}

    @classmethod
    def reason_against(cls, module: Any) -> str | None:
        """Why this module, though of a covered kind, cannot be proven."""
        return None

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        """Features and output gradients, both detached, as [patients, n, d] float64, n tokens per
        patient."""
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

    def one_token(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """(a [P, 1], b [P, 1], bias) of ‖G‖² = m² = (a² + bias)·b² where each patient has but one
        token, which cannot cancel; None if this kind of layer needs `bound` all the same."""
        return None

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        """Add Σ_t g_t x_tᵀ over all patients, their g already scaled by the clip factors."""
        raise NotImplementedError

    def _grouped(self, values: Tensor, patients: int, features: int) -> Tensor:
        return values.reshape(patients, -1, features).double()


class LinearLayer(CoveredLayer):
    """y = W x + b. The bias is the weight of one more feature that is always 1."""

    kind = nn.Linear

    def tokens(
        self, captured: Tensor, output_gradient: Tensor, patients: int
    ) -> tuple[Tensor, ...]:
        return (
            self._grouped(captured, patients, self.module.in_features),
            self._grouped(output_gradient, patients, self.module.out_features),
        )

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        n, d_x, d_g = x.shape[1], x.shape[2], g.shape[2]
        weight, bias = float("weight" in self.sums), float("bias" in self.sums)
        if n * (d_x + d_g) <= d_x * d_g:
            gamma = 2 * (d_x + d_g + n * n + 16) * _UNIT
            parts = []
            for xs, gs in _chunks(x, g, n * n):
                terms = (xs @ xs.mT).mul_(weight).add_(bias).mul_(gs @ gs.mT)
                # On the diagonal stand the squares of ‖x_t‖·‖g_t‖.
                lengths = terms.diagonal(dim1=1, dim2=2).sqrt()
                parts.append((terms.sum((1, 2)), lengths.sum(1).square_()))
            squared, mass2 = (torch.cat(part) for part in zip(*parts, strict=True))
            return squared.clamp_(min=0).add_(mass2, alpha=gamma), mass2
        lengths = torch.linalg.vector_norm(x, dim=2).square_().mul_(weight).add_(bias)
        mass = lengths.mul_(torch.linalg.vector_norm(g, dim=2).square_()).sqrt_().sum(1)
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

    def one_token(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float] | None:
        if "weight" not in self.sums:
            return None
        a, b = torch.linalg.vector_norm(x, dim=2), torch.linalg.vector_norm(g, dim=2)
        return a, b, float("bias" in self.sums)

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        g = g.flatten(0, 1)
        if "weight" in self.sums:
            self.sums["weight"].addmm_(g.T, x.flatten(0, 1))
        if "bias" in self.sums:
            self.sums["bias"].add_(g.sum(0))


class WeightNormLayer(LinearLayer):
    """y = W x + b with rows W_o = s_o·v_o / ‖v_o‖ (Salimans and Kingma, NeurIPS 2016, eq. 2-3).

    With u_o = v_o / ‖v_o‖ and r_o = s_o / ‖v_o‖, the gradient is a linear map of ΔW = Σ_t g_t x_tᵀ:

        Δs_o = u_o·ΔW_o,    Δv_o = r_o·(ΔW_o − u_o·Δs_o),    Δb = Σ_t g_t.

    u and r are computed once from the adapter, which is public, and are the same for all patients:
    the proof is of *this* map with u and r as computed, however rounded. | ‖u_o‖² − 1 | <= γ_{I+8}
    (the square of a float32 neither overflows nor underflows), so it stretches row o by at most
    j_o = √(1 + r_o²), and m = Σ_t √(‖x_t‖² + 1)·‖j ⊙ g_t‖. With the Gram K = x xᵀ,

        ‖G‖² = Σ_o Δs_o² + r_o²·(g_oᵀ K g_o − Δs_o²) + Δb_o²,    Δs_o = Σ_t g_to·(u_o·x_t).

    In row o, with M_o = Σ_t ‖x_t‖·|g_to|: g_oᵀ K g_o errs by γ_{I+2n}·M_o², Δs_o² by
    2·γ_{I+n+4}·M_o², and ‖u_o‖ by γ_{I+8}·M_o² more; all rows by less than 6·γ_{I+O+2n+16}·m².
    The sum takes the map once per micro-batch, on Σ_p c·ΔW: γ_{I+8}·j_o of it more (`additions`).

    A v near 0 makes r huge and is clipped as any other gradient. Where u or r is not finite (v = 0,
    an overflow), no patient's bound is, and all contribute zero.
    """

    _PATH = "parametrizations.weight."
    keys = frozenset({_PATH + "original0", _PATH + "original1", "bias"})

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.additions = 2 * (self.module.in_features + 8)

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether it is `parametrizations.weight_norm(nn.Linear(...))` and nothing more."""
        return (
            parametrize.is_parametrized(module)
            and parametrize.type_before_parametrizations(module) is nn.Linear
            and [(k, [type(f) for f in fs]) for k, fs in module.parametrizations.items()]
            == [("weight", [_WeightNorm])]
        )

    @classmethod
    def trainable(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        inner: Any = module.get_submodule("parametrizations.weight")
        originals = CoveredLayer.trainable(inner)
        return CoveredLayer.trainable(module) | {cls._PATH + k: p for k, p in originals.items()}

    @classmethod
    def reason_against(cls, module: Any) -> str | None:
        if module.parametrizations.weight[0].dim != 0:
            return "its weight norm is not one per output (dim = 0)"
        if not cls.keys - {"bias"} <= cls.trainable(module).keys():
            return "only a part of its weight norm is trainable"
        return None

    def bound(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        n, d_x, d_g = x.shape[1], x.shape[2], g.shape[2]
        u_OI, r_O1 = self._map()
        r2_O = r_O1.square().flatten()
        lengths = torch.linalg.vector_norm(x, dim=2).square_().add_(1).sqrt_()
        mass = (lengths * torch.linalg.vector_norm(g * (1 + r2_O).sqrt(), dim=2)).sum(1)
        gamma = 12 * (d_x + d_g + 2 * n + 16) * _UNIT
        squared = torch.cat(
            [((xs @ xs.mT @ gs) * gs).sum(1) @ r2_O for xs, gs in _chunks(x, g, n * n)]
        )
        scale2_PO = ((x @ u_OI.T) * g).sum(1).square()
        squared = squared + scale2_PO.sum(1) - scale2_PO @ r2_O
        if "bias" in self.sums:
            squared += g.sum(1).square().sum(1)
        return squared.clamp(min=0) + gamma * mass.square(), mass.square()

    def one_token(self, x: Tensor, g: Tensor) -> None:
        return None

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        g = g.flatten(0, 1)
        # Not finite: all g are zero then, and must stay so.
        u_OI, r_O1 = (torch.nan_to_num(value, 0.0, 0.0, 0.0) for value in self._map())
        w_OI = g.T @ x.flatten(0, 1)
        scale_O1 = (w_OI * u_OI).sum(1, keepdim=True)
        self.sums[self._PATH + "original0"].add_(scale_O1)
        self.sums[self._PATH + "original1"].add_((w_OI - u_OI * scale_O1).mul_(r_O1))
        if "bias" in self.sums:
            self.sums["bias"].add_(g.sum(0))

    def _map(self) -> tuple[Tensor, Tensor]:
        """u [O, I] and r [O, 1] in float64."""
        originals = self.module.parametrizations.weight
        v_OI = originals.original1.detach().double()
        lengths_O1 = torch.linalg.vector_norm(v_OI, dim=1, keepdim=True)
        return v_OI / lengths_O1, originals.original0.detach().double() / lengths_O1


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
        terms = self._terms(x, g)
        mass = torch.linalg.vector_norm(terms, dim=2).sum(1)
        norm = torch.linalg.vector_norm(terms.sum(1), dim=1)
        return (norm * (1 + gamma) + gamma * mass).square(), mass.square()

    def one_token(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        length = torch.linalg.vector_norm(self._terms(x, g), dim=2)
        return torch.zeros_like(length), length, 1.0

    def _terms(self, x: Tensor, g: Tensor) -> Tensor:
        """What a token adds to the gradients of w and b, side by side."""
        return torch.cat([x * g, g], dim=2) if "bias" in self.sums else x * g

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

    @classmethod
    def reason_against(cls, module: Any) -> str | None:
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

    def one_token(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        length = torch.linalg.vector_norm(g, dim=2)
        return torch.zeros_like(length), length, 1.0

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
    layers = []
    for name, module in covered_modules(model):
        rule = _rule(module)
        assert rule is not None
        layers.append(rule(name, module))
    return layers


def total_bound(
    layers: Sequence[CoveredLayer], tokens: Iterable[tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """Σ over the layers of both parts of `bound`.

    Layers of one token per patient, of which a model may have dozens, go together: what they cost
    is calls.
    """
    lengths: list[Tensor] = []
    constants: list[tuple[float, float]] = []
    others: list[Tensor] = []
    for layer, (x, g) in zip(layers, tokens, strict=True):
        lone = layer.one_token(x, g) if g.shape[1] == 1 else None
        if lone is None:
            others += layer.bound(x, g)
        else:
            lengths += lone[:2]
            constants.append((lone[2], 1 + 4 * (x.shape[-1] + 2 * g.shape[2] + 8) * _UNIT))
    totals = []
    if lengths:
        x2_LP, g2_LP = torch.stack(lengths).square_().view(len(constants), 2, -1).unbind(1)
        bias_L1, factor_L1 = g2_LP.new_tensor(constants)[:, :, None].unbind(1)
        mass2_LP = (x2_LP + bias_L1).mul_(g2_LP)
        totals.append(torch.stack([mass2_LP * factor_L1, mass2_LP], 1).sum(0))
    if others:
        totals.append(torch.stack(others).unflatten(0, (-1, 2)).sum(0))
    squared, mass2 = sum(totals[1:], totals[0])
    return squared, mass2


def _rule(module: nn.Module) -> type[CoveredLayer] | None:
    # A parametrised module is of a class of its own, which is not in `_COVERED`.
    covered = _COVERED.get(type(module))
    if covered is None and "parametrizations" in module._modules:
        return WeightNormLayer if WeightNormLayer.matches(module) else None
    return covered


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
        rule = _rule(module)
        if rule is None:
            _refuse_mixing(name, module)
        trainable = (rule or CoveredLayer).trainable(module)
        if all(owners.get(id(p)) == _path(name, key) for key, p in trainable.items()):
            continue  # nothing, or what the layer around it has already
        if rule is None or not trainable.keys() <= rule.keys:
            raise _uncovered(name, module, trainable)
        if reason := rule.reason_against(module):
            raise PrivacyError(f"{name}: {reason}, so its gradient has no bound", cure="freeze it")
        for key, parameter in trainable.items():
            path = _path(name, key)
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


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


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
        cure="hold each trainable tensor in nn.Linear (plain, or with parametrizations.weight_norm "
        "on its weight), nn.LayerNorm, nn.RMSNorm or nn.Embedding (nn.Embedding(1, d) for a lone "
        "vector), or freeze it",
    )


def _chunks(x: Tensor, g: Tensor, per_patient: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Patients in groups whose temporaries of `per_patient` elements each stay small."""
    size = max(1, _CHUNK // per_patient)
    return zip(x.split(size), g.split(size), strict=True)

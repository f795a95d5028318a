"""Each covered layer against plain autograd; what of a weight norm is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from client.site.training.clipping import PatientClipper
from client.site.training.layers import WeightNormLayer, covered_layers, total_bound
from common.errors import PrivacyError

torch.set_num_threads(1)
PATIENTS, RECORDS, TOKENS, FEATURES = 5, 2, 3, 6


class Twice(nn.Module):
    """A layer over tokens, and once more over the mean of what it gave."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        if x.is_floating_point():
            hidden = hidden.tanh().mean(1) + self.layer(hidden.mean(1))
        return hidden.flatten(1).tanh().square().sum(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, FEATURES),
    "linear without bias": lambda: nn.Linear(FEATURES, FEATURES, bias=False),
    "weight norm": lambda: weight_norm(nn.Linear(FEATURES, FEATURES)),
    "weight norm without bias": lambda: weight_norm(nn.Linear(FEATURES, FEATURES, bias=False)),
    "layer norm": lambda: nn.LayerNorm(FEATURES),
    "rms norm": lambda: nn.RMSNorm(FEATURES),
    "embedding": lambda: nn.Embedding(4, FEATURES),
}


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return layer.double()


def rows(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (PATIENTS * RECORDS, TOKENS)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 4, shape, generator=generator)
    return torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("quantile", [0.5, 2.0], ids=["clipped", "unclipped"])
def test_clipped_sum_equals_brute_force(name: str, quantile: float) -> None:
    layer = randomised(LAYERS[name]())
    model, x = Twice(layer), rows(layer)
    trainable = list(model.parameters())
    wholes = []
    for some in x.split(RECORDS):
        parts = torch.autograd.grad(model(some).mean(), trainable)
        wholes.append(torch.cat([part.flatten() for part in parts]))
    norms = torch.stack([whole.norm() for whole in wholes])
    bound = float(norms.median() if quantile < 1 else 2 * norms.max())
    wanted = sum(whole * min(1.0, bound / float(whole.norm())) for whole in wholes)
    clipper = PatientClipper(model, bound, RECORDS)
    with clipper.capture():
        loss = model(x).sum() / RECORDS
    clipper.add(loss, torch.ones(PATIENTS, dtype=torch.bool))
    got = torch.cat([clipper.sums[p].flatten() for p in trainable])
    # A clipped patient stays below the bound by the engine's margin, 2^-30.
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=2e-9 * PATIENTS * bound)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_total_bound_is_just_above_the_exact_gradient(tokens: int, frozen: str | None) -> None:
    """All kinds of layers together, of one token (which go the short way) and of several."""
    layers = [randomised(make()) for make in LAYERS.values()]
    for layer in layers:
        if frozen and getattr(layer, frozen, None) is not None and type(layer) is nn.Linear:
            layer.get_parameter(frozen).requires_grad_(False)
    layers = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
    rules = covered_layers(nn.Sequential(*layers))
    generator = torch.Generator().manual_seed(6)
    pairs = []
    for rule in rules:
        shape = (PATIENTS, tokens, FEATURES)
        x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        if isinstance(rule.module, nn.Embedding):
            x = torch.randint(0, 4, shape[:2], generator=generator)
        pairs.append((x, g))
    squared, mass_squared = total_bound(rules, pairs)
    for p in range(PATIENTS):
        exact = 0.0
        for rule, (x, g) in zip(rules, pairs, strict=True):
            rule.accumulate(x[p : p + 1], g[p : p + 1])
            exact += sum(float(value.square().sum()) for value in rule.sums.values())
            for value in rule.sums.values():
                value.zero_()
        assert exact <= float(squared[p]) <= exact + 1e-12 * float(mass_squared[p])


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_weight_norm_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.site.training.layers._CHUNK", chunk)
    layer = randomised(LAYERS["weight norm"]())
    (rule,) = covered_layers(nn.Sequential(layer))
    generator = torch.Generator().manual_seed(4)
    x, g = (
        torch.randn(PATIENTS, 4, FEATURES, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    squared, mass_squared = rule.bound(x, g)
    for p in range(PATIENTS):
        rule.accumulate(x[p : p + 1], g[p : p + 1])
        exact = sum(float(value.square().sum()) for value in rule.sums.values())
        assert exact <= float(squared[p]) <= exact + 1e-12 * float(mass_squared[p])
        assert exact <= float(mass_squared[p])
        for value in rule.sums.values():
            value.zero_()


def test_weight_norm_around_the_whole_model_is_one_layer() -> None:
    (rule,) = covered_layers(weight_norm(nn.Linear(4, 4)))
    assert isinstance(rule, WeightNormLayer)
    assert len(rule.sums) == 3


def partly(frozen: str) -> nn.Module:
    layer = weight_norm(nn.Linear(4, 4))
    layer.get_parameter(frozen).requires_grad_(False)
    return layer


def extended() -> nn.Module:
    """A tensor more than the proof is about."""
    layer = weight_norm(nn.Linear(4, 4))
    layer.register_parameter("temperature", nn.Parameter(torch.ones(())))
    return layer


def tied() -> nn.Module:
    first, second = weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4))
    second.parametrizations.weight.original1 = first.parametrizations.weight.original1
    return nn.ModuleList([first, second])


def stacked() -> nn.Module:
    return spectral_norm(weight_norm(nn.Linear(4, 4)))


class Scaled(nn.Linear):
    """Computes what it likes."""


REFUSED = {
    "over columns": (lambda: weight_norm(nn.Linear(4, 4), dim=1), "one per output"),
    "over everything": (lambda: weight_norm(nn.Linear(4, 4), dim=None), "one per output"),
    "magnitude frozen": (lambda: partly("parametrizations.weight.original0"), "only a part"),
    "direction frozen": (lambda: partly("parametrizations.weight.original1"), "only a part"),
    "one tensor more": (extended, "trainable bias, temperature, parametrizations"),
    "tied": (tied, "is the same tensor as 0.0.parametrizations.weight.original1"),
    "two parametrisations": (stacked, "ParametrizedLinear"),
    "another parametrisation": (lambda: orthogonal(nn.Linear(4, 4)), "ParametrizedLinear"),
    "of the bias": (lambda: weight_norm(nn.Linear(4, 4), name="bias"), "ParametrizedLinear"),
    "of a subclass": (lambda: weight_norm(Scaled(4, 4)), "ParametrizedScaled"),
    "of a convolution": (lambda: weight_norm(nn.Conv1d(4, 4, 1)), "ParametrizedConv1d"),
    "the old hooks": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "weight_g, weight_v"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_other_weight_norms_are_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(PrivacyError, match=reason):
        covered_layers(nn.Sequential(make()))


def test_a_frozen_weight_norm_needs_no_proof() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)).requires_grad_(False), nn.Linear(4, 4))
    assert [layer.name for layer in covered_layers(model)] == ["1"]

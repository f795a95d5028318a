"""Rule 4: the released sum moves by at most C when one patient leaves, whatever the adapter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper

C = 0.05
SLACK = 2.0**-16


def draw(dataset, k: int, seed: int, patients: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    some = rng.choice(dataset.n_patients, patients, replace=False)
    return [rng.permutation(dataset.rows_of_patient[p])[:k] for p in some]


@pytest.mark.parametrize("lora", [False, True], ids=["projectors", "lora"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_sum_moves_by_at_most_C_when_a_patient_leaves(
    make_model, make_dataset, clipped_sum, k, lora
):
    model, dataset = make_model(lora=lora, layer_norm=not lora), make_dataset()
    clipper, ratios = PatientClipper(model, C, k), []
    for patients in (1, 4, 5, 9):  # below, at and above the edges of micro-batches of 4
        chosen = draw(dataset, k, patients, patients)
        total = clipped_sum(clipper, model, dataset, chosen)
        for leaver in range(patients):
            rest = chosen[:leaver] + chosen[leaver + 1 :]
            ratios.append(float((total - clipped_sum(clipper, model, dataset, rest)).norm()) / C)
    assert max(ratios) <= 1 + SLACK
    assert max(ratios) >= 0.999  # the bound is not met by clipping far below it


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_sum_moves_by_at_most_C_under_a_random_adapter_of_any_scale(
    make_model, make_dataset, clipped_sum, scale
):
    model, dataset = make_model(), make_dataset()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=scale)
    clipper = PatientClipper(model, C, 4)
    chosen = draw(dataset, 4, 3, 7)
    total = clipped_sum(clipper, model, dataset, chosen)
    for leaver in range(7):
        rest = chosen[:leaver] + chosen[leaver + 1 :]
        moved = (total - clipped_sum(clipper, model, dataset, rest)).norm()
        assert moved <= C * (1 + SLACK)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("bound", [0.05, 1e9], ids=["clipped", "unclipped"])
def test_engine_equals_brute_force_in_float64(
    make_model, make_dataset, clipped_sum, brute_force, k, layer_norm, bound
):
    model = make_model(layer_norm=layer_norm).double()
    dataset = make_dataset(dtype=torch.float64)
    chosen = draw(dataset, k, k, 9)
    got = clipped_sum(PatientClipper(model, bound, k), model, dataset, chosen)
    wanted = sum(g * min(1.0, bound / float(g.norm())) for g in brute_force(model, dataset, chosen))
    assert torch.allclose(got, wanted, rtol=1e-7, atol=1e-9 * float(wanted.norm()))


class Shared(nn.Module):
    """Every kind of layer, used more than once, over tokens and over pooled rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.normed = weight_norm(nn.Linear(10, 10))
        self.norms = nn.ModuleList([nn.LayerNorm(10), nn.RMSNorm(10)])
        self.table = nn.Embedding(4, 10)

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = inputs["note"]  # [R, 3, 10]
        entries = present["note"].long()
        x = x + self.table(entries) + self.table(entries.flip(1) * 3)
        for norm in self.norms:
            x = norm(self.normed(self.linear(x))).tanh()
        pooled = x.mean(1)  # [R, 10]: another number of tokens
        for norm in self.norms:
            pooled = norm(self.normed(pooled) + self.linear(pooled) + self.table(entries[:, 0]))
            pooled = pooled.tanh()
        return pooled[:, :3]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bound", [0.05, 1e9], ids=["clipped", "unclipped"])
def test_layers_that_run_several_times_are_one_gradient(
    make_dataset, clipped_sum, brute_force, k, bound
):
    model, dataset = Shared().double(), make_dataset(dtype=torch.float64)
    clipper, chosen = PatientClipper(model, bound, k), draw(dataset, k, 4, 7)
    got = clipped_sum(clipper, model, dataset, chosen)
    wanted = sum(g * min(1.0, bound / float(g.norm())) for g in brute_force(model, dataset, chosen))
    assert torch.allclose(got, wanted, rtol=1e-7, atol=1e-9 * float(wanted.norm()))
    for leaver in range(7):
        rest = clipped_sum(clipper, model, dataset, chosen[:leaver] + chosen[leaver + 1 :])
        assert (got - rest).norm() <= bound * (1 + SLACK)


def test_engine_equals_opacus_hooks_for_one_record_per_patient(
    make_model, make_dataset, clipped_sum, row_loss
):
    from opacus import GradSampleModule

    model, dataset = make_model(), make_dataset(most_records=1)
    chosen = draw(dataset, 1, 0, 8)
    got = clipped_sum(PatientClipper(model, C, 1), model, dataset, chosen, micro_batch=8)

    oracle = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    rows = torch.from_numpy(np.concatenate(chosen))
    row_loss(
        oracle,
        {s: x[rows] for s, x in dataset.inputs.items()},
        {s: m[rows] for s, m in dataset.present.items()},
        dataset.labels[rows],
    ).sum().backward()
    samples = [p.grad_sample.flatten(1) for p in oracle.parameters() if p.requires_grad]
    per_patient = torch.cat(samples, 1).double()
    factors = (C / per_patient.norm(dim=1)).clamp(max=1)
    wanted = (per_patient * factors[:, None]).sum(0)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


# --- adversarial adapters: a patient's two records are near-identical, their gradients opposite


class Cancelling(nn.Module):
    """loss = ± strength · direction · W x: what a coordinator's adapter can make of any model."""

    def __init__(
        self, features: int, hidden: int, strength: float, bias: bool, normed: bool = False
    ) -> None:
        super().__init__()
        linear = nn.Linear(features, hidden, bias=bias)
        self.projector = weight_norm(linear) if normed else linear
        self.register_buffer("direction", strength * torch.randn(hidden))


def cancelling_loss(model: Cancelling, inputs, present, labels) -> Tensor:
    return (model.projector(inputs["lab"])[:, 0] @ model.direction) * (2.0 * labels[:, 0] - 1)


def near_duplicates(features: int, difference: float) -> Dataset:
    base = torch.randn(1, features)
    pair = torch.cat([base, base + difference * torch.randn(1, features)])
    others = torch.randn(4, features)
    return Dataset(
        rows_of_patient=[np.array([0, 1]), np.array([2, 3]), np.array([4]), np.array([5])],
        inputs={"lab": torch.cat([pair, others])[:, None]},
        present={"lab": torch.ones(6, 1, dtype=torch.bool)},
        labels=torch.tensor([[1], [0], [1], [0], [1], [0]], dtype=torch.int8),
        record_ids=list("abcdef"),
    )


def naive_factor(model: nn.Module, dataset: Dataset) -> Tensor:
    """What a float32 Gram says of the first patient: min(1, C / norm)."""
    x = dataset.inputs["lab"][:2, 0]
    g = torch.stack([model.direction / 2, -model.direction / 2])
    squared = ((x @ x.T + float(model.projector.bias is not None)) * (g @ g.T)).sum()
    return (C / squared.clamp(min=0).sqrt()).clamp(max=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [7, 300], ids=["materialised", "gram"])
def test_cancelling_records_stay_below_C_where_a_float32_gram_breaks_it(
    clipped_sum, features, bias
):
    hidden = 5 if features == 7 else 200
    broken, worst = [], []
    for difference in (1e-2, 1e-4, 1e-6, 1e-7):
        for strength in (1e2, 1e5, 1e9):
            model = Cancelling(features, hidden, strength, bias)
            dataset = near_duplicates(features, difference)
            clipper = PatientClipper(model, C, 2)
            everyone = dataset.rows_of_patient

            def total(rows, clipper=clipper, model=model, dataset=dataset):
                return clipped_sum(clipper, model, dataset, rows, row_loss=cancelling_loss)

            moved = float((total(everyone) - total(everyone[1:])).norm())
            worst.append(moved / C)
            x = dataset.inputs["lab"][:2, 0].double()
            true_norm = (x[0] - x[1]).norm() * model.direction.double().norm() / 2
            broken.append(float(naive_factor(model, dataset) * true_norm) / C)
    assert max(broken) > 10, "the attack must work against the naive norm to prove anything"
    assert max(worst) <= 1 + SLACK


def test_exact_cancellation_of_huge_gradients_leaves_no_rounding_in_the_sum(clipped_sum):
    """Equal records cancel to zero: the norm says nothing, the mass must hold the rounding."""
    model, dataset = Cancelling(64, 64, 1e12, True), near_duplicates(64, 0.0)
    clipper = PatientClipper(model, C, 2)
    with_them = clipped_sum(
        clipper, model, dataset, dataset.rows_of_patient, row_loss=cancelling_loss
    )
    without = clipped_sum(
        clipper, model, dataset, dataset.rows_of_patient[1:], row_loss=cancelling_loss
    )
    assert (with_them - without).norm() <= SLACK * C


# --- weight norm: the adapter also chooses the map from the gradient of W to that of (s, v)

HOSTILE_NORMS: dict[str, tuple[float, float]] = {  # factors on s and on v
    "plain": (1.0, 1.0),
    "tiny s": (1e-30, 1.0),
    "huge s": (1e30, 1.0),
    "v near 0": (1.0, 1e-30),
    "v among the subnormals": (1.0, 1e-43),
    "huge v": (1.0, 1e30),
    "s of both signs": (-1e6, 1e-6),
}


@pytest.mark.parametrize("case", HOSTILE_NORMS)
@pytest.mark.parametrize("features", [7, 300])
def test_cancelling_records_stay_below_C_under_a_hostile_weight_norm(clipped_sum, case, features):
    """Near-identical records, opposite gradients, and `s` and `v` of any size: a float32 norm of
    the same gradient would release far more than C."""
    s, v = HOSTILE_NORMS[case]
    worst, broken = [], []
    for difference in (1e-2, 1e-4, 1e-7, 0.0):
        for strength in (1e-3, 1e2, 1e9):
            model = Cancelling(features, 5, strength, bias=True, normed=True)
            weight = model.projector.parametrizations.weight
            with torch.no_grad():
                weight.original0.mul_(s)
                weight.original1.mul_(v)
            dataset = near_duplicates(features, difference)
            everyone, clipper = dataset.rows_of_patient, PatientClipper(model, C, 2)

            def total(rows, clipper=clipper, model=model, dataset=dataset):
                return clipped_sum(clipper, model, dataset, rows, row_loss=cancelling_loss)

            whole = total(everyone)
            assert torch.isfinite(whole).all()
            worst.append(float((whole - total(everyone[1:])).norm()) / C)
            g = torch.stack([model.direction, -model.direction]) / 2
            exact = weight_norm_gradient(model, dataset.inputs["lab"][:2, 0], g, torch.float64)
            naive = weight_norm_gradient(model, dataset.inputs["lab"][:2, 0], g, torch.float32)
            broken.append(float(exact / C * (C / naive).clamp(max=1)))
    assert max(worst) <= 1 + SLACK
    if case == "plain":
        assert max(broken) > 1.5, "the attack must work against the naive norm"
        assert max(worst) >= 0.999


def weight_norm_gradient(model: nn.Module, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm of one patient's gradient of (s, v, b), by the formula that needs no second pass:
    Σ_o Δs_o² + r_o² (‖ΔW_o‖² − Δs_o²), with a Gram for ‖ΔW_o‖."""
    weight = model.projector.parametrizations.weight
    v, s, x, g = (value.detach().to(dtype) for value in (weight.original1, weight.original0, x, g))
    lengths = v.norm(dim=1, keepdim=True)
    scale = (g.T @ x * v / lengths).sum(1)
    of_rows = (g.T[:, :, None] * g.T[:, None, :] * (x @ x.T)).sum((1, 2))
    direction = (s / lengths).square().flatten() * (of_rows - scale.square())
    return (scale.square() + direction + g.sum(0).square()).sum().clamp(min=0).sqrt()


@pytest.mark.parametrize("broken", ["zero", "infinite"])
def test_a_weight_norm_without_a_direction_lets_nobody_contribute(clipped_sum, broken):
    """v = 0 has no direction, and the map from ΔW is not finite: no patient, rather than NaN."""

    def only_the_first(model, inputs, present, labels):
        # The broken row's output is left out, so that no loss and no gradient is NaN.
        return model.projector(inputs["lab"])[:, 0, 0] * model.direction[0]

    model, dataset = Cancelling(7, 5, 1.0, True, normed=True), near_duplicates(7, 1e-2)
    clipper = PatientClipper(model, C, 2)
    rows = dataset.rows_of_patient
    assert clipped_sum(clipper, model, dataset, rows, row_loss=only_the_first).any()
    with torch.no_grad():
        model.projector.parametrizations.weight.original1[3] = (
            0.0 if broken == "zero" else torch.inf
        )
    got = clipped_sum(clipper, model, dataset, rows, row_loss=only_the_first)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("k", [1, 3])
def test_sum_moves_by_at_most_C_with_a_weight_norm_of_any_scale(make_dataset, clipped_sum, k):
    for scale in (1e-6, 1.0, 1e3):
        model, dataset = Shared(), make_dataset()
        for p in model.parameters():
            nn.init.normal_(p, std=scale)
        clipper, chosen = PatientClipper(model, C, k), draw(dataset, k, 4, 7)
        whole = clipped_sum(clipper, model, dataset, chosen)
        for leaver in range(7):
            rest = clipped_sum(clipper, model, dataset, chosen[:leaver] + chosen[leaver + 1 :])
            assert (whole - rest).norm() <= C * (1 + SLACK)


def test_a_patients_contribution_does_not_depend_on_the_others(
    make_model, make_dataset, clipped_sum
):
    """One patient alone, in any slot and any company, adds the same vector up to float64."""
    model, dataset = make_model(), make_dataset()
    clipper, rows = PatientClipper(model, C, 2), dataset.rows_of_patient
    alone = clipped_sum(clipper, model, dataset, [rows[5][:2]])
    for company in ([1, 2], [3, 4, 7, 8], [0, 1, 2, 3, 4, 6]):
        others = [rows[p][:2] for p in company]
        rest = clipped_sum(clipper, model, dataset, others)
        joined = clipped_sum(clipper, model, dataset, [*others, rows[5][:2]])
        assert (joined - rest - alone).norm() <= 1e-12

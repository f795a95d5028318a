"""A linear start: at first a system is a linear model of its embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor

from client.site.model import slm
from client.site.model.fusion.base import NO_SLM, Prediction, RiskModel
from client.site.model.fusion.linear_start import LinearStart
from client.site.model.losses import row_loss
from client.site.model.system import build
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.optimizer import NoisedSumOptimizer, base_optimizer
from client.site.training.plan import DPExecutionPlan, OptimizerConfig
from common.errors import StudyError
from common.study import LinearStart as Options
from common.study import Study

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def shared_language_model() -> Iterator[None]:
    yield
    slm._resident.cache_clear()  # float64 here


DIMS = {"xray": 24, "note": 16, "lab": 12}
SYSTEMS = ["adacomed", "llama-fusion", "m-llm"]
TASKS = 3


def study(system: str, own: Mapping[str, Any] | None = None, **start: float) -> Study:
    raw = {
        "name": "linear",
        "seed": 4,
        "sources": {
            "xray": {"modality": "image", "encoder": "image-descriptor"},
            "note": {"modality": "text", "encoder": "hashed-text"},
            "lab": {"modality": "series", "encoder": "series-statistics", "series": ["sodium"]},
        },
        "tasks": {f"risk{k}": {"prevalence": 0.2} for k in range(TASKS)},
        "model": {
            "system": system,
            "linear_start": {"rank": 8, "excursion": 1e-3, **start},
            **({} if own is None else {system.replace("-", "_"): own}),
        },
    }
    return Study.from_toml(tomli_w.dumps(raw))


def records(count: int = 6, tokens: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    inputs = {s: torch.randn(count, tokens, d, generator=g) for s, d in DIMS.items()}
    return inputs, {s: torch.ones(count, tokens, dtype=torch.bool) for s in DIMS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_untrained_it_says_nothing_and_its_own_layers_have_no_gradient(system: str) -> None:
    s = study(system)
    model = build(s, DIMS).double().eval()
    inputs, present = records()
    inputs = {s: x.double() for s, x in inputs.items()}
    present["note"][2:] = False
    goal = model.objective(inputs, present)
    assert float(goal.logits_BVK.detach().abs().max()) < 1e-9 * float(model.linear_start.gain)
    labels = torch.ones(6, TASKS, dtype=torch.int8)
    value = row_loss(s)(model, inputs, present, labels).sum()
    if goal.auxiliary_B is not None:  # of classification alone
        value = value - goal.auxiliary_B.sum()
    value.backward()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    maps = [v for n, v in norms.items() if n.startswith("linear_start.")]
    assert min(maps) > 0.05
    assert all(v < 0.01 for n, v in norms.items() if not n.startswith("linear_start.")), norms


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_source_moves_the_logits_by_one_per_unit(system: str) -> None:
    model = build(study(system), DIMS).double().eval()
    start = model.linear_start
    inputs, present = records(1)
    inputs = {s: x.double() for s, x in inputs.items()}
    for source, linear in start.maps.items():
        e_d = inputs[source][0, 0]
        columns = []
        for r in range(linear.out_features):  # W e = the r-th unit vector, halved
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[r] = 0.5 * e_d / e_d.square().sum()
                columns.append(2 * model(inputs, present).logits_BK[0])
                linear.weight.zero_()
        jacobian_Kr = torch.stack(columns, dim=1)
        size = float(jacobian_Kr.square().sum(1).mean().sqrt())
        assert size == pytest.approx(1.0, rel=0.05), source
    assert float(start.scale_S.max()) == pytest.approx(1e-3 * 10.0, rel=1e-4), "excursion"


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_stays_linear_for_logits_of_a_few_units(system: str) -> None:
    model = build(study(system), DIMS).double().eval()
    inputs, present = records(40)
    inputs = {s: x.double() for s, x in inputs.items()}
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in model.linear_start.maps.values():
            drawn = torch.randn(linear.weight.shape, generator=g, dtype=torch.float64)
            linear.weight.copy_(drawn / linear.in_features**0.5)
        once = model(inputs, present).logits_BK
        for linear in model.linear_start.maps.values():
            linear.weight.mul_(2)
        twice = model(inputs, present).logits_BK
    assert float(once.std()) > 0.3
    assert float((twice - 2 * once).std()) < 0.05 * float(twice.std())


def test_halved_layers_spend_and_move_less() -> None:
    """The clipped vector holds 2^-h times the gradient, and the step is 2^-h times that."""
    s = study("adacomed", body_halvings=3, excursion=0.1)
    model = build(s, DIMS).double().eval()
    for p in model.linear_start.maps.parameters():
        torch.nn.init.normal_(p, std=0.3)
    inputs, present = records()
    inputs = {s: x.double() for s, x in inputs.items()}
    labels = torch.ones(6, TASKS, dtype=torch.int8)
    clipper = PatientClipper(model, 1e6, 1)
    with clipper.capture():
        loss = row_loss(s)(model, inputs, present, labels).sum()
    plain = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    plan = DPExecutionPlan(1.0, 1, 1, 6, max_grad_norm=1e6, noise_multiplier=1e-12)
    optimizer = NoisedSumOptimizer(
        base_optimizer(OptimizerConfig(name="sgd", learning_rate=1.0), list(model.parameters())),
        plan,
        clipper,
        Entropy.seeded(1),
    )
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    clipper.add(loss, torch.ones(6, dtype=torch.bool))
    sums = [clipper.sums[p].clone() for p in model.parameters()]
    optimizer.step()
    for (name, p), old, total, g in zip(model.named_parameters(), before, sums, plain, strict=True):
        share = 1.0 if name.startswith("linear_start.") else 0.125
        assert torch.allclose(total, share * g, rtol=1e-3, atol=1e-6), name
        assert torch.allclose(old - p, share * share * g / 6, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("weighting", ["gaussian", "inverse"])
def test_adacomed_compares_with_what_it_reads(weighting: str) -> None:
    """Its public records come through the start like any record, but for gradient and hooks; they
    weigh the pathways, and there is no contrast."""
    model = build(study("adacomed", {"weighting": weighting}), DIMS).eval()
    start, fitted = model.linear_start, model.linear_start.gain.clone()
    start.fit(model)
    assert torch.equal(start.gain, fitted), "fitted against the same negatives"
    model.double()
    inputs, present = records()
    inputs = {s: x.double() for s, x in inputs.items()}
    both = model.collaborate(model.read(inputs, present), present)
    chance = 1 / (1 + model.options.prototypes)
    assert both.log_s_B.exp().tolist() == pytest.approx([chance] * 6), "nothing is told apart yet"
    assert model.objective(inputs, present).auxiliary_B is None

    for p in start.maps.parameters():
        torch.nn.init.normal_(p)
    public = model.public_ND[:, None].split([DIMS[s] for s in model._public_widths], dim=-1)
    alike = dict(zip(model._public_widths, public, strict=True))
    whole = {s: torch.ones(x.shape[:2], dtype=torch.bool) for s, x in alike.items()}
    z_NPd, _, _ = model.represent(model.read(alike, whole), whole)
    heard: list[torch.nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: heard.append(module))
    negatives_Nd = model.negatives()
    assert not negatives_Nd.requires_grad
    assert not heard, "the hooks would book them as patients' rows"
    expected_Nd = torch.nn.functional.normalize(z_NPd[:, 1], dim=-1)
    torch.testing.assert_close(negatives_Nd, expected_Nd.detach())


def test_m_llm_explains_the_record_that_it_reads() -> None:
    model = build(study("m-llm", excursion=0.5), DIMS).double().eval()
    inputs, present = records(tokens=2)
    inputs = {s: x.double() for s, x in inputs.items()}
    present["note"][3:] = False
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    parts = model.contributions(inputs, present)
    logits_BK = model(inputs, present).logits_BK
    assert logits_BK.abs().max() > 1
    torch.testing.assert_close(sum(p_BTK.sum(1) for p_BTK in parts.values()), logits_BK)
    assert parts["note"][3:].abs().max() == 0
    maps, read = model.attention(inputs, present), model.read(inputs, present)
    model.linear_start = None
    for name, weights in model.attention(read, present).items():
        torch.testing.assert_close(maps[name], weights, rtol=1e-12, atol=0)


def test_the_ablation_of_m_llm_starts_without_the_stream() -> None:
    """No map for it, and the others as sources of a study that never had it."""
    model = build(study("m-llm", {"without": ["image"]}), DIMS).double().eval()
    assert set(model.linear_start.maps) == {"note", "lab"}
    inputs, present = records()
    inputs = {s: x.double() for s, x in inputs.items()}
    for p in model.linear_start.maps.parameters():
        torch.nn.init.normal_(p)
    said = model(inputs, present)
    assert said.logits_BK.abs().min() > 0
    goal = model.objective(inputs, present)
    inputs["xray"][:], present["xray"][3:] = float("nan"), False
    assert torch.equal(model(inputs, present).logits_BK, said.logits_BK)
    assert torch.equal(model.objective(inputs, present).auxiliary_B, goal.auxiliary_B)
    assert model.contributions(inputs, present)["xray"].abs().max() == 0


def test_uni_mlm_and_deaf_systems_are_told() -> None:
    with pytest.raises(StudyError, match="starts as a linear model by itself"):
        study("uni-mlm")

    class Deaf(RiskModel):
        def __init__(self) -> None:
            super().__init__()
            self.slm, self.slm_description, self.designated, self.dims = None, NO_SLM, [], DIMS
            self.weight = torch.nn.Linear(24, 1)

        def predict(self, inputs: object, present: object) -> Prediction:
            return Prediction(self.weight(inputs["xray"])[:, 0])  # type: ignore[index]

    with pytest.raises(StudyError, match="source 'note' does not move the untrained Deaf"):
        LinearStart(Options(), DIMS, seed=0).fit(Deaf())

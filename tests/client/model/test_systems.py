"""What holds of every registered system, whatever it is called."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor

from client.site.encoders.dataset import Dataset
from client.site.model import slm
from client.site.model.fusion.base import RiskModel
from client.site.model.losses import row_loss
from client.site.model.system import (
    BUILDERS,
    adapter_spec,
    adapter_state,
    build,
    load_adapter,
)
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.layers import covered_modules
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.sampler import PatientSampler
from client.site.training.trainer import Trainer
from common.errors import StudyError
from common.study import Study
from common.systems import SYSTEMS

torch.set_num_threads(1)

DIMS = {"xray": 24, "note": 16, "lab": 12, "age": 3}
TOKENS = {"xray": 3, "note": 2, "lab": 1, "age": 1}
TASKS = 3


LINEAR = [f"{name} from a linear start" for name in SYSTEMS if name != "uni-mlm"]


def study(system: str, **model: object) -> Study:
    if system in LINEAR:
        system = system.partition(" ")[0]
        model = {"linear_start": {"rank": 5, "excursion": 0.1, "body_halvings": 2}, **model}
    raw = {
        "name": "any",
        "seed": 4,
        "sources": {
            "xray": {"modality": "image", "encoder": "image-descriptor"},
            "note": {"modality": "text", "encoder": "hashed-text"},
            "lab": {"modality": "series", "encoder": "series-statistics", "series": ["sodium"]},
            "age": {"modality": "table", "encoder": "demographics"},
        },
        "tasks": {f"risk{k}": {"prevalence": 0.2} for k in range(TASKS)},
        "model": {"system": system, **model},
    }
    return Study.from_toml(tomli_w.dumps(raw))


def randomised(model: RiskModel, dtype: torch.dtype = torch.float64) -> RiskModel:
    """Away from the start, where much is constant; in float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval()


def dataset(patients: int = 7, dtype: torch.dtype = torch.float64) -> Dataset:
    """Patients of one to three records; sources present at random, the first always."""
    g = torch.Generator().manual_seed(5)
    counts = [1 + n % 3 for n in range(patients)]
    bounds, rows = np.cumsum([0, *counts]), sum(counts)
    present = {s: torch.rand(rows, t, generator=g) < 0.7 for s, t in TOKENS.items()}
    present["xray"][:, 0] = True
    return Dataset(
        rows_of_patient=[np.arange(bounds[i], bounds[i + 1]) for i in range(patients)],
        inputs={
            s: torch.randn(rows, t, DIMS[s], generator=g, dtype=dtype) for s, t in TOKENS.items()
        },
        present=present,
        labels=torch.randint(-1, 2, (rows, TASKS), generator=g).to(torch.int8),
        record_ids=[str(n) for n in range(rows)],
    )


def losses(s: Study, model: RiskModel, data: Dataset) -> Tensor:
    return row_loss(s)(model, dict(data.inputs), dict(data.present), data.labels)


@pytest.fixture(params=[*BUILDERS, *LINEAR])
def system(request: pytest.FixtureRequest) -> Iterator[str]:
    yield str(request.param)
    slm._resident.cache_clear()  # `randomised` made the shared one float64


def test_every_system_can_be_chosen_and_built(system: str) -> None:
    assert BUILDERS.keys() == SYSTEMS.keys()
    model = build(study(system), DIMS)
    assert (model.slm is not None) == SYSTEMS[system.partition(" ")[0]].has_slm
    spec = adapter_spec(model)
    assert spec["trainable_parameters"] > 0
    assert spec["dims"] == DIMS
    assert {"name", "sha256"} <= spec["slm"].keys()


def test_changing_one_record_leaves_every_other_alone(system: str) -> None:
    """Logits, loss and clipped gradient of those before it and behind it; each its own patient."""
    s, data, changed = study(system), dataset(), 6
    model = randomised(build(s, DIMS))

    def told() -> list[Tensor]:
        with torch.no_grad():
            logits_BK = model(data.inputs, data.present).logits_BK
        return [logits_BK, losses(s, model, data).detach(), clipped(s, model, data)]

    before = told()
    for name in DIMS:
        data.inputs[name][changed] *= -3
        data.present[name][changed] = ~data.present[name][changed]
    data.labels[changed] = 1 - data.labels[changed].clamp(min=0)
    others = torch.arange(len(data.labels)) != changed
    for old, new in zip(before, told(), strict=True):
        torch.testing.assert_close(new[others], old[others], rtol=1e-9, atol=1e-11)
        assert not torch.allclose(new[changed], old[changed])


def clipped(s: Study, model: RiskModel, data: Dataset) -> Tensor:
    """What each record adds to the sum of a pass in which all are read, `[B, parameters]`."""
    clipper = PatientClipper(model, 1.0, 1)
    added = []
    for row in range(len(data.labels)):
        clipper.begin()
        with clipper.capture():
            value = losses(s, model, data)
        clipper.add(value.sum(), torch.arange(len(value)) == row)
        added.append(clipper.total.clone())
    clipper.close()
    return torch.stack(added)


def test_what_is_absent_says_nothing(system: str) -> None:
    s, data = study(system), dataset()
    model = randomised(build(s, DIMS))
    data.present["note"][:] = False
    loss = losses(s, model, data)
    data.inputs["note"][:] = 1e3
    assert torch.equal(loss, losses(s, model, data))
    for mask in data.present.values():
        mask[:] = False
    assert torch.isfinite(losses(s, model, data)).all(), "not even a record without any source"


def test_every_trainable_layer_is_covered_and_clipped_as_by_brute_force(system: str) -> None:
    s, data, k = study(system), dataset(), 2
    model = randomised(build(s, DIMS))
    names = {name for name, _ in covered_modules(model)}
    trainable, shares = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable.append(parameter)
            halved = model.linear_start is not None and not name.startswith("linear_start.")
            shares.append(0.25 if halved else 1.0)
    chosen = [rows[:k] for rows in data.rows_of_patient]
    wholes = []
    for rows in chosen:
        some = torch.from_numpy(rows)
        part = Dataset(
            rows_of_patient=[np.arange(len(rows))],
            inputs={n: x[some] for n, x in data.inputs.items()},
            present={n: m[some] for n, m in data.present.items()},
            labels=data.labels[some],
            record_ids=[str(r) for r in rows],
        )
        gradients = torch.autograd.grad(
            losses(s, model, part).mean(), trainable, materialize_grads=True
        )
        wholes.append(
            torch.cat([share * g.flatten() for share, g in zip(shares, gradients, strict=True)])
        )
    bound = float(torch.stack([g.norm() for g in wholes]).median())
    wanted = sum(g * min(1.0, bound / float(g.norm())) for g in wholes)
    clipper = PatientClipper(model, bound, k)
    sampler = PatientSampler(data.rows_of_patient, 1.0, k, Entropy.seeded(0))
    for batch in sampler.pack(chosen, 4, pad=True):
        inputs, present, labels = batch.gather(data, torch.device("cpu"))
        with clipper.capture():
            value = row_loss(s)(model, inputs, present, labels)
            loss = (value * batch.weights.flatten()).sum()
        clipper.add(loss, batch.valid)
    got = torch.cat([clipper.sums[p].flatten() for p in trainable])
    assert names
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-8 * float(wanted.norm()))


def test_it_trains_privately_and_its_adapter_comes_back(system: str) -> None:
    s, data = study(system), dataset(dtype=torch.float32)
    model = build(s, DIMS).eval()
    before = adapter_state(model)
    plan = DPExecutionPlan(0.5, 2, 3, 7, max_grad_norm=1.0, noise_multiplier=1.0)
    trainer = Trainer(
        model,
        row_loss(s),
        data,
        plan,
        OptimizerConfig(learning_rate=1e-2),
        Entropy(),
        PerformanceFlags(4),
    )
    trainer.run(3)
    trainer.close()
    after = adapter_state(model)
    assert all(np.isfinite(a).all() for a in after.values())
    assert all(not np.array_equal(after[name], before[name]) for name in after), "all are noised"
    again = build(s, DIMS).eval()
    assert all(np.array_equal(a, before[n]) for n, a in adapter_state(again).items()), "by seed"
    load_adapter(again, after)
    with torch.no_grad():
        said = [m(data.inputs, data.present).logits_BK for m in (model, again)]
    assert torch.equal(*said)


def test_unknown_systems_and_foreign_options_are_named() -> None:
    with pytest.raises(StudyError, match="unknown system 'adacomet'"):
        study("adacomet")
    with pytest.raises(StudyError, match="'m_llm' are options of another system"):
        study("adacomed", m_llm={})

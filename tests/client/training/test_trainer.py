"""The loop: plain training is plain, iterates are averaged, callbacks see public numbers only."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from client.site.encoders.dataset import Dataset
from client.site.training.entropy import Entropy
from client.site.training.plan import (
    DPExecutionPlan,
    NonPrivatePlan,
    OptimizerConfig,
    PerformanceFlags,
)
from client.site.training.sampler import PatientSampler
from client.site.training.trainer import Trainer
from common.errors import PrivacyError
from common.privacy.events import PoissonGaussian, Unprotected


@pytest.fixture
def data() -> Dataset:
    torch.manual_seed(0)
    x = torch.randn(60, 1, 5)
    return Dataset(
        rows_of_patient=[np.arange(i, i + 2) for i in range(0, 60, 2)],
        inputs={"lab": x},
        present={"lab": torch.ones(60, 1, dtype=torch.bool)},
        labels=(x[:, :, 0] > 0).to(torch.int8),
        record_ids=[str(i) for i in range(60)],
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 1)


def loss(model, inputs, present, labels):
    logits = model(inputs["lab"])[:, 0, 0]
    return nn.functional.binary_cross_entropy_with_logits(
        logits, labels[:, 0].to(logits.dtype), reduction="none"
    )


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


PLAIN = NonPrivatePlan(sample_rate=0.5, records_per_patient=1, steps=40, patients_declared=30)


@pytest.mark.parametrize("micro_batch", [4, 64])
def test_plain_training_is_sgd_on_the_sampled_mean(data, model, micro_batch):
    reference = copy.deepcopy(model)
    config = OptimizerConfig("sgd", 0.5)
    Trainer(model, loss, data, PLAIN, config, Entropy.seeded(5), PerformanceFlags(micro_batch)).run(
        3
    )

    sampler = PatientSampler(data.rows_of_patient, 0.5, 1, Entropy.seeded(5))
    for _ in range(3):
        rows = torch.from_numpy(np.concatenate(sampler.draw()))
        losses = loss(reference, {"lab": data.inputs["lab"][rows]}, {}, data.labels[rows])
        gradients = torch.autograd.grad(losses.sum() / 15, list(reference.parameters()))
        for p, g in zip(reference.parameters(), gradients, strict=True):
            p.data -= 0.5 * g
    assert torch.allclose(flat(model), flat(reference), atol=1e-6)


def test_private_training_learns_and_approaches_plain_as_noise_and_clipping_vanish(data, model):
    plain = copy.deepcopy(model)
    config = OptimizerConfig("sgd", 0.5)
    Trainer(plain, loss, data, PLAIN, config, Entropy.seeded(5)).run(20)
    plan = DPExecutionPlan(0.5, 1, 40, 30, max_grad_norm=1e3, noise_multiplier=1e-9)
    Trainer(model, loss, data, plan, config, Entropy.seeded(5)).run(20)
    assert torch.allclose(flat(model), flat(plain), atol=1e-4)


def test_callback_sees_the_step_number_only_and_steps_are_counted(data, model):
    seen = []
    plan = DPExecutionPlan(0.5, 1, 5, 30, max_grad_norm=0.5, noise_multiplier=1.0)
    trainer = Trainer(model, loss, data, plan, OptimizerConfig(), Entropy())
    assert trainer.run(3, lambda *args: seen.append(args)).steps_total == 3
    assert seen == [(1,), (2,), (3,)]
    assert trainer.run(2).steps_total == 5
    with pytest.raises(PrivacyError, match="1 more steps after 5 exceed the plan's 5"):
        trainer.run(1)


def test_plan_prices_what_it_does():
    plan = DPExecutionPlan(0.1, 2, 100, 640, max_grad_norm=0.5, noise_multiplier=1.5)
    assert plan.event == PoissonGaussian(
        sample_rate=0.1, noise_multiplier=1.5, steps=100, max_grad_norm=0.5, denominator=64.0
    )
    assert plan.charge(10).steps == 10
    assert plan.noise_std == 1.5 * plan.sensitivity
    assert plan.sensitivity == 0.5 * (1 + 2.0**-16)
    assert PLAIN.event == Unprotected(population="train")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.1),
        ("records_per_patient", 0),
        ("steps", 0),
        ("patients_declared", 0),
        ("max_grad_norm", 0.0),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", float("nan")),
        ("slack", -0.1),
        ("batch_slack", 1.0),
    ],
)
def test_a_plan_that_protects_nobody_is_refused(name, value):
    good = {
        "sample_rate": 0.1,
        "records_per_patient": 1,
        "steps": 10,
        "patients_declared": 100,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    DPExecutionPlan(**good)
    with pytest.raises(PrivacyError, match=f"{name} = {value}"):
        DPExecutionPlan(**{**good, name: value})


def test_a_site_too_large_for_the_declared_slack_is_refused(data, model):
    plan = DPExecutionPlan(0.5, 1, 5, 30, max_grad_norm=0.5, noise_multiplier=1.0, slack=1e-14)
    with pytest.raises(PrivacyError, match="slack"):
        Trainer(model, loss, data, plan, OptimizerConfig(), Entropy())


def test_dataset_subset_keeps_patients_whole(data):
    part = data.subset([3, 1])
    assert part.n_patients == 2
    assert part.record_ids == ["6", "7", "2", "3"]
    assert [r.tolist() for r in part.rows_of_patient] == [[0, 1], [2, 3]]
    assert torch.equal(part.inputs["lab"][2:], data.inputs["lab"][2:4])
    assert data.subset([]).n_records == 0

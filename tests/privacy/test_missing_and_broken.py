"""Rules 4, 5 and 11: broken, absent and no patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.trainer import Trainer


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_patient_with_non_finite_gradient_contributes_zero_and_changes_nobody(
    make_model, make_dataset, clipped_sum, poison
):
    model, dataset = make_model(layer_norm=True), make_dataset()
    clipper, rows = PatientClipper(model, 0.05, 2), dataset.rows_of_patient
    chosen = [rows[p][:2] for p in (1, 3, 6, 7, 9)]
    without = clipped_sum(clipper, model, dataset, [chosen[0], *chosen[2:]])
    dataset.inputs["lab"][chosen[1][0]] = poison
    dataset.present["lab"][chosen[1][0]] = True
    got = clipped_sum(clipper, model, dataset, chosen)
    assert torch.isfinite(got).all()
    assert (got - without).norm() <= 1e-12


def test_absent_source_adds_no_gradient_and_its_values_do_not_matter(
    make_model, make_dataset, clipped_sum
):
    model, dataset = make_model(), make_dataset()
    dataset.present["lab"][:] = False
    clipper = PatientClipper(model, 0.05, 2)
    chosen = [r[:2] for r in dataset.rows_of_patient]
    first = clipped_sum(clipper, model, dataset, chosen)
    assert clipper.sums[model.projectors["lab"].weight].count_nonzero() == 0
    assert clipper.sums[model.projectors["xray"].weight].count_nonzero() > 0
    dataset.inputs["lab"].normal_(std=100.0)
    assert torch.equal(first, clipped_sum(clipper, model, dataset, chosen))


@pytest.mark.parametrize("patients", [0, 6])
def test_empty_batch_is_noised_and_counted(make_model, make_dataset, row_loss, patients):
    model, dataset = make_model(), make_dataset().subset(range(patients))
    plan = DPExecutionPlan(1e-9, 2, 3, 100, max_grad_norm=1.0, noise_multiplier=1.0)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer = Trainer(
        model, row_loss, dataset, plan, OptimizerConfig("sgd"), Entropy(), PerformanceFlags(4)
    )
    stats = trainer.run(3)
    assert stats.steps == trainer._optimizer.steps_counted == 3
    after = [p for p in model.parameters() if p.requires_grad]
    assert all((a != b).all() for a, b in zip(before, after, strict=True))


def test_a_draw_is_never_truncated(make_model, make_dataset, clipped_sum, brute_force):
    model, dataset = make_model().double(), make_dataset(40, dtype=torch.float64)
    chosen = [r[:2] for r in dataset.rows_of_patient]
    got = clipped_sum(PatientClipper(model, 1e9, 2), model, dataset, chosen, micro_batch=7)
    wanted = sum(brute_force(model, dataset, chosen))
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_everything_trainable_stays_float32_under_a_bf16_model(make_model, make_dataset, row_loss):
    model = make_model()
    for p in model.slm.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    plan = DPExecutionPlan(0.5, 2, 2, 12, max_grad_norm=1.0, noise_multiplier=1.0, batch_slack=0.5)
    trainer = Trainer(
        model, row_loss, make_dataset(), plan, OptimizerConfig(), Entropy(), PerformanceFlags(4)
    )
    trainer.run(2)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {p.grad.dtype for p in trainable} == {torch.float32}
    assert {p.summed_grad.dtype for p in trainable} == {torch.float64}
    state = trainer._optimizer.original_optimizer.state
    assert {state[p]["exp_avg"].dtype for p in trainable} == {torch.float32}
    frozen = {p.dtype for p in model.slm.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_bf16_parameters_are_refused(make_model, make_dataset, row_loss):
    from common.errors import PrivacyError

    plan = DPExecutionPlan(0.5, 1, 2, 12, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match=r"bfloat16.*(\n.*)*float32"):
        Trainer(
            make_model(lora=False).bfloat16(),
            row_loss,
            make_dataset(),
            plan,
            OptimizerConfig(),
            Entropy(),
        )


def test_a_patient_without_records_is_no_error(make_model, make_dataset, row_loss):
    dataset = make_dataset()
    dataset.rows_of_patient.append(np.zeros(0, dtype=np.int64))
    plan = DPExecutionPlan(1.0, 2, 1, 12, max_grad_norm=1.0, noise_multiplier=1.0)
    Trainer(make_model(), row_loss, dataset, plan, OptimizerConfig(), Entropy()).run(1)

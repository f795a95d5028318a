"""The losses against direct transcriptions of UNI-MLM's equations."""

from __future__ import annotations

import pytest
import torch

from client.site.model.losses import asymmetric, class_averaged
from tests.client.model.uni_mlm_equations import transcribed_asl, transcribed_avg


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = torch.randn(40, 5, dtype=torch.float64) * 3
    labels = torch.randint(-1, 2, (40, 5)).to(torch.int8)
    prevalence = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.94], dtype=torch.float64)
    return logits, labels, prevalence


def test_class_averaged_is_equation_2(batch) -> None:
    logits, labels, prevalence = batch
    ours = class_averaged(logits, labels, prevalence)
    expected = [
        transcribed_avg(z.tolist(), y.tolist(), prevalence.tolist())
        for z, y in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_without_weights_the_prior_is_added_to_the_logit(batch) -> None:
    logits, labels, prevalence = batch
    ours = class_averaged(logits, labels, prevalence, weighted=False)
    shifted = logits + torch.log(prevalence / (1 - prevalence))
    plain = torch.nn.functional.binary_cross_entropy_with_logits(
        shifted, labels.clamp(min=0).double(), reduction="none"
    )
    torch.testing.assert_close(ours, torch.where(labels >= 0, plain, 0.0).mean(1))


def test_asymmetric_is_equation_3(batch) -> None:
    logits, labels, _ = batch
    ours = asymmetric(logits, labels)
    expected = [
        transcribed_asl(z.tolist(), y.tolist(), 0.05, 4.0)
        for z, y in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_unknown_labels_cost_nothing_and_give_no_gradient(batch) -> None:
    logits, _, prevalence = batch
    unknown = torch.full(logits.shape, -1, dtype=torch.int8)
    for loss in (
        lambda z: class_averaged(z, unknown, prevalence),
        lambda z: asymmetric(z, unknown),
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        value.sum().backward()
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("extreme", [-200.0, 200.0])
@pytest.mark.parametrize("label", [0, 1])
def test_extreme_logits_stay_finite(extreme: float, label: int) -> None:
    logits = torch.full((1, 2), extreme, requires_grad=True)
    labels = torch.full((1, 2), label, dtype=torch.int8)
    for value in (
        class_averaged(logits, labels, torch.tensor([0.1, 0.5])),
        asymmetric(logits, labels),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()

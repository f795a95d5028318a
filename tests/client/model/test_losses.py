"""The losses against direct transcriptions of UNI-MLM's equations."""

from __future__ import annotations

import math

import pytest
import torch

from client.site.model.losses import asymmetric, class_averaged


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def transcribed_avg(logits, labels, prevalence) -> float:
    """Equations (1), (2), (4) with one minus and w_c = 1 / (2 K p_c)."""
    tasks, total = len(logits), 0.0
    for z, y, p in zip(logits, labels, prevalence, strict=True):
        if y == -1:
            continue
        phi = sigmoid(z)
        plus = 1 / (2 * tasks * p) * math.log(phi)
        minus = 1 / (2 * tasks * (1 - p)) * math.log(1 - phi)
        total += y * plus + (1 - y) * minus
    return -total


def transcribed_asl(logits, labels, margin, gamma) -> float:
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        if y == -1:
            continue
        phi = sigmoid(z)
        shifted = max(phi - margin, 0)
        total += y * (1 - phi) * math.log(phi) + (1 - y) * shifted**gamma * math.log(1 - shifted)
    return -total / len(logits)


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
    ours = asymmetric(logits, labels, margin=0.05, gamma=4.0)
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

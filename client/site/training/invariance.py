"""Is a patient's gradient independent of who else is in the micro-batch? Measured on the model.

Clipping bounds what a patient adds; it does not bound what the patient's presence does to others: a
layer that mixes rows, or a kernel whose result depends on a row's position or on the shape (bf16
kernels moved another patient's gradient by up to 0.9 % when the shape changed: measured).
Micro-batches have one fixed shape, which leaves position and neighbours; both are tried here with
random rows, which are public, before the first step. The adapter is shaken meanwhile: at one that
starts from zero, rows may mix without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper
from common.errors import PrivacyError

# (inputs, present, labels, weights [rows]) -> Σ weight · row loss
WeightedLoss = Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor], Tensor]
_Flows = list[tuple[Tensor, Tensor]]
_Rows = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]

_MEASURED = 8  # patients whose gradients are compared when bits differ
_SHAKEN = 0.05  # standard deviation of what is added to the trainable parameters meanwhile


def row_deviation(
    model: nn.Module,
    clipper: PatientClipper,
    loss: WeightedLoss,
    like: Dataset,
    micro_batch: int,
    device: torch.device,
) -> float:
    """Largest change, in units of C, of a patient's clipped gradient when the micro-batch is
    shuffled and half of the other patients are replaced; 0.0 if equal bit for bit.

    Args:
        model: Its trainable parameters are shaken and restored.
        clipper: On the model.
        loss: Runs the model on one micro-batch.
        like: Gives the shapes of the inputs; its values are not read.
        micro_batch: P, patients per pass.
        device: Where the model is.

    Raises:
        PrivacyError: A row's loss reaches another patient's rows, or a pass changes a buffer.
    """
    generator = torch.Generator().manual_seed(20)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with _shaken(list(clipper.sums), generator):
        deviation = _deviation(clipper, loss, like, micro_batch, device, generator)
    for name, value in model.named_buffers():
        if name not in buffers or not torch.equal(value, buffers[name]):
            raise PrivacyError(
                f"{name}: a forward pass changes this buffer, which would carry patients' data "
                "past the noise",
                cure="use layers without running state, or put them into eval()",
            )
    return deviation


def _deviation(
    clipper: PatientClipper,
    loss: WeightedLoss,
    like: Dataset,
    micro_batch: int,
    device: torch.device,
    generator: torch.Generator,
) -> float:
    k = clipper.rows_per_patient
    rows = _random_rows(like, micro_batch * k, generator)
    others = _random_rows(like, micro_batch * k, generator)
    order = torch.randperm(micro_batch, generator=generator)
    kept = (micro_batch + 1) // 2  # patients order[:kept] move to slots 0 ... kept - 1
    moved = (order[:, None] * k + torch.arange(k)).flatten()
    here, there = moved[: kept * k], torch.arange(kept * k)

    def flows(batch: _Rows, weights: Tensor) -> _Flows:
        on_device = _map(batch, lambda x: x.to(device))
        with clipper.capture():
            value = loss(*on_device, weights.to(device))
        return clipper.backward(value, micro_batch * k)

    everyone = torch.full((micro_batch * k,), 1 / k)
    first = flows(rows, everyone)
    shuffled = _map(rows, lambda x: x[moved])
    for mine, new in zip(_tensors(shuffled), _tensors(others), strict=True):
        mine[kept * k :] = new[kept * k :]
    second = flows(shuffled, everyone)

    half = everyone.clone()
    half[here] = 0
    for layer, (_, g) in zip(clipper.layers, flows(rows, half), strict=True):
        if g[here.to(device)].count_nonzero():
            raise PrivacyError(
                f"{layer.name}: the loss of one patient reaches the rows of another",
                cure="use no attention, contrast or statistics across the batch",
            )

    here, there = here.to(device), there.to(device)
    if all(
        torch.equal(a[here], b[there])
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    ):
        return 0.0
    return _measured_deviation(clipper, first, second, order[:kept].tolist(), micro_batch)


def _measured_deviation(
    clipper: PatientClipper, first: _Flows, second: _Flows, kept: list[int], micro_batch: int
) -> float:
    valid = torch.ones(micro_batch, dtype=torch.bool, device=first[0][1].device)
    factors = clipper.clip_factors(first, valid), clipper.clip_factors(second, valid)
    worst = 0.0
    for slot, patient in enumerate(kept[:_MEASURED]):
        clipper.begin()
        for layer, one, two in zip(clipper.layers, first, second, strict=True):
            x1, g1 = (v[patient] for v in layer.tokens(*one, micro_batch))
            x2, g2 = (v[slot] for v in layer.tokens(*two, micro_batch))
            difference = torch.cat([g1 * factors[0][patient], g2 * -factors[1][slot]])
            layer.accumulate(torch.cat([x1, x2])[None], difference[None])
        total = sum(float(s.square().sum()) for s in clipper.sums.values())
        if not math.isfinite(total):
            return math.inf
        worst = max(worst, total**0.5 / clipper.max_grad_norm)
    clipper.begin()
    return worst


@contextmanager
def _shaken(parameters: list[nn.Parameter], generator: torch.Generator) -> Iterator[None]:
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=_SHAKEN)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def _random_rows(like: Dataset, rows: int, generator: torch.Generator) -> _Rows:
    def shape(x: Tensor) -> tuple[int, ...]:
        return (rows, *x.shape[1:])

    return (
        {
            source: torch.randn(shape(x), generator=generator).to(x.dtype)
            for source, x in like.inputs.items()
        },
        {
            source: torch.rand(shape(m), generator=generator) < 0.7
            for source, m in like.present.items()
        },
        torch.randint(-1, 2, shape(like.labels), generator=generator).to(like.labels.dtype),
    )


def _map(rows: _Rows, change: Callable[[Tensor], Tensor]) -> _Rows:
    inputs, present, labels = rows
    return (
        {source: change(x) for source, x in inputs.items()},
        {source: change(m) for source, m in present.items()},
        change(labels),
    )


def _tensors(rows: _Rows) -> list[Tensor]:
    inputs, present, labels = rows
    return [*inputs.values(), *present.values(), labels]

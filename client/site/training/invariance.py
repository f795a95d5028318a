"""Is a patient's gradient independent of who else is in the micro-batch? Measured on the model.

Clipping bounds what a patient adds; it does not bound what the patient's presence does to others: a
layer that mixes rows, or a kernel whose result depends on a row's position or on the shape (bf16
kernels moved another patient's gradient by up to 0.9 % when the shape changed: measured).
Micro-batches have one fixed shape, which leaves position and neighbours; both are tried here with
random rows, which are public, before the first step. The adapter is a random one meanwhile: one
that starts from zero, or that a coordinator has saturated on purpose, may hide that rows mix. Which
kernel runs, and in which order it adds, depends on shapes and not on values. Whether two kernels
give the same bits does depend on values: a vectorised sigmoid and the scalar one of the last
elements of a tensor agree on most. So many values are tried, at adapters of several sizes, for a
study can saturate its loss at one of them; rows without a gradient prove nothing and count as
different. Where bits differ, how far they do depends on the adapter: there it is measured at the
received one too, which is evidence, not a proof.
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


class BatchDependent(PrivacyError):
    """Rows are separate, but kernels round a row by its position or neighbours. Passes of one
    patient each have neither."""


# (inputs, present, labels, weights [rows]) -> Σ weight · row loss
WeightedLoss = Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor], Tensor]
# (inputs, present) -> [rows, K]
Score = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
_Flows = list[tuple[Tensor, Tensor]]
_Rows = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]

_SPREADS = (0.05, 5e-3, 5e-4)  # standard deviations of the trainable parameters meanwhile


def row_deviation(
    model: nn.Module,
    clipper: PatientClipper,
    loss: WeightedLoss,
    like: Dataset,
    micro_batch: int,
    device: torch.device,
) -> float:
    """Largest change, in units of C, of a patient's clipped gradient when the micro-batch is
    turned, when it is shuffled and half of the other patients are replaced, or when copies of one
    patient fill every slot; 0.0 if equal bit for bit, infinite if some patient has no gradient at
    any random adapter, so that nothing can be said.

    Args:
        model: Its trainable parameters are replaced meanwhile, and restored.
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
    deviation, heard = 0.0, micro_batch == 1  # alone in its pass, a patient has no neighbours
    for spread in _SPREADS:
        with _random_adapter(list(clipper.sums), generator, spread):
            found, every = _deviation(clipper, loss, like, micro_batch, device, generator)
        deviation, heard = max(deviation, found), heard or every
    if deviation:
        received, _ = _deviation(clipper, loss, like, micro_batch, device, generator)
        deviation = max(deviation, received)
    if not heard:
        deviation = math.inf
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
) -> tuple[float, bool]:
    """The change at the present adapter, and whether every patient has a gradient there."""
    k = clipper.rows_per_patient
    rows = _random_rows(like, micro_batch * k, generator)
    for mask in rows[1].values():
        mask[:k] = True  # patient 0 has everything: a pass of their copies might skip the mask
    others = _random_rows(like, micro_batch * k, generator)
    order = torch.randperm(micro_batch, generator=generator)
    kept = (micro_batch + 1) // 2  # patients order[:kept] move to slots 0 ... kept - 1
    moved = _rows_of(order, k)

    def flows(batch: _Rows, weights: Tensor) -> _Flows:
        on_device = _map(batch, lambda x: x.to(device))
        with clipper.capture():
            value = loss(*on_device, weights.to(device))
        return clipper.backward(value, micro_batch * k)

    everyone = torch.full((micro_batch * k,), 1 / k)
    half = everyone.clone()
    half[moved[: kept * k]] = 0
    reached = moved[: kept * k].to(device)
    for layer, (_, g) in zip(clipper.layers, flows(rows, half), strict=True):
        if g[reached].count_nonzero():
            raise PrivacyError(
                f"{layer.name}: the loss of one patient reaches the rows of another",
                cure="use no attention, contrast or statistics across the batch",
            )

    first = flows(rows, everyone)
    loud_P = torch.stack([g.reshape(micro_batch, -1).any(1) for _, g in first]).any(0)
    shuffled = _map(rows, lambda x: x[moved])
    for mine, new in zip(_tensors(shuffled), _tensors(others), strict=True):
        mine[kept * k :] = new[kept * k :]
    slots, nobody = torch.arange(micro_batch), torch.zeros(micro_batch, dtype=torch.long)
    copies = _map(rows, lambda x: x[_rows_of(nobody, k)])
    there = slots.roll(micro_batch // 2)
    turned = _map(rows, lambda x: x[_rows_of(there, k)])
    deviation = max(
        _difference(clipper, first, flows(shuffled, everyone), order[:kept], slots[:kept]),
        _difference(clipper, first, flows(copies, everyone), nobody, slots),
        _difference(clipper, first, flows(turned, everyone), there, slots),
    )
    return deviation, bool(loud_P.all())


def _difference(
    clipper: PatientClipper, first: _Flows, second: _Flows, patients: Tensor, slots: Tensor
) -> float:
    """How far the contributions of `patients` in one pass and those of `slots` in another differ at
    most; they are of the same rows."""
    device = first[0][1].device
    here, there = (_rows_of(s, clipper.rows_per_patient).to(device) for s in (patients, slots))
    everyone = len(first[0][1]) // clipper.rows_per_patient
    valid = torch.ones(everyone, dtype=torch.bool, device=device)
    one, two = clipper.clip_factors(first, valid), clipper.clip_factors(second, valid)
    if torch.equal(one[patients.to(device)], two[slots.to(device)]) and all(
        torch.equal(a[here], b[there])
        for mine, new in zip(first, second, strict=True)
        for a, b in zip(mine, new, strict=True)
    ):
        return 0.0
    worst = 0.0
    for patient, slot in zip(patients.tolist(), slots.tolist(), strict=True):
        clipper.begin()
        for layer, mine, new in zip(clipper.layers, first, second, strict=True):
            x1, g1 = (v[patient] for v in layer.tokens(*mine, everyone))
            x2, g2 = (v[slot] for v in layer.tokens(*new, everyone))
            difference = torch.cat([g1 * one[patient], g2 * -two[slot]])
            layer.accumulate(torch.cat([x1, x2])[None], difference[None])
        total = sum(float(s.square().sum()) for s in clipper.sums.values())
        if not math.isfinite(total):
            return math.inf
        worst = max(worst, total**0.5 / clipper.max_grad_norm)
    clipper.begin()
    return worst


def _rows_of(patients: Tensor, k: int) -> Tensor:
    return (patients[:, None] * k + torch.arange(k)).flatten()


@torch.no_grad()
def scores_stand_alone(
    model: nn.Module, like: Dataset, rows: int, device: torch.device, score: Score
) -> bool:
    """Whether a record's scores, in passes of `rows` records, are the same bits whatever its
    position and its neighbours: an evaluation's sensitivity counts one patient, so one who leaves
    must not move the score of another across the edge of a bin.

    Args:
        model: Its trainable parameters are replaced meanwhile, and restored.
        like: Gives the shapes of the inputs; its values are not read.
        score: (inputs, present) -> [rows, K].
    """
    generator = torch.Generator().manual_seed(21)
    batch, others = (_random_rows(like, rows, generator) for _ in range(2))
    for mask in batch[1].values():
        mask[0] = True
    moved = torch.randperm(rows, generator=generator)
    kept = (rows + 1) // 2
    shuffled = _map(batch, lambda x: x[moved])
    for mine, new in zip(_tensors(shuffled), _tensors(others), strict=True):
        mine[kept:] = new[kept:]
    copies = _map(batch, lambda x: x[:1].expand_as(x).contiguous())
    trainable = [p for p in model.parameters() if p.requires_grad]
    with _random_adapter(trainable, generator, _SPREADS[0]):
        first, second, third = (
            score(*_map(some, lambda x: x.to(device))[:2]) for some in (batch, shuffled, copies)
        )
    return torch.equal(first[moved.to(device)][:kept], second[:kept]) and torch.equal(
        first[:1].expand_as(third), third
    )


@contextmanager
def _random_adapter(
    parameters: list[nn.Parameter], generator: torch.Generator, spread: float
) -> Iterator[None]:
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(spread * torch.randn(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def _random_rows(like: Dataset, rows: int, generator: torch.Generator) -> _Rows:
    """Rows that have a source each and know all their labels: others may have no gradient."""

    def shape(x: Tensor) -> tuple[int, ...]:
        return (rows, *x.shape[1:])

    present = {
        source: torch.rand(shape(m), generator=generator) < 0.7
        for source, m in like.present.items()
    }
    empty = ~torch.stack([mask.any(1) for mask in present.values()]).any(0)
    for mask in present.values():
        mask[empty] = True
    return (
        {
            source: torch.randn(shape(x), generator=generator).to(x.dtype)
            for source, x in like.inputs.items()
        },
        present,
        torch.randint(0, 2, shape(like.labels), generator=generator).to(like.labels.dtype),
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

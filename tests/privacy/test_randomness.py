"""Rules 2 and 5: who takes part, what is added, and that nobody can foresee either."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import BLOCK, Entropy, Keystream
from client.site.training.optimizer import NoisedSumOptimizer, base_optimizer
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.sampler import PatientSampler
from client.site.training.trainer import Trainer
from common.errors import PrivacyError


def patients_with(counts: list[int]) -> list[np.ndarray]:
    bounds = np.cumsum([0, *counts])
    return [np.arange(bounds[i], bounds[i + 1]) for i in range(len(counts))]


def test_every_patient_enters_with_probability_q_independently():
    q, draws, n = 0.1, 2000, 200
    sampler = PatientSampler(patients_with([1] * n), q, 1, Entropy())
    drawn = [np.concatenate([*sampler.draw(), np.zeros(0, np.int64)]) for _ in range(draws)]
    sizes = np.array([len(d) for d in drawn])
    counts = np.bincount(np.concatenate(drawn).astype(int), minlength=n)
    std = math.sqrt(q * (1 - q))
    assert abs(sizes.sum() - q * n * draws) < 5 * std * math.sqrt(n * draws)
    assert abs(counts - q * draws).max() < 5.5 * std * math.sqrt(draws)
    # Fixed-size or shuffled batches would show here: the size is binomial.
    assert sizes.var() / (n * std**2) == pytest.approx(1, abs=0.2)


def test_rate_is_per_patient_however_many_records_they_have():
    q, draws = 0.2, 4000
    rows = patients_with([1, 8, 40])
    sampler = PatientSampler(rows, q, 2, Entropy())
    entered = np.zeros(3)
    for _ in range(draws):
        for chosen in sampler.draw():
            owner = next(p for p, r in enumerate(rows) if chosen[0] in r)
            assert set(chosen) <= set(rows[owner])
            assert len(set(chosen)) == len(chosen) == min(2, len(rows[owner]))
            entered[owner] += 1
    assert abs(entered - q * draws).max() < 5 * math.sqrt(draws * q * (1 - q))


def test_choice_of_records_is_uniform():
    sampler = PatientSampler(patients_with([5]), 1.0, 2, Entropy())
    draws = 5000
    counts = np.bincount(np.concatenate([sampler.draw()[0] for _ in range(draws)]), minlength=5)
    assert abs(counts - 0.4 * draws).max() < 5 * math.sqrt(draws * 0.4 * 0.6)


def test_packing_keeps_every_record_once_with_weights_that_average_each_patient():
    sampler = PatientSampler(patients_with([3, 1, 2, 7, 1]), 1.0, 3, Entropy())
    chosen = sampler.draw()
    batches = list(sampler.pack(chosen, 2, pad=True))
    assert {b.rows.shape for b in batches} == {(2, 3)}
    assert [b.valid.tolist() for b in batches] == [[True, True], [True, True], [True, False]]
    weight = {}
    for batch in batches:
        sums = batch.weights.sum(1)
        assert torch.allclose(sums, batch.valid.to(sums.dtype))
        for row, w in zip(
            batch.rows.flatten().tolist(), batch.weights.flatten().tolist(), strict=True
        ):
            if w:
                assert row not in weight
                weight[row] = w
    assert weight.keys() == set(np.concatenate(chosen).tolist())
    assert [b.valid.tolist() for b in sampler.pack([], 2, pad=True)] == [[False, False]]
    assert not list(sampler.pack([], 2, pad=False))


def test_gaussians_are_standard_normal_with_tails():
    out = torch.zeros(1_000_001, dtype=torch.float64)
    Entropy().noise.add_gaussians_(out, 1.0)
    n = out.numel()
    assert abs(float(out.mean())) < 5 / math.sqrt(n)
    assert abs(float(out.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((out**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    for cut, p in ((1.0, 0.317311), (3.0, 0.0026998), (4.0, 6.334e-5)):
        beyond = int((out.abs() > cut).sum())
        assert abs(beyond - n * p) < 5 * math.sqrt(n * p) + 1
    # The two outputs of a pair, and neighbours, are uncorrelated.
    for shift in (1, 32768):
        assert abs(float((out[shift:] * out[:-shift]).mean())) < 5 / math.sqrt(n)


def test_parts_of_one_block_get_the_numbers_of_the_whole():
    whole, parts = (torch.zeros(2 * BLOCK + 7, dtype=torch.float64) for _ in range(2))
    Keystream(bytes(32)).add_gaussians_(whole, 2.0)
    stream = Keystream(bytes(32))
    for part in parts.split(BLOCK):
        stream.add_gaussians_(part, 2.0)
    assert torch.equal(whole, parts)
    assert len(whole.unique()) == len(whole)  # no block repeats another


def test_the_tail_has_more_radii_than_the_grid_can_tell_apart():
    """Uniforms of 53 bits leave the sums of a few draws on rings that lie further apart than the
    grid: a data set whose sum is on no ring is excluded for sure, which delta does not pay for."""

    class Smallest(Keystream):
        def _integers(self, count):
            words = super()._integers(count)
            if count == 2 * 1000:
                words[:1000] = -(2**52)
            return words

    out = torch.zeros(2000, dtype=torch.float64)
    Smallest(bytes(range(32))).add_gaussians_(out, 1.0)
    radius = torch.hypot(out[:1000], out[1000:])
    assert radius.min() > 8.5
    assert radius.max() < 12.2
    assert len((radius * 2**20).round().unique()) > 990


def test_uniforms_have_53_bits_and_never_reach_zero():
    u = Keystream(bytes(32)).uniforms(100_000)
    assert u.min() > 0
    assert u.max() <= 1
    scaled = u * 2.0**53
    assert (scaled == np.round(scaled)).all()
    assert (scaled % 2 == 1).mean() == pytest.approx(0.5, abs=0.01)


def test_keystream_is_aes_256_in_counter_mode():
    """NIST SP 800-38A has no zero counter; the first block for a zero key is AES-256(0, 0)."""
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    words = np.frombuffer(block, dtype="<i8") >> 11
    assert Keystream(bytes(32)).uniforms(2) == pytest.approx((words + 2.0**52 + 1) / 2.0**53)


def one_wide_layer() -> tuple[nn.Module, Dataset]:
    model = nn.Linear(1000, 200)
    data = Dataset(
        rows_of_patient=patients_with([1] * 20),
        inputs={"lab": torch.randn(20, 1, 1000)},
        present={"lab": torch.ones(20, 1, dtype=torch.bool)},
        labels=torch.zeros(20, 1, dtype=torch.int8),
        record_ids=[str(i) for i in range(20)],
    )
    return model, data


def square_loss(model, inputs, present, labels):
    return model(inputs["lab"]).square().mean((1, 2))


def test_injected_noise_has_the_charged_deviation():
    """Chi-square of (released - clipped sum) against sigma·C: a 1 % error in the noise fails."""
    model, data = one_wide_layer()
    plan = DPExecutionPlan(0.5, 1, 10, 20, max_grad_norm=0.3, noise_multiplier=1.7)
    clipper = PatientClipper(model, plan.max_grad_norm, 1)
    optimizer = NoisedSumOptimizer(
        base_optimizer(OptimizerConfig("sgd", 0.1), list(model.parameters())),
        plan,
        clipper,
        Entropy(),
    )
    squares, count = 0.0, 0
    for _ in range(5):
        optimizer.zero_grad()
        with clipper.capture():
            loss = square_loss(model, {"lab": data.inputs["lab"]}, {}, data.labels).sum()
        clipper.add(loss, torch.ones(20, dtype=torch.bool))
        before = {p: s.clone() for p, s in clipper.sums.items()}
        optimizer.step()
        for p, clipped in before.items():
            z = (p.summed_grad - clipped) / (1.7 * 0.3)
            squares, count = squares + float(z.square().sum()), count + z.numel()
            on_grid = p.summed_grad / plan.grid
            assert torch.equal(on_grid, on_grid.round())
            assert torch.allclose(p.grad, (p.summed_grad / plan.denominator).float())
    assert count > 1e6
    assert abs(squares / count - 1) < 0.01  # seven standard deviations of the statistic
    assert optimizer.steps_counted == 5
    with pytest.raises(ValueError, match="cleared"):
        optimizer.step()  # without zero_grad: a second release of the same sum


def test_parameters_of_several_precisions_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    plan = DPExecutionPlan(0.5, 1, 10, 20, max_grad_norm=0.3, noise_multiplier=1.7)
    base = base_optimizer(OptimizerConfig("sgd", 0.1), list(model.parameters()))
    with pytest.raises(PrivacyError, match="several precisions"):
        NoisedSumOptimizer(base, plan, PatientClipper(model, 0.3, 1), Entropy())


def trained(seed: int, entropy: Entropy, **plan) -> torch.Tensor:
    torch.manual_seed(seed)
    model, data = one_wide_layer()
    settings = {"max_grad_norm": 0.1, "noise_multiplier": 1.0, **plan}
    trainer = Trainer(
        model,
        square_loss,
        data,
        DPExecutionPlan(0.5, 1, 2, 20, **settings),
        OptimizerConfig("sgd", 0.1),
        entropy,
        PerformanceFlags(8),
    )
    trainer.run(2)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_noise_differs_between_sites_and_between_runs_of_the_same_seed():
    one, two = trained(3, Entropy()), trained(3, Entropy())
    assert (one != two).float().mean() > 0.99
    difference = one - two
    start = torch.cat([p.detach().flatten() for p in _fresh(3).parameters()])
    ours, theirs = one - start, two - start
    correlation = float((ours * theirs).sum() / (ours.norm() * theirs.norm()))
    assert abs(correlation) < 0.05
    assert difference.norm() > 0.5 * ours.norm()


def _fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return one_wide_layer()[0]


def test_participation_differs_between_sites_and_runs_of_the_same_seed():
    rows = patients_with([1] * 300)

    def draws() -> list[list[int]]:
        torch.manual_seed(0)
        np.random.seed(0)
        sampler = PatientSampler(rows, 0.3, 1, Entropy())
        return [[int(r[0]) for r in sampler.draw()] for _ in range(3)]

    assert draws() != draws()


def test_seeded_entropy_repeats_and_says_that_it_is_simulated():
    assert not Entropy().simulated
    assert Entropy.seeded(1).simulated
    assert torch.equal(trained(3, Entropy.seeded(1)), trained(3, Entropy.seeded(1)))
    assert not torch.equal(trained(3, Entropy.seeded(1)), trained(3, Entropy.seeded(2)))


def test_the_three_generators_are_independent_of_each_other():
    for entropy in (Entropy(), Entropy.seeded(1)):
        a, b, c = (
            g.uniforms(4).tolist() for g in (entropy.patients, entropy.records, entropy.noise)
        )
        assert a != b != c != a

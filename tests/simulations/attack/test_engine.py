"""What is attacked is what is shipped: the windows see everything and change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.site.daemon import work
from client.site.encoders.dataset import Dataset
from client.site.model.losses import row_loss
from client.site.training import trainer
from client.site.training.plan import PerformanceFlags
from common.study import Study
from simulations.attack.audit import training_event
from simulations.attack.canaries import Adversary, play
from simulations.attack.engine import RECORDS, SITES, Engine, Parts, StandIn, of_seed
from simulations.attack.patients import SOURCES, canaries, cancelling, joined, ordinary


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_windows_change_nothing(study: Study) -> None:
    """With equal entropy, a watched round moves the weights to the same bits as a bare trainer."""
    patients = ordinary(20, 0)
    engine = Engine(study, SITES[0], patients, Parts(entropy=of_seed))
    engine.round(1)
    bare = StandIn(study.seed)
    training = study.training
    one = trainer.Trainer(
        bare,
        row_loss(study),
        patients,
        work.plan_of(study, SITES[0]),
        work.OptimizerConfig(name="sgd", learning_rate=training.learning_rate),
        of_seed(study, SITES[0], "train", 1),
        PerformanceFlags(micro_batch=32),
    )
    one.run(training.steps_per_round)
    assert torch.equal(weights(engine.model), weights(bare))
    assert not torch.equal(weights(bare), weights(StandIn(study.seed)))


def test_nothing_is_left_of_the_windows_or_of_a_bug(study: Study) -> None:
    parts = (trainer.PatientSampler, trainer.PatientClipper, trainer.NoisedSumOptimizer)
    entropy = work._entropy
    engine = Engine(study, SITES[0], ordinary(4, 0), Parts(entropy=of_seed))
    engine.round(1)
    with pytest.raises(RuntimeError, match="in a window"):
        engine.round(2, lambda model, released: _raise())
    assert parts == (trainer.PatientSampler, trainer.PatientClipper, trainer.NoisedSumOptimizer)
    assert work._entropy is entropy
    assert not any(module._forward_hooks for module in engine.model.modules())


def _raise() -> None:
    raise RuntimeError("in a window")


def test_a_step_shows_who_entered_and_what_they_added(study: Study) -> None:
    engine = Engine(study, SITES[0], ordinary(6, 1), execution=3)
    before = weights(engine.model)
    seen: list[torch.Tensor] = []
    steps = engine.round(
        2, lambda model, released: seen.append(torch.cat([s.flatten() for s in released.values()]))
    )
    assert len(steps) == study.training.steps_per_round
    assert {(s.site, s.execution, s.round) for s in steps} == {(SITES[0], 3, 2)}
    plan = engine.plan
    for step, released in zip(steps, seen, strict=True):
        assert torch.equal(step.released, released.double())
        assert step.clipped.norm() <= step.entered.sum() * plan.sensitivity
        assert bool(step.clipped.any()) == bool(step.entered.any())
        grid = step.released / plan.grid
        assert torch.equal(grid, grid.round())
    moved = sum(s.released for s in steps) / plan.denominator * study.training.learning_rate
    assert torch.allclose(before.double() - weights(engine.model).double(), moved, atol=1e-7)


def test_the_claim_is_the_price_of_all_that_is_trained(study: Study) -> None:
    event = training_event(study)
    plan = Engine(study, SITES[0], ordinary(2, 0)).plan
    assert event.steps == plan.steps * study.federation.rounds == 20
    assert event == plan.charge(20)


def test_patients_are_what_the_attack_needs() -> None:
    some = joined(ordinary(7, 0, most_records=3), canaries(5, RECORDS, 0))
    assert [len(r) for r in some.rows_of_patient] == [1, 2, 3, 1, 2, 3, 1, *[RECORDS] * 5]
    assert np.array_equal(np.concatenate(some.rows_of_patient), np.arange(some.n_records))
    planted = canaries(5, RECORDS, 0)
    assert torch.equal(some.inputs["scan"][13:], planted.inputs["scan"])
    assert torch.equal(canaries(5, RECORDS, 0).labels, planted.labels)
    assert not torch.equal(canaries(5, RECORDS, 1).inputs["scan"], planted.inputs["scan"])
    pair = cancelling([1e-2, 1e-5], 0)
    assert [len(r) for r in pair.rows_of_patient] == [2] * 4
    for patient, apart in enumerate((1e-2, 1e-2, 1e-5, 1e-5)):
        first, second = pair.inputs["scan"][2 * patient : 2 * patient + 2, 0].double()
        assert float((first - second).norm() / first.norm()) == pytest.approx(apart, rel=3)
        assert (pair.labels[2 * patient] + pair.labels[2 * patient + 1] == 1).all()
    assert set(pair.inputs) == set(SOURCES)


def test_adversary_sums_log_likelihood_ratios_of_true_inner_products(study: Study) -> None:
    suspects = canaries(3, RECORDS, 4)
    engine = Engine(study, SITES[0], suspects)
    adversary = Adversary(engine.model, study, engine.plan, suspects)
    released = {p: torch.randn(p.shape, dtype=torch.float64) for p in engine.model.parameters()}
    adversary.see(engine.model, released)
    adversary.see(engine.model, released)
    plan = engine.plan
    for patient, rows in enumerate(suspects.rows_of_patient):
        clipped = _clipped(engine.model, study, suspects, rows, plan.max_grad_norm)
        inner = sum(float((released[p] * c).sum()) for p, c in clipped.items())
        squared = sum(float(c.square().sum()) for c in clipped.values())
        assert squared == pytest.approx(plan.max_grad_norm**2, rel=1e-5)  # it is above the norm
        q, log_ratio = plan.sample_rate, (inner - squared / 2) / plan.noise_std**2
        wanted = 2 * np.log(1 - q + q * np.exp(log_ratio))
        assert adversary.scores[patient] == pytest.approx(wanted, rel=1e-4)


def _clipped(
    model: torch.nn.Module, study: Study, suspects: Dataset, rows: np.ndarray, bound: float
) -> dict[torch.nn.Parameter, torch.Tensor]:
    losses = row_loss(study)(
        model,
        {s: x[rows] for s, x in suspects.inputs.items()},
        {s: m[rows] for s, m in suspects.present.items()},
        suspects.labels[rows],
    )
    parameters = list(model.parameters())
    gradients = [g.double() for g in torch.autograd.grad(losses.mean(), parameters)]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    return {p: g * min(1.0, bound / norm) for p, g in zip(parameters, gradients, strict=True)}


def test_coins_decide_who_is_in_the_game(study: Study) -> None:
    game = play(study, 60, 5)
    assert len(game.scores) == len(game.included) == 60
    assert np.array_equal(game.included, play(study, 60, 5).included)
    assert not np.array_equal(game.scores, play(study, 60, 5).scores)  # noise has no seed
    assert 15 < game.included.sum() < 45

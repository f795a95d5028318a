"""What a coordinator could gain by adapters, studies and questions made for the purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from client.site.daemon import work as work_module
from client.site.encoders.dataset import Dataset
from client.site.encoders.run import EncodeProgress
from client.site.evaluation.histograms import score_histograms
from client.site.model.fusion.uni_mlm import Prediction, UniMlm
from client.site.model.losses import row_loss
from client.site.model.system import build
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.invariance import BatchDependent, row_deviation, scores_stand_alone
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.trainer import Trainer
from common.errors import PrivacyError
from common.privacy.policy import SENTENCE
from common.study import Study

CPU = torch.device("cpu")
PLAN = DPExecutionPlan(0.5, 1, 1, 8, max_grad_norm=1.0, noise_multiplier=1.0)


def lab_data(patients: int = 8) -> Dataset:
    return Dataset(
        rows_of_patient=[np.array([i]) for i in range(patients)],
        inputs={"lab": torch.randn(patients, 2, 4)},
        present={"lab": torch.ones(patients, 2, dtype=torch.bool)},
        labels=torch.zeros(patients, 1, dtype=torch.int8),
        record_ids=[str(i) for i in range(patients)],
    )


# -- adapters -------------------------------------------------------------------------------

DIMS = {"lab": 12, "note": 8}


def nano_study(lora: bool) -> Study:
    return Study.model_validate(
        {
            "name": "x",
            "sources": {
                name: {"modality": "embedding", "encoder": "precomputed", "dim": d}
                for name, d in DIMS.items()
            },
            "tasks": {"a": {"prevalence": 0.2}, "b": {"prevalence": 0.5}},
            "model": {"lora": {"rank": 2} if lora else None},
        }
    )


def nano_data(generator: torch.Generator) -> Dataset:
    """Six patients with up to nine records: near-duplicates, of opposite labels and of any."""
    counts = [1, 9, 2, 4, 4, 3]
    bounds = np.cumsum([0, *counts])
    n = int(bounds[-1])
    inputs = {s: torch.randn(n, 1, d, generator=generator) for s, d in DIMS.items()}
    labels = torch.randint(-1, 2, (n, 2), generator=generator).to(torch.int8)
    for row in range(bounds[1], bounds[2]):
        labels[row] = row % 2
        for x in inputs.values():
            x[row] = x[bounds[1]] * (1 + 1e-7 * row)
    inputs["lab"][bounds[3]] = torch.inf
    return Dataset(
        rows_of_patient=[np.arange(a, b) for a, b in pairwise(bounds)],
        inputs=inputs,
        present={s: torch.rand(n, 1, generator=generator) < 0.8 for s in DIMS},
        labels=labels,
        record_ids=[str(i) for i in range(n)],
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_shipped_model_keeps_to_C_under_any_adapter(clipped_sum, k: int, lora: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    study = nano_study(lora)
    model, loss = build(study, DIMS, device=CPU).eval(), row_loss(study)
    clipper = PatientClipper(model, 1.0, k)
    data = nano_data(generator)
    chosen = [rows[:k] for rows in data.rows_of_patient]
    trainable = [p for p in model.parameters() if p.requires_grad]
    initial = [p.detach().clone() for p in trainable]

    def weighted(inputs: Any, present: Any, labels: Any, weights: Any) -> Any:
        return (loss(model, inputs, present, labels) * weights).sum()

    # The patients' own passes are as proven for the trainer: it refuses a shape that is not.
    micro_batch = next(
        p for p in (4, 8, 1) if not row_deviation(model, clipper, weighted, data, p, CPU)
    )
    for scale in (0.0, 1e-44, 1.0, 1e8, 3e38):
        with torch.no_grad():
            for p, start in zip(trainable, initial, strict=True):
                new = torch.randn(p.shape, generator=generator) * scale
                p.copy_(new.clamp(-3.4e38, 3.4e38) if scale else start)
        whole = clipped_sum(clipper, model, data, chosen, micro_batch, loss)
        assert torch.isfinite(whole).all()
        for gone in range(len(chosen)):
            rest = chosen[:gone] + chosen[gone + 1 :]
            moved = whole - clipped_sum(clipper, model, data, rest, micro_batch, loss)
            assert float(moved.norm()) <= 1 + PLAN.slack, (scale, gone)


@pytest.mark.parametrize("slot", range(4))
def test_a_kernel_that_rounds_one_position_otherwise_is_found(slot: int) -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})

    def loss(m: Any, x: Any, p: Any, y: Any) -> Any:
        values = m["one"](x["lab"]).square().sum((1, 2))
        return values * (1 + 1e-6 * (torch.arange(len(y)) == slot))

    with pytest.raises(BatchDependent, match="neighbours"):
        Trainer(model, loss, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(4))
    Trainer(model, loss, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(1))


@pytest.mark.parametrize("slot", range(8))
def test_a_kernel_that_differs_for_few_values_is_found(slot: int) -> None:
    """A vectorised sigmoid and the scalar one of a tensor's last elements agree on most."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})

    def loss(m: Any, x: Any, p: Any, y: Any) -> Any:
        values = m["one"](x["lab"]).square().sum((1, 2))
        few = (torch.frexp(values.detach())[0] * 64 + 0.4) % 1 < 0.3
        return values * (1 + 1e-6 * (few & (torch.arange(len(y)) == slot)))

    with pytest.raises(BatchDependent, match="neighbours"):
        Trainer(model, loss, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(8))


def test_a_study_cannot_hide_what_kernels_do_behind_a_saturated_loss() -> None:
    """Where no gradient flows at random adapters, equal bits are zeros; a coordinator could then
    send one for which it flows."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})

    def at_one_slot(values: Any) -> Any:
        return values * (1 + 1e-6 * (torch.arange(len(values)) == 1))

    def saturated_unless_small(m: Any, x: Any, p: Any, y: Any) -> Any:
        return at_one_slot(m["one"](x["lab"]).square().sum((1, 2))).clamp(max=1e-4)

    def without_negatives(m: Any, x: Any, p: Any, y: Any) -> Any:
        return m["one"](x["lab"]).square().sum((1, 2)) * y[:, 0]

    def never(m: Any, x: Any, p: Any, y: Any) -> Any:
        return at_one_slot(m["one"](x["lab"]).square().sum((1, 2))) * 0

    for loss in (saturated_unless_small, without_negatives, never):
        with pytest.raises(BatchDependent, match="neighbours"):
            Trainer(
                model, loss, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(4)
            )
        Trainer(model, loss, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(1))


def test_a_saturated_adapter_cannot_hide_that_rows_mix() -> None:
    """Behind a dead rectifier no gradient of random rows shows the contrast across the batch; a
    coordinator could send such an adapter that is alive for real patients."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})
    nn.init.constant_(model["one"].bias, -100.0)

    def contrast(m: Any, x: Any, p: Any, y: Any) -> Any:
        z = m["one"](x["lab"]).relu().sum(1)
        return -torch.diagonal(torch.log_softmax(z @ z.T, 1))

    with pytest.raises(PrivacyError, match="reaches the rows of another"):
        Trainer(
            model, contrast, lab_data(), PLAN, OptimizerConfig(), Entropy(), PerformanceFlags(4)
        )
    assert (model["one"].bias == -100.0).all(), "restored"


def test_the_rounding_slack_counts_the_tokens(make_model, make_dataset, row_loss) -> None:
    trainer = Trainer(
        make_model(), row_loss, make_dataset(), PLAN, OptimizerConfig(), Entropy(),
        PerformanceFlags(8),
    )  # fmt: skip
    assert trainer._clipper.tokens_per_patient == 5


def test_batch_slack_is_charged_for_the_patients_there_are() -> None:
    """The declared number is a lower bound: more neighbours move the sum further."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})

    def loss(m: Any, x: Any, p: Any, y: Any) -> Any:
        values = m["one"](x["lab"]).square().sum((1, 2))
        return values * (1 + 1e-5 * (torch.arange(len(y)) == 0))

    def trainer(patients: int) -> Trainer:
        plan = replace(PLAN, max_grad_norm=10.0, batch_slack=0.002)
        data, flags = lab_data(patients), PerformanceFlags(4)
        return Trainer(model, loss, data, plan, OptimizerConfig(), Entropy(), flags)

    trainer(8)
    with pytest.raises(BatchDependent):
        trainer(8000)


# -- evaluations ----------------------------------------------------------------------------


def test_no_score_and_no_range_turns_into_an_error() -> None:
    """An error instead of an answer would be a release without noise: of whether any patient's
    score overflows, which adapter and study can make mean anything."""
    worst = [np.inf, -np.inf, np.nan, 3e38, -3e38, 0.0]
    logits = np.array(worst, dtype=np.float32)[:, None]
    for logit_range in (5e-324, 1e-300, 1.0, 1e300, 1.7e308):
        histograms = score_histograms(
            logits,
            np.ones((len(worst), 1), dtype=np.int8),
            [np.array([i]) for i in range(len(worst))],
            bins=4,
            logit_range=logit_range,
            records_per_patient=1,
            rng=Entropy().records,
        )
        assert histograms.sum() == len(worst) - 1
        assert histograms[0, 1, 2] >= 1, "logit 0 opens a bin"
        assert histograms[0, 1, 0] >= 1
        assert histograms[0, 1, 3] >= 1


def test_scores_that_hang_on_the_pass_are_noticed() -> None:
    model, data = nn.Linear(4, 2), lab_data()

    def alone(inputs: Any, present: Any) -> Any:
        return model(inputs["lab"]).sum(1)

    def centred(inputs: Any, present: Any) -> Any:
        return alone(inputs, present) - alone(inputs, present).mean(0)

    def by_position(inputs: Any, present: Any) -> Any:
        last = torch.arange(len(inputs["lab"])) == 15
        return alone(inputs, present) * (1 + 1e-6 * last)[:, None]

    before = model.weight.detach().clone()
    assert scores_stand_alone(model, data, 16, CPU, alone)
    assert not scores_stand_alone(model, data, 16, CPU, centred)
    assert not scores_stand_alone(model, data, 16, CPU, by_position)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_where_kernels_mix_patients_each_has_a_pass_of_their_own(
    ward: ModuleType, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, study = ward.Ward(tmp_path), ward.make_study()
    initial = world.prepared(study)
    predict, sizes = UniMlm.predict, []

    def mixing(self: UniMlm, inputs: Any, present: Any) -> Prediction:
        logits = predict(self, inputs, present).logits_BK
        sizes.append(len(logits))
        return Prediction(logits * (1 + 1e-6 * torch.arange(len(logits)))[:, None])

    monkeypatch.setattr(UniMlm, "predict", mixing)
    answer, _ = world.ask(world.request(kind, study, round=1), initial)
    assert answer.refusal is None
    passes = sizes[3:] if kind == "evaluate" else sizes[-2:]
    assert set(passes) == {1}


def test_exact_metrics_that_fail_do_not_show_outside(
    ward: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(f"{ward.SECRET} has a strange score")

    world, study = ward.Ward(tmp_path), ward.make_study()
    initial = world.prepared(study)
    monkeypatch.setattr(work_module, "write_exact", fail)
    answer, arrays = world.ask(world.request("evaluate", study, round=1), initial)
    assert answer.refusal is None
    assert arrays.keys() == {"histograms"}


# -- studies and questions ------------------------------------------------------------------


def test_measured_slack_needs_the_hospitals_consent(ward: ModuleType, tmp_path: Path) -> None:
    study = ward.make_study(privacy={"batch_slack": 0.01})
    strict = ward.Ward(tmp_path / "strict")
    answer, _ = strict.ask(strict.request("prepare", study))
    assert answer.refusal == "privacy-refused"
    lenient = ward.Ward(tmp_path / "lenient", allow_batch_slack=True)
    assert lenient.ask(lenient.request("prepare", study))[0].refusal is None


def test_a_real_hospital_puts_an_end_to_what_its_patients_spend(
    ward: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="puts no end to what its patients spend"):
        ward.Ward(tmp_path, simulated=False, lifetime=None)


def test_a_release_without_privacy_is_never_forgotten(ward: ModuleType, tmp_path: Path) -> None:
    world = ward.Ward(tmp_path, without_privacy=SENTENCE)
    open_study, study = ward.make_study(private=False), ward.make_study()
    initial = world.prepared(open_study)
    world.ask(world.request("train", open_study, round=1), initial)
    initial = world.prepared(study)
    answer, _ = world.ask(world.request("train", study, round=1, run="later"), initial)
    assert answer.refusal is None
    assert answer.body["epsilon"] == {"train": None, "validation": 0.0}


@pytest.mark.parametrize("lost", ["population.key", "population.fraction"])
def test_patients_never_change_population(ward: ModuleType, tmp_path: Path, lost: str) -> None:
    world, study = ward.Ward(tmp_path), ward.make_study()
    initial = world.prepared(study)
    world.ask(world.request("train", study, round=1), initial)
    (tmp_path / "sites" / "a" / lost).unlink()
    world.restart()
    assert world.ask(world.request("prepare", study))[0].refusal == "privacy-refused"
    assert not (tmp_path / "sites" / "a" / lost).exists()


def test_status_does_not_count_inputs(ward: ModuleType, tmp_path: Path) -> None:
    world = ward.Ward(tmp_path)
    world.hospitals["a"]._encoded(EncodeProgress("lab", 411, 1234))
    (status,) = json.loads(json.dumps(world.guard.status()))
    assert (status["done"], status["total"]) == (33, 100)

"""The benchmark of the private step runs what it says it runs."""

from __future__ import annotations

import pytest
import torch

from client.site.model.system import BUILDERS
from client.site.training.trainer import Trainer
from simulations.benchmarks import dp_step

torch.set_num_threads(1)


@pytest.mark.parametrize("system", BUILDERS)
def test_a_step_of_every_system_moves_its_adapter_with_and_without_privacy(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    started = Trainer.__init__

    def noted(self: Trainer, *arguments: object) -> None:
        started(self, *arguments)  # type: ignore[arg-type]
        trainers.append(self)

    monkeypatch.setattr(Trainer, "__init__", noted)
    for way in ("plain", "ours"):
        step = dp_step.build_of_system(way, system)
        trainer = trainers[-1]
        assert trainer.plan.sample_rate == 1.0
        assert trainer._dataset.n_patients == dp_step.BATCH
        assert (trainer._clipper is not None) == (way == "ours")
        before = [p.detach().clone() for p in trainer._parameters]
        step()
        changed = [not torch.equal(p, b) for p, b in zip(trainer._parameters, before, strict=True)]
        assert trainer.steps_total == 1
        assert all(changed) if way == "ours" else any(changed)
        trainer.close()


def test_systems_stand_side_by_side_with_ratio_and_peak_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dp_step.main(["--system", "m-llm", "--repeats", "2"])
    out = capsys.readouterr().out.splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in out if line.startswith("m-llm")}
    assert rows.keys() == {"m-llm plain", "m-llm ours"}
    assert rows["m-llm plain"][1] == rows["m-llm plain"][3] == "1.00"
    milliseconds, ratio, megabytes, of_plain = map(float, rows["m-llm ours"])
    assert milliseconds > 0
    assert ratio > 0.5
    assert 100 < megabytes < 5000
    assert 0.8 < of_plain < 1.5
    assert not any("hidden" in line for line in out), "Opacus was not asked for"


def test_ratios_are_taken_within_a_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine slows by ten in the second turn: both ways do, and the ratio does not."""
    dp_step._print({"plain": [1.0, 10.0, 1.0], "ours": [1.2, 12.0, 1.2]}, {})
    assert capsys.readouterr().out.splitlines()[1].split() == ["ours", "1200", "1.20"]


def test_all_ways_of_the_comparison_with_opacus_train_the_same_model() -> None:
    slm = dp_step.frozen_llama(256, lora=False)
    for way in dp_step.WAYS:
        dp_step.build(way, slm, 256)()
    assert not any(p.requires_grad for p in slm.parameters())

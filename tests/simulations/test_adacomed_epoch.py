"""AdaCoMed at the paper's size stays within the parameters of its Table 6."""

from __future__ import annotations

import pytest
import torch

from client.site.model.system import build
from simulations.benchmarks import adacomed_epoch as epoch


def test_everything_trained_is_within_the_papers_21_3_million() -> None:
    with torch.device("meta"):
        model = build(epoch.study(), epoch.DIMS)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 20e6 < size <= 21.3e6
    assert epoch.WIDTH % 3 == 0


def test_it_runs_and_prints_the_papers_figures_beside(capsys: pytest.CaptureFixture[str]) -> None:
    epoch.main(["--records", "64"])
    said = capsys.readouterr().out
    assert "minutes per epoch of 64 records" in said
    assert "paper: 0.02" in said

"""The whole of it, once: real shards, daemon, relays, Flower; what it leaves behind, and resuming.

One run of two small hospitals with LoRA, which the tests of this file look at in order.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from client.site.model.files import NANO
from common.errors import FedwardError
from common.privacy.book import Book
from common.study import Study
from server.report import Report
from simulations import simulate, synthetic_hospitals
from simulations.summary import show

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, Report, str]:
    """Study, results, report and what was shown."""
    base = tmp_path_factory.mktemp("run")
    raw = Study.load("demo").model_dump(mode="json")
    raw["model"]["lora"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    raw["training"]["steps_per_round"] = 2
    raw["federation"] |= {"rounds": 2, "sites": {}, "patients_declared": 20, "quorum": 1.0}
    study = Study.model_validate(raw)
    cohort = synthetic_hospitals(base / "cohort", 2, patients=40)
    console = Console(file=io.StringIO(), width=200)
    report = simulate(study, cohort, base / "out", console=console)
    return study, base / "out", report, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_accounts_for_every_hospital(
    finished: tuple[Study, Path, Report, str],
) -> None:
    study, out, report, shown = finished
    said = json.loads((out / "report.json").read_text())
    promised = {"fedward", "study", "status", "rounds", "sites", "privacy", "encoders", "slm",
                "trainable_parameters", "bytes_up_per_round", "tasks", "macro",
                "simulation_exact", "seconds"}  # fmt: skip
    assert promised <= set(said)
    assert said["status"] == "completed"
    assert said["study"]["hash"] == Study.load(out / "study.toml").hash
    for site in report.sites:
        assert site.steps == 4
        assert site.evaluations == 1
        ledger = Book.read(out / "sites" / site.name / "ledger.jsonl")
        assert not ledger.simulated  # noise and sampling were the operating system's
        assert site.epsilon_by_population == ledger.epsilon(site.delta, said["study"]["hash"])
        assert 0 < (site.epsilon or 0) <= study.privacy.epsilon * 1.001
    assert report.privacy.simulated
    assert report.simulation_exact is not None
    assert report.seconds.encode + report.seconds.train <= report.seconds.total
    assert "round 2/2: 2 sites" in shown
    console = Console(file=io.StringIO(), width=80)
    show(report, out, console)
    summary = console.file.getvalue()  # type: ignore[attr-defined]
    assert "riverside" in summary
    assert "40 training patients declared" in summary
    assert "the figures mean nothing" in " ".join(summary.split())


def test_others_can_read_what_it_leaves(finished: tuple[Study, Path, Report, str]) -> None:
    _, out, report, _ = finished
    base = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(out / "adapter"))(tokens).logits
    assert (adapted - before).abs().max() > 1e-3
    curves = EventAccumulator(str(out / "events"))
    curves.Reload()
    spent = [event.value for event in curves.Scalars("epsilon/train/riverside")]
    assert spent[-1] == pytest.approx(report.sites[-1].epsilon_by_population["train"])
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "evaluate"]
    card = (out / "adapter" / "README.md").read_text()
    assert "- Fedward synthetic cohort. CC0-1.0." in card
    assert all(f"| {name} |" in card for name in ("northgate", "riverside"))


def test_resuming_says_why_a_hospital_cannot(finished: tuple[Study, Path, Report, str]) -> None:
    """A lost vault key is one code for the coordinator, and a cure for the user."""
    study, out, _, _ = finished
    shards = out.parent / "cohort" / "shards"
    cohort = {name: shards / name for name in ("northgate", "riverside")}
    (out / "sites" / "northgate" / "vault" / "vault.key").unlink()
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(FedwardError) as caught:
        simulate(study, cohort, out, resume=True, console=console)
    assert "northgate data-problem" in str(caught.value)
    assert "northgate: the vault's key" in str(caught.value)
    assert "restore the key from the backup" in str(caught.value)
    assert "round 1/2" not in console.file.getvalue()  # type: ignore[attr-defined]

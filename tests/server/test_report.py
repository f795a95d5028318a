"""report.json and the curves: stable fields, honest ε, whole files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import FedwardError
from common.study import Study, resolve
from server import report
from server.curves import Curves
from server.federation import Finished, Progress
from server.metrics import measure

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = {
    "trainable_parameters": 44,
    "bytes": 176,
    "slm": {"name": "nano", "revision": None, "sha256": "00", "embedded": True},
    "designated": [3, 5],
    "logits": "of a head",
    "dims": {"lab": 11},
    "lora": None,
}


def finished(*, private: bool = True, simulated: bool = True) -> Finished:
    study = resolve(
        Study.from_toml(
            """
            name = "small"
            [sources.lab]
            modality = "series"
            encoder = "series-statistics"
            series = ["heart_rate"]
            [tasks.death]
            [tasks.sepsis]
            [federation.sites.a]
            patients_declared = 300
            [federation.sites.b]
            patients_declared = 700
            """
        ),
        private=private,
    )
    counts = np.zeros((2, 2, 16))
    counts[0, 0, 4:10], counts[0, 1, 6:12] = 100, 40
    metrics = measure(counts, 0.0, list(study.tasks)).model_dump(mode="json")
    spent = {"train": 1.5, "validation": 7.5} if private else {"train": None, "validation": None}
    progress = Progress(
        round=11,
        completed=10,
        epsilon={"a": spent},
        steps={"a": 220},
        releases={"a": 1},
        evaluations=[{"round": 11, "sites": ["a"], "metrics": metrics}],
        bytes_up_per_round=1234,
        seconds={"encode": 1.0, "train": 2.0, "total": 4.5},
        refused={"b": "budget-exhausted"},
    )
    body = {"spec": SPEC, "encoders": {"lab": "series: eleven"}, "simulated": simulated}
    adapter = {"projectors.lab.weight": np.zeros((4, 11), dtype=np.float32)}
    return Finished(study, "run-1", adapter, progress, {"a": body})


def as_json(made: report.Report, folder: Path) -> dict[str, Any]:
    return json.loads(report.write(folder, made).read_text())


def test_the_stable_fields_are_there(tmp_path: Path) -> None:
    made = report.build(finished())
    said = as_json(made, tmp_path)
    assert said["fedward"]
    assert said["study"]["name"] == "small"
    assert len(said["study"]["hash"]) == 64
    assert (said["status"], said["rounds"], said["rounds_asked"]) == ("completed", 10, 11)
    first = said["sites"][0]
    assert (first["name"], first["patients_declared"], first["steps"]) == ("a", 300, 220)
    assert (first["delta"], first["sample_rate"], first["evaluations"]) == (1e-5, 0.1, 1)
    assert first["noise_multiplier"] > 0.3
    assert first["epsilon"] == 7.5
    assert first["epsilon_by_population"] == {"train": 1.5, "validation": 7.5}
    assert said["privacy"]["mode"] == "local"
    assert said["privacy"]["unit"] == "patient"
    assert said["privacy"]["simulated"] is True
    assert said["encoders"] == {"lab": "series: eleven"}
    assert said["slm"]["name"] == "nano"
    assert (said["trainable_parameters"], said["bytes_up_per_round"]) == (44, 1234)
    death = said["tasks"]["death"]
    assert death["status"] == "measured"
    assert death["interval"]["auroc"][0] < death["auroc"] < death["interval"]["auroc"][1]
    assert (death["support"], death["positives"]) == (840, 240)
    assert said["tasks"]["sepsis"]["status"] == "insufficient"
    assert said["tasks"]["sepsis"]["auroc"] is None
    assert said["macro"]["auroc"] == death["auroc"]
    assert said["simulation_exact"] is None
    assert said["seconds"] == {"encode": 1.0, "train": 2.0, "total": 4.5}
    assert report.read(tmp_path) == made


def test_a_site_that_never_answered_is_stated_at_its_reserved_price() -> None:
    silent = report.build(finished()).sites[1]
    assert silent.refused == "budget-exhausted"
    assert silent.epsilon_by_population == silent.epsilon_reserved
    assert silent.epsilon == max(v for v in silent.epsilon_reserved.values() if v)
    assert 7.9 < silent.epsilon <= 8


def test_without_privacy_epsilon_is_null(tmp_path: Path) -> None:
    said = as_json(report.build(finished(private=False)), tmp_path)
    assert said["privacy"]["mode"] == "none"
    for site in said["sites"]:
        assert site["epsilon"] is None
        assert site["epsilon_by_population"] == {"train": None, "validation": None}
        assert site["epsilon_reserved"] == {"train": None, "validation": None}
        assert site["noise_multiplier"] is None


def test_exact_metrics_enter_the_report_of_a_simulation_only(tmp_path: Path) -> None:
    task = {
        "auroc": 0.8,
        "auprc": 0.4,
        "precision": 0.3,
        "recall": 0.7,
        "f1": 0.4,
        "support": 100,
        "positives": 20,
        "invalid": 0,
        "interval": {"auroc": [0.7, 0.9], "auprc": None},
    }
    macro = {"auroc": 0.8, "auprc": 0.4, "interval": {"auroc": [0.7, 0.9], "auprc": None}}
    exact = {"tasks": {"death": task}, "macro": macro, "patients": 90, "records": 100, "sites": {}}
    report.write(tmp_path, report.build(finished()))
    report.attach_exact(tmp_path, exact)
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["simulation_exact"]["tasks"]["death"]["interval"]["auroc"] == [0.7, 0.9]
    assert said["simulation_exact"]["macro"]["auroc"] == 0.8
    report.write(tmp_path, report.build(finished(simulated=False)))
    with pytest.raises(FedwardError, match="never leave a hospital"):
        report.attach_exact(tmp_path, exact)


def test_a_report_that_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedwardError, match="no report at"):
        report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"fedward": 1}')
    with pytest.raises(FedwardError, match="is not a report"):
        report.read(tmp_path)


def test_every_field_is_documented() -> None:
    text = (REPOSITORY / "docs" / "report.md").read_text()

    def names(part: Any) -> set[str]:
        """Keys of a JSON schema and of every section under it."""
        sections = [part, *part.get("$defs", {}).values()]
        return {key for section in sections for key in section.get("properties", {})}

    missing = {n for n in names(report.Report.model_json_schema()) if f"`{n}`" not in text}
    assert not missing


def test_curves_hold_what_rounds_jsonl_says(tmp_path: Path) -> None:
    metrics = finished().progress.evaluations[0]["metrics"]
    with Curves(tmp_path / "events") as curves:
        for number in (1, 2):
            curves.line(
                {
                    "round": number,
                    "kind": "train",
                    "sites": ["a"],
                    "seconds": 0.5 * number,
                    "bytes_up": 10,
                    "bytes_down": 20,
                    "epsilon": {"a": {"train": 0.5 * number, "validation": None}},
                }
            )
        curves.line(
            {
                "round": 2,
                "kind": "evaluate",
                "sites": ["a"],
                "seconds": 1.0,
                "bytes_up": 1,
                "bytes_down": 1,
                "epsilon": {"a": {"train": 1.0, "validation": 7.0}},
                "metrics": metrics,
            }
        )
    read = EventAccumulator(str(tmp_path / "events"))
    read.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in read.Scalars(tag)]

    assert curve("epsilon/train/a") == [(1, 0.5), (2, 1.0), (2, 1.0)]
    assert curve("epsilon/validation/a") == [(2, 7.0)]
    assert curve("round/seconds") == [(1, 0.5), (2, 1.0)]
    assert curve("auroc/death")[0][1] == pytest.approx(metrics["tasks"]["death"]["auroc"])
    tags = read.Tags()["scalars"]
    assert "auroc/sepsis" not in tags
    assert "auroc/macro" in tags


def test_reading_a_report_needs_neither_torch_nor_flower() -> None:
    code = (
        "import sys, server.curves, server.publish, server.report, server.metrics\n"
        "assert not {'torch', 'tensorflow', 'transformers', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)

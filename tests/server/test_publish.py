"""The published adapter: loads elsewhere, says what it is, replaces its forerunner whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from client.site.model.system import adapter_spec, adapter_state, build, load_adapter
from common.study import Study, resolve
from server import publish, report
from server.federation import Finished, Progress
from server.metrics import measure

ENCODERS = {"lab": "eleven bounded statistics per series"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def study(slm: str, *, lora: bool = False, private: bool = True) -> Study:
    toml = f"""
        name = "small"
        description = "A study of a test."
        [sources.lab]
        modality = "series"
        encoder = "series-statistics"
        series = ["heart_rate"]
        [tasks.death]
        prevalence = 0.2
        description = "death in hospital"
        [tasks.sepsis]
        [model]
        slm = "{slm}"
        {"lora = {rank = 2, alpha = 4}" if lora else ""}
        [federation.sites.north]
        patients_declared = 300
        [federation.sites.south]
        patients_declared = 700
    """
    return resolve(Study.from_toml(toml), private=private)


def trained(of: Study) -> tuple[torch.nn.Module, dict[str, np.ndarray], dict[str, Any]]:
    """A model whose adapter is not the initial one."""
    model = build(of, {"lab": 11}, device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    arrays = {
        name: (array + rng.normal(0, 0.3, array.shape)).astype(np.float32)
        for name, array in adapter_state(model).items()
    }
    load_adapter(model, arrays)
    return model, arrays, adapter_spec(model)


def described(of: Study, spec: dict[str, Any], *, simulated: bool = False) -> report.Report:
    counts = np.zeros((2, 2, 16))
    counts[0, 0, 4:10], counts[0, 1, 6:12] = 100, 40
    metrics = measure(counts, 0.0, list(of.tasks)).model_dump(mode="json")
    spent = {"train": 1.23401, "validation": 7.5}
    progress = Progress(
        round=10,
        completed=10,
        epsilon={"north": spent, "south": spent},
        steps={"north": 200, "south": 200},
        releases={"north": 1, "south": 1},
        evaluations=[{"round": 10, "sites": ["north", "south"], "metrics": metrics}],
    )
    body = {"spec": spec, "encoders": ENCODERS, "simulated": simulated}
    return report.build(Finished(of, "run", {}, progress, {"north": body}))


def published(out: Path, of: Study, **options: Any) -> Path:
    _, arrays, spec = trained(of)
    return publish.write(out, of, arrays, spec, described(of, spec), **options)


def test_what_was_written_rebuilds_the_model(tmp_path: Path, base: Path) -> None:
    model, arrays, spec = trained(study(str(base)))
    folder = publish.write(
        tmp_path, study(str(base)), arrays, spec, described(study(str(base)), spec)
    )
    again = build(Study.load(folder / "study.toml"), {"lab": 11}, device=torch.device("cpu"))
    load_adapter(again, load_file(folder / "projectors.safetensors"))
    inputs = {"lab": torch.randn(5, 1, 11)}
    present = {"lab": torch.ones(5, 1, dtype=torch.bool)}
    assert torch.equal(model(inputs, present).logits_BK, again(inputs, present).logits_BK)
    assert not (folder / "adapter_model.safetensors").exists()
    config = json.loads((folder / "fedward.json").read_text())
    assert config["study"] == {"name": "small", "hash": study(str(base)).hash}
    assert config["system"] == "uni-mlm"
    assert config["slm"]["sha256"] == spec["slm"]["sha256"]
    assert list(config["designated"].values()) == spec["designated"]
    assert list(config["designated"]) == ["death", "sepsis"] == list(config["tasks"])
    assert config["sources"][0]["encoder"] == "series-statistics"
    assert config["sources"][0]["dim"] == 11
    assert config["arrays"] == {n: list(a.shape) for n, a in arrays.items()}


def test_peft_loads_the_lora_parts(tmp_path: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    of = study(str(base), lora=True)
    model, arrays, spec = trained(of)
    folder = publish.write(tmp_path, of, arrays, spec, described(of, spec))
    assert not any("lora" in name for name in load_file(folder / "projectors.safetensors"))

    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        without = frozen(tokens).logits
        loaded = PeftModel.from_pretrained(frozen, str(folder))
        theirs, ours = loaded(tokens).logits, model.slm.eval()(tokens).logits
    assert torch.equal(theirs, ours)
    assert (theirs - without).abs().max() > 1e-3
    expected = {n for n in arrays if n.startswith("slm.")}
    kept = {f"slm.{n}" for n, p in loaded.named_parameters() if "lora_" in n}
    assert kept == expected
    assert loaded.peft_config["default"].r == 2
    assert loaded.peft_config["default"].inference_mode


def test_a_new_adapter_replaces_the_old_and_leaves_nothing_behind(
    tmp_path: Path, base: Path
) -> None:
    published(tmp_path, study(str(base), lora=True))
    published(tmp_path, study(str(base)))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "fedward.json",
        "projectors.safetensors",
        "study.toml",
    ]


def test_a_failed_write_keeps_the_old_adapter(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published(tmp_path, study(str(base)))
    before = (folder / "projectors.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        published(tmp_path, study(str(base)))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (folder / "projectors.safetensors").read_bytes() == before


def test_the_card_states_the_privacy_of_every_site(tmp_path: Path, base: Path) -> None:
    of = study(str(base))
    folder = published(tmp_path, of)
    publish.attribute(tmp_path, ["Old data"])
    publish.attribute(tmp_path, ["Some data, ODbL-1.0"])
    card = (folder / "README.md").read_text()
    assert "Old data" not in card
    sigma = f"{of.privacy.noise_multiplier:.3f}"
    for site in ("north", "south"):
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {site} "))
        # ε is rounded up, never down
        for figure in ("1e-05", "1.235", "7.500", sigma, "0.1", "200"):
            assert figure in row, (figure, row)
    for said in (
        "**patient**",
        "adding or removing one patient",
        "Mode `local`",
        "a patient treated at several of these sites",
        "**Not covered:**",
        "Not for clinical use",
        "no medical device",
        of.hash,
        ENCODERS["lab"],
        "Some data, ODbL-1.0",
        "| death | 0.",
        "| sepsis | *insufficient* |",
    ):
        assert said in card, said
    assert "Simulated" not in card
    assert "{{" not in card
    assert "None" not in card


def test_the_card_says_so_when_nothing_was_protected(base: Path) -> None:
    for of, simulated in ((study(str(base), private=False), False), (study(str(base)), True)):
        _, _, spec = trained(of)
        card = publish.card(of, spec, described(of, spec, simulated=simulated))
        if simulated:
            assert "**Simulated.**" in card
            assert "protected no patient in this run" in card
        else:
            assert "every patient's ε is infinite" in card
            assert "differential-privacy" not in card
            assert "Covered:" not in card

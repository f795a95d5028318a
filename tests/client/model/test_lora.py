"""LoRA under privacy: what moves, what comes back through peft, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from client.site.encoders.dataset import Dataset
from client.site.model.fusion.base import RiskModel
from client.site.model.losses import row_loss
from client.site.model.system import adapter_spec, adapter_state, build, load_adapter
from client.site.training.entropy import Entropy
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.trainer import Trainer
from common.errors import ModelError, StudyError
from common.study import Study, resolve
from server import publish, report
from server.federation import Finished, Progress
from server.metrics import measure

torch.set_num_threads(1)

SYSTEMS = ("uni-mlm", "llama-fusion")
DIMS = {"xray": 24, "note": 16}
PATIENTS = 12
CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def study(system: str, slm: Path, **lora: Any) -> Study:
    raw = {
        "name": "low-rank",
        "sources": {
            "xray": {"modality": "image", "encoder": "image-descriptor"},
            "note": {"modality": "text", "encoder": "hashed-text"},
        },
        "tasks": {"death": {"prevalence": 0.2}, "sepsis": {"prevalence": 0.3}},
        "model": {"system": system, "slm": str(slm), "lora": {"rank": 2, **lora}},
        "federation": {"sites": {"north": {"patients_declared": PATIENTS}}},
    }
    if system == "llama-fusion":
        # Shallower than the language model: peft must be told which blocks it adapts.
        raw["model"]["llama_fusion"] = {"text_layers": 1, "vision_layers": 2}  # type: ignore[index]
    return Study.from_toml(tomli_w.dumps(raw))


def dataset() -> Dataset:
    """Three tokens a source: attention of one token alone does not depend on its query."""
    g = torch.Generator().manual_seed(7)
    return Dataset(
        rows_of_patient=[np.array([n]) for n in range(PATIENTS)],
        inputs={s: torch.randn(PATIENTS, 3, d, generator=g) for s, d in DIMS.items()},
        present={s: torch.ones(PATIENTS, 3, dtype=torch.bool) for s in DIMS},
        labels=torch.randint(0, 2, (PATIENTS, 2), generator=g).to(torch.int8),
        record_ids=[str(n) for n in range(PATIENTS)],
    )


def trainer(of: Study, model: RiskModel, noise_multiplier: float, rate: float) -> Trainer:
    plan = DPExecutionPlan(
        1.0, 1, 4, PATIENTS, max_grad_norm=1.0, noise_multiplier=noise_multiplier
    )
    return Trainer(
        model,
        row_loss(of),
        dataset(),
        plan,
        OptimizerConfig("sgd", learning_rate=rate),
        Entropy(),
        PerformanceFlags(1),  # kernels round narrow LoRA by a row's position: refused otherwise
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_b_moves_at_once_and_a_from_the_second_step(slm_folder: Folder, system: str) -> None:
    """B is zero at the start, so A has no gradient; noise, 1e-8 of C here, moves both."""
    of = study(system, slm_folder("llama"))
    model = build(of, DIMS, device=CPU).eval()
    noise, rate = 1e-8, 10.0
    engine = trainer(of, model, noise, rate)
    states = [adapter_state(model)]
    for _ in range(2):
        engine.run(1)
        states.append(adapter_state(model))
    engine.close()
    a = [name for name in states[0] if "lora_A" in name]
    b = [name for name in states[0] if "lora_B" in name]
    blocks = 2 if system == "uni-mlm" else 1 + 2  # of the text side, and of the vision side
    assert len(a) == len(b) == 2 * blocks  # q and v
    assert all(states[0][name].any() for name in a)
    assert not any(states[0][name].any() for name in b)

    def moved(name: str, step: int) -> float:
        """In standard deviations of what noise alone moves an element by."""
        return float(np.abs(states[step][name] - states[step - 1][name]).max()) / (
            rate * noise / PATIENTS
        )

    assert all(0 < moved(name, 1) < 10 for name in a), "noise alone"
    assert all(moved(name, 1) > 100 for name in b)
    assert all(moved(name, 2) > 30 for name in a), "more than noise"


def described(of: Study, spec: dict[str, Any]) -> report.Report:
    metrics = measure(np.ones((2, 2, 16)), 0.0, list(of.tasks)).model_dump(mode="json")
    progress = Progress(
        round=1,
        completed=1,
        epsilon={"north": {"train": 8.0, "validation": 8.0}},
        steps={"north": 3},
        releases={"north": 1},
        evaluations=[{"round": 1, "sites": ["north"], "metrics": metrics}],
    )
    body = {"spec": spec, "encoders": {}, "simulated": False}
    return report.build(Finished(of, "run", {}, progress, {"north": body}))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_privately_trained_adapter_comes_back_through_peft(
    slm_folder: Folder, tmp_path: Path, system: str
) -> None:
    """Base model from disk, LoRA by `PeftModel.from_pretrained`, the rest by name: same bits."""
    base = slm_folder("llama")
    of = resolve(study(system, base), private=True)
    model = build(of, DIMS, device=CPU).eval()
    engine = trainer(of, model, noise_multiplier=1.0, rate=0.3)
    engine.run(3)
    engine.close()
    arrays, spec = adapter_state(model), adapter_spec(model)
    folder = publish.write(tmp_path, of, arrays, spec, described(of, spec))

    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    with torch.no_grad():
        without = fresh(tokens).logits
        loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
        theirs, ours = loaded(tokens).logits, model.slm(tokens).logits  # type: ignore[misc]
    assert torch.equal(theirs, ours)
    assert not torch.allclose(theirs, without, atol=1e-4)

    # The risk model around it, from the published files alone.
    again = build(Study.load(folder / "study.toml"), DIMS, device=CPU).eval()
    rest = load_file(folder / "projectors.safetensors")
    assert {n for n in arrays if n not in rest} == {n for n in arrays if n.startswith("slm.")}
    load_adapter(again, adapter_state(again) | rest)
    data = dataset()
    with torch.no_grad():
        wanted = model(data.inputs, data.present).logits_BK
        assert not torch.equal(wanted, again(data.inputs, data.present).logits_BK)
        again.slm = loaded
        assert torch.equal(wanted, again(data.inputs, data.present).logits_BK)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["qkv_proj"], "qkv_proj"),
        (["q_proj", "qkv_proj"], "qkv_proj"),  # peft would pass over the second
        (["lm_head"], "lm_head"),  # its rows are read apart from it: LoRA there would do nothing
        (["embed_tokens"], "embed_tokens"),
        (["input_layernorm"], "input_layernorm"),
        (["layers"], "layers"),
    ],
)
def test_a_target_that_is_no_matrix_of_the_blocks_is_named(
    slm_folder: Folder, system: str, targets: list[str], named: str
) -> None:
    with pytest.raises(ModelError, match=f"has no matrix '{named}' for LoRA") as caught:
        build(study(system, slm_folder("llama"), targets=targets), DIMS, device=CPU)
    has = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert caught.value.cure == f"model.lora.targets may name {has}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_rank_above_that_of_the_matrix_is_refused(slm_folder: Folder, system: str) -> None:
    """q is 64 x 64, v 32 x 64: two heads of 16 share it."""
    with pytest.raises(ModelError, match=r"rank 33 is above the rank of 'v_proj'") as caught:
        build(study(system, slm_folder("llama"), rank=33), DIMS, device=CPU)
    assert caught.value.cure == "choose at most 32"
    build(study(system, slm_folder("llama"), rank=32), DIMS, device=CPU)
    with pytest.raises(ModelError, match=r"rank 1000000000 is above the rank of 'q_proj'"):
        build(study(system, slm_folder("llama"), rank=10**9), DIMS, device=CPU)


def test_a_family_with_fused_matrices_says_what_it_has(slm_folder: Folder) -> None:
    """The default targets, q_proj and v_proj, are one matrix in Phi-3."""
    with pytest.raises(ModelError, match="no matrix 'q_proj'") as caught:
        build(study("uni-mlm", slm_folder("phi3")), DIMS, device=CPU)
    assert "qkv_proj" in caught.value.cure


def test_lora_without_any_target_is_refused(slm_folder: Folder) -> None:
    with pytest.raises(ModelError, match=r"targets is empty[\s\S]*q_proj"):
        build(study("uni-mlm", slm_folder("llama"), targets=[]), DIMS, device=CPU)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, r"model\.lora\.rank: Input should be greater than or equal to 1 .*0"),
        ({"rank": -3}, r"model\.lora\.rank: Input should be greater than or equal to 1"),
        ({"rank": 2.5}, r"model\.lora\.rank: Input should be a valid integer"),
        ({"alpha": 0}, r"model\.lora\.alpha: Input should be greater than or equal to 1"),
        ({"use_dora": True}, r"model\.lora\.use_dora: unknown key"),
        ({"dropout": 0.1}, r"model\.lora\.dropout: unknown key"),
    ],
)
def test_what_a_study_may_not_ask_of_lora_is_named(
    slm_folder: Folder, lora: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        study("uni-mlm", slm_folder("llama"), **lora)

"""A language model's files tell what it is, before anything loads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from client.site.model.files import locate, require
from common.errors import ModelError
from common.study import Lora


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ("q_proj", "v_proj")), ("phi3", ("qkv_proj", "o_proj"))]
)
def test_sizes_are_those_of_the_loaded_model(slm_folder, family: str, targets) -> None:
    files = locate(str(slm_folder(family)), None)
    assert files is not None
    model = AutoModelForCausalLM.from_pretrained(files.folder)
    assert files.hidden_size == model.config.hidden_size
    assert files.parameters == sum(p.numel() for p in model.parameters())
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=list(targets)))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert files.lora_parameters(Lora(rank=3, targets=targets)) == trainable


def test_a_target_that_the_model_lacks_is_named_with_those_it_has() -> None:
    nano = locate("nano", None)
    assert nano is not None
    with pytest.raises(ModelError, match=r"no matrix 'qkv'[\s\S]*q_proj"):
        nano.lora_parameters(Lora(rank=2, targets=("qkv",)))


def test_a_rank_above_that_of_the_matrix_is_refused(slm_folder) -> None:
    files = locate(str(slm_folder("llama")), None)
    assert files is not None
    with pytest.raises(ModelError, match=r"rank 33 is above the rank of 'v_proj'[\s\S]*most 32"):
        files.lora_parameters(Lora(rank=33))
    assert files.lora_parameters(Lora(rank=32)) == 2 * 32 * (64 + 64 + 64 + 32)


def test_folders_that_are_no_language_model(slm_folder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json[\s\S]*cure: "):
        locate(str(tmp_path / "nowhere"), None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        locate(str(tmp_path), None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match=r"family 'gpt2'[\s\S]*llama"):
        locate(str(tmp_path), None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"no \.safetensors file[\s\S]*save_pretrained"):
        require(str(tmp_path), None)
    broken = tmp_path / "broken"
    shutil.copytree(slm_folder("llama"), broken)
    (broken / "model.safetensors").write_bytes(b"1234")
    files = locate(str(broken), None)
    assert files is not None
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        _ = files.shapes


def test_a_model_of_the_hub_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("nobody/such-a-model", "0" * 40) is None
    with pytest.raises(ModelError, match=r"'nobody/such-a-model' cannot be had[\s\S]*cure: "):
        require("nobody/such-a-model", "0" * 40)


def test_looking_needs_no_torch() -> None:
    script = (
        "import sys; from client.site.model.files import locate; "
        "print(locate('nano', None).parameters, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.split() == ["1377408", "False"], shown.stderr

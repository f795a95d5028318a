"""Small random language models of every family, saved as a hospital would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
}
FAMILIES = {
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "phi3": ("Phi3", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="session")
def slm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder with config and safetensors."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            prefix, extra = FAMILIES[family]
            config = getattr(transformers, f"{prefix}Config")(**SMALL, **extra)
            torch.manual_seed(1)
            model = getattr(transformers, f"{prefix}ForCausalLM")(config)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return folder

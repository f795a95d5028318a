"""The frozen small language model (SLM), resident once per process.

Any causal model of the families in `files.FAMILIES` loads through transformers from the embedded
`nano`, a local folder, or a Hugging Face id at a pinned revision: safetensors only, no remote code.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from client.site.model.files import ADVICE, check_family, check_lora, is_folder, locate
from common.errors import ModelError
from common.study import EMBEDDED_SLMS, Model


@dataclass(frozen=True)
class Slm:
    """A frozen causal language model.

    Attributes:
        causal: The transformers model; every parameter has `requires_grad=False`, dropout is 0.
        name: As the study names it.
        sha256: Over configuration and weights; two sites with the same value run the same model.
    """

    causal: PreTrainedModel
    name: str
    revision: str | None
    sha256: str

    @property
    def hidden_size(self) -> int:
        """Width H of a token."""
        return int(self.causal.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of vocabulary entries V."""
        return int(self.causal.config.vocab_size)

    def tokens(self, ids: Tensor) -> Tensor:
        """Input embeddings of vocabulary entries: `[n] -> [n, H]` in float32.

        Called through the embedding module, because some families scale inside it.
        """
        with torch.no_grad():
            return self.causal.get_input_embeddings()(ids.to(self.causal.device)).float()

    def describe(self) -> dict[str, Any]:
        """What report and model card say about it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "family": self.causal.config.model_type,
            "hidden_size": self.hidden_size,
            "layers": int(self.causal.config.num_hidden_layers),
            "parameters": sum(p.numel() for p in self.causal.parameters()),
            "embedded": self.name in EMBEDDED_SLMS,
        }


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=4)
def _resident(name: str, revision: str | None, device: str) -> Slm:
    return _load(name, revision, device)


def _load(name: str, revision: str | None, device: str) -> Slm:
    files = locate(name, revision)
    where = str(files.folder) if files and is_folder(name) else name
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision and not is_folder(name):
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(where, **options)
        check_family(name, config.model_type)
        for key in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        causal = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype, use_safetensors=True, **options
        )
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"slm '{name}' cannot be loaded: {str(error).splitlines()[0]}",
            cure=ADVICE,
        ) from None
    causal.requires_grad_(False)
    causal.eval().to(device)
    return Slm(causal, name, revision, _fingerprint(causal))


def load_slm(model: Model, *, device: torch.device | None = None) -> Slm:
    """Loads the study's SLM, or returns the resident one.

    LoRA is injected into the blocks, so a model with LoRA gets a copy of its own.

    Raises:
        ModelError: No such model, another family, no safetensors, or LoRA that does not fit its
            blocks (`check_lora`).
    """
    load = _resident if model.lora is None else _load
    slm = load(model.slm, model.revision, str(device or default_device()))
    if model.lora is not None:
        blocks: nn.Module = slm.causal.get_decoder().layers
        linear = {n: part for n, part in blocks.named_modules() if isinstance(part, nn.Linear)}
        sides = {n.rpartition(".")[2]: min(part.weight.shape) for n, part in linear.items()}
        check_lora(slm.name, model.lora, sides)
    return slm


def _fingerprint(causal: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(causal.state_dict().items()):
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

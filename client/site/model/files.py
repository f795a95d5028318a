"""A language model's files on this machine: found and checked without loading torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.errors import ModelError
from common.study import EMBEDDED_SLMS, Lora

FAMILIES = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")
NANO = Path(__file__).parent / "nano"
ADVICE = (
    "check folder or id and revision; without internet, download it beforehand with "
    "`hf download` and set HF_HUB_OFFLINE=1"
)


def is_folder(name: str) -> bool:
    """Whether a study's `slm` names files, and not a model of the Hugging Face hub."""
    return name in EMBEDDED_SLMS or name.startswith((".", "/", "~"))


def check_family(name: str, family: str) -> None:
    """Raises `ModelError` for an architecture that no test covers."""
    if family not in FAMILIES:
        raise ModelError(
            f"slm '{name}' is of family '{family}'", cure=f"choose one of: {', '.join(FAMILIES)}"
        )


@dataclass(frozen=True)
class SlmFiles:
    """A folder with configuration and safetensors.

    Attributes:
        config: Content of config.json.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return int(self.config["hidden_size"])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array, from the files' headers.

        Raises:
            ModelError: A file is damaged.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as file:
                    for key in file.keys():  # noqa: SIM118 - not iterable itself
                        found[key] = tuple(file.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}", cure="copy it again") from None
        return found

    @property
    def parameters(self) -> int:
        """How many the model has, frozen ones and all."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def lora_parameters(self, lora: Lora) -> int:
        """Number of trainable ones that LoRA adds.

        Raises:
            ModelError: As `check_lora`.
        """
        matrices: dict[str, list[tuple[int, ...]]] = {}  # module name -> shape in each layer
        for key, shape in self.shapes.items():
            if key.endswith(".weight") and ".layers." in key and len(shape) == 2:
                module = key.removesuffix(".weight").rpartition(".")[2]
                matrices.setdefault(module, []).append(shape)
        check_lora(self.name, lora, {name: min(map(min, of)) for name, of in matrices.items()})
        return lora.rank * sum(sum(map(sum, matrices[target])) for target in lora.targets)


def check_lora(slm: str, lora: Lora, matrices: Mapping[str, int]) -> None:
    """Makes sure that LoRA has something to adapt, and all that it names: peft passes over names
    that it does not find as long as it finds one. A rank above a matrix's own adds nothing.

    Args:
        matrices: Linear layers in the blocks of the SLM, and the smaller side of each.

    Raises:
        ModelError: No target, one that is no matrix of this model, or too high a rank.
    """
    cure = f"model.lora.targets may name {', '.join(sorted(matrices))}"
    if not lora.targets:
        raise ModelError("model.lora.targets is empty", cure=cure)
    for target in lora.targets:
        if target not in matrices:
            raise ModelError(f"slm '{slm}' has no matrix '{target}' for LoRA", cure=cure)
        if lora.rank > matrices[target]:
            raise ModelError(
                f"model.lora.rank {lora.rank} is above the rank of '{target}' of slm '{slm}'",
                cure=f"choose at most {matrices[target]}",
            )


def locate(name: str, revision: str | None) -> SlmFiles | None:
    """The files of a study's SLM; None where a model of the hub is not on this machine.

    Raises:
        ModelError: A folder that is none, holds no safetensors, or is of an unknown family.
    """
    if not is_folder(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else None
        if folder is None or not any(folder.glob("*.safetensors")):
            return None
    else:
        folder = NANO if name in EMBEDDED_SLMS else Path(name).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise ModelError(
            f"slm folder {folder} has no config.json",
            cure="give a folder written by save_pretrained",
        ) from None
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}") from None
    check_family(name, str(config.get("model_type")))
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"slm folder {folder} has no .safetensors file",
            cure="convert the weights: save_pretrained(folder, safe_serialization=True); "
            "pickled weights (.bin) are never loaded",
        )
    return SlmFiles(name, folder, config)


def require(name: str, revision: str | None) -> None:
    """Makes sure that the SLM can be had, before anything long begins. Of a model of the hub that
    is not here, only the configuration is fetched.

    Raises:
        ModelError: As `locate`, or the hub has no such model, or cannot be reached.
    """
    if locate(name, revision) is not None:
        return
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # of the network, of the hub's answers, of the file system
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"slm '{name}' cannot be had: {told}", cure=ADVICE) from None
    check_family(name, str(json.loads(Path(path).read_text()).get("model_type")))

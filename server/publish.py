"""The trained adapter, as others can load it: safetensors, PEFT layout, model card."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from common.files import write_atomically
from common.study import Study
from server.card import LEDGERS, card, ledgers_text
from server.report import Report

PROJECTORS, LORA = "projectors.safetensors", "adapter_model.safetensors"
_SLM = "slm."  # parameters inside the language model, as the sites name them
_PEFT = ".default."  # peft's name of the one active adapter; left out in files


def write(
    out: str | Path,
    study: Study,
    arrays: Mapping[str, NDArray[Any]],
    spec: Mapping[str, Any],
    report: Report,
) -> Path:
    """Writes `OUT/adapter/`, replacing an earlier one; a reader sees the old folder or the new.

    Files: `projectors.safetensors` (all arrays outside the language model, under the names that a
    site gives them), `fedward.json`, `study.toml`, `README.md`; with LoRA also
    `adapter_model.safetensors` and `adapter_config.json`, which
    `PeftModel.from_pretrained(base, OUT/adapter)` loads.

    Args:
        arrays: The adapter.
        spec: What a site says of it: `slm`, `designated`, `logits`, `dims`, `lora` and
            `trainable_parameters`.

    Returns:
        `OUT/adapter`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    final = out / "adapter"
    partial = out / f".adapter-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        lora = {name: array for name, array in arrays.items() if name.startswith(_SLM)}
        rest = {name: array for name, array in arrays.items() if name not in lora}
        files = {
            PROJECTORS: _safetensors(rest, {"study": study.hash}),
            "fedward.json": _json(_describe(study, rest, spec, bool(lora))),
            "study.toml": study.to_toml().encode(),
            "README.md": card(study, spec, report).encode(),
        }
        if lora:
            files[LORA] = _safetensors(
                {_peft_name(name): array for name, array in lora.items()}, {"format": "pt"}
            )
            files["adapter_config.json"] = _json(_peft_config(spec))
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def attribute(out: str | Path, lines: Sequence[str]) -> None:
    """Adds origin and licence of the data to the model card in `OUT/adapter/`. A coordinator does
    not know them; the launcher of a simulation, or a person, does."""
    if lines:
        _last_section(out, "Data", "".join(f"- {line}\n" for line in lines))


def add_ledgers(out: str | Path, report: Report) -> None:
    """Adds to the model card in `OUT/adapter/` what a simulation's ledgers add up to."""
    if report.simulation_ledgers:
        _last_section(out, LEDGERS, ledgers_text(report))


def _last_section(out: str | Path, title: str, text: str) -> None:
    """Writes a section at the end of the card, in place of an earlier one of that title."""
    path = Path(out) / "adapter" / "README.md"
    before = path.read_text().partition(f"\n## {title}\n")[0]
    write_atomically(path, f"{before}\n## {title}\n\n{text}", mode=0o644)


def _describe(
    study: Study, rest: Mapping[str, NDArray[Any]], spec: Mapping[str, Any], lora: bool
) -> dict[str, Any]:
    """How the arrays belong together; enough to rebuild the model beside `study.toml`."""
    return {
        "format": 1,
        "study": {"name": study.name, "hash": study.hash},
        "system": study.model.system,
        "slm": spec["slm"],
        "seed": study.seed,
        "designated": dict(zip(study.tasks, spec["designated"], strict=False)),
        "tasks": {
            name: {"prevalence": task.prevalence, "description": task.description}
            for name, task in study.tasks.items()
        },
        # In token order.
        "sources": [
            {
                "name": name,
                "modality": source.modality,
                "encoder": source.encoder,
                "revision": source.revision,
                "pooling": source.pooling,
                "dim": spec["dims"][name],
            }
            for name, source in study.sources.items()
        ],
        "logits": spec["logits"],
        "arrays": {name: list(array.shape) for name, array in sorted(rest.items())},
        "lora": lora,
        "trainable_parameters": spec["trainable_parameters"],
    }


def _peft_name(name: str) -> str:
    """`slm.base_model.model.….lora_A.default.weight` -> `base_model.model.….lora_A.weight`."""
    return name.removeprefix(_SLM).replace(_PEFT, ".")


def site_name(file: str, name: str) -> str:
    """What a site calls the array `name` of a published file."""
    if file != LORA:
        return name
    stem, _, leaf = name.rpartition(".")
    return f"{_SLM}{stem}{_PEFT}{leaf}"


def _peft_config(spec: Mapping[str, Any]) -> dict[str, Any]:
    slm = spec["slm"]
    return {
        **spec["lora"],
        "inference_mode": True,
        "base_model_name_or_path": slm["name"],
        "revision": slm.get("revision"),
    }


def _replace(partial: Path, final: Path) -> None:
    """Renames into place; a folder cannot be replaced in one step, so the old one steps aside."""
    aside = final.with_name(f".adapter-old-{secrets.token_hex(4)}")
    if final.exists():
        os.rename(final, aside)
    os.rename(partial, final)
    shutil.rmtree(aside, ignore_errors=True)


def _safetensors(arrays: Mapping[str, NDArray[Any]], about: dict[str, str]) -> bytes:
    return save({n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}, metadata=about)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()

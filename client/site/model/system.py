"""From a study to the model that its adapter belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.site.model.fusion import adacomed, llama_fusion, m_llm
from client.site.model.fusion.base import RiskModel
from client.site.model.fusion.linear_start import LinearStart
from client.site.model.fusion.uni_mlm import UniMlm
from client.site.model.slm import Slm, load_slm
from common.errors import ModelError
from common.study import Study
from common.systems import SYSTEMS

# (study, width of each source's embedding, the language model where the system has one) -> model
Builder = Callable[[Study, Mapping[str, int], Slm | None], RiskModel]


def _uni_mlm(study: Study, dims: Mapping[str, int], slm: Slm | None) -> RiskModel:
    assert slm is not None
    return UniMlm(slm, study.model, dims, len(study.tasks), seed=study.seed)


BUILDERS: Mapping[str, Builder] = {
    "uni-mlm": _uni_mlm,
    "adacomed": adacomed.build,
    "llama-fusion": llama_fusion.build,
    "m-llm": m_llm.build,
}
"""How each system of `common.systems.SYSTEMS` is built; trainer, evaluation, publishing and daemon
know none by name."""


def build(
    study: Study, dims: Mapping[str, int], *, device: torch.device | None = None
) -> RiskModel:
    """The model of a study, with the adapter that the study's seed gives.

    Args:
        dims: Width of each source's embedding, in the study's order.

    Returns:
        A module `(inputs, present) -> Prediction` whose trainable parameters are the adapter.

    Raises:
        ModelError: The SLM cannot be loaded.
    """
    name = study.model.system
    slm = load_slm(study.model, device=device) if SYSTEMS[name].has_slm else None
    model = BUILDERS[name](study, {source: dims[source] for source in study.sources}, slm)
    if study.model.linear_start is not None:
        heard = {source: d for source, d in model.dims.items() if source not in model.deaf_to}
        start = LinearStart(study.model.linear_start, heard, seed=study.seed)
        # Before it is fitted: what the model says may stand beside public records, read by it too.
        model.linear_start = start.to(next(model.parameters()).device)
        start.fit(model)
    return model if device is None else model.to(device)


def adapter_state(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """A copy of everything trainable, by parameter name."""
    return {
        name: p.detach().float().cpu().numpy().copy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def load_adapter(model: nn.Module, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copies an adapter into the model, in place.

    Raises:
        ModelError: A name, shape or type differs, or a value is not finite; nothing was copied.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != arrays.keys():
        missing, extra = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
        raise ModelError(f"adapter does not fit: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, parameter in own.items():
        array = arrays[name]
        if array.shape != tuple(parameter.shape) or array.dtype != np.float32:
            raise ModelError(
                f"adapter part '{name}' is {array.dtype}{array.shape}, "
                f"the model's is float32{tuple(parameter.shape)}"
            )
        if not np.isfinite(array).all():
            raise ModelError(f"adapter part '{name}' holds values that are not finite")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))


def adapter_spec(model: RiskModel) -> dict[str, Any]:
    """What coordinator, report and publication need to know of the adapter."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    lora: Any = getattr(model.slm, "peft_config", None)
    return {
        "trainable_parameters": sum(p.numel() for p in trainable),
        "bytes": sum(4 * p.numel() for p in trainable),
        "slm": dict(model.slm_description),
        "designated": list(model.designated),
        "logits": model.logits,
        "dims": dict(model.dims),
        "lora": _plain(lora["default"].to_dict()) if lora else None,
    }


def _plain(value: Any) -> Any:
    """JSON-ready copy of a peft configuration."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)

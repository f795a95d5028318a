"""The one place of a process where models live and computing happens, one site at a time.

All hospitals of a daemon share it, and with it one resident SLM. The lock makes the models safe to
share and keeps two sites from fighting over processor and memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from client.site.model.fusion.base import RiskModel
from client.site.model.slm import default_device
from client.site.model.system import adapter_spec, adapter_state, build, load_adapter
from common.errors import ModelError, Refusal
from common.messages import Arrays
from common.study import Study

_RESIDENT = 4  # models kept; each is an adapter beside the shared SLM


@dataclass(frozen=True)
class Resident:
    """A study's model, as every site uses it in turn.

    Attributes:
        initial: The adapter that the study's seed gives.
        spec: See `client.site.model.system.adapter_spec`.
    """

    model: RiskModel
    initial: Arrays
    spec: dict[str, Any]

    def load(self, arrays: Arrays) -> None:
        """Puts a received adapter in.

        Raises:
            Refusal: `adapter-invalid`.
        """
        try:
            load_adapter(self.model, arrays)
        except ModelError as error:
            raise Refusal("adapter-invalid", str(error)) from None

    def adapter(self) -> Arrays:
        """A copy of all trainable arrays, fp32."""
        return dict(adapter_state(self.model))


class Bench:
    """Models by study, and the lock under which they may be used.

    Attributes:
        lock: Held by whoever computes.
        device: Where the models are.
    """

    def __init__(self, device: str | None = None, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device) if device else default_device()
        self.lock = threading.RLock()
        self._models: OrderedDict[str, Resident] = OrderedDict()

    def resident(self, study: Study, dims: Mapping[str, int]) -> Resident:
        """The model of a study, built on first use. Call it under the lock.

        Args:
            dims: Width of each source's embedding: a property of the encoders, hence public.
        """
        key = f"{study.hash} {sorted(dims.items())}"
        if key not in self._models:
            model = build(study, dims, device=self.device)
            model.to(self.device).eval()
            self._models[key] = Resident(model, dict(adapter_state(model)), adapter_spec(model))
        self._models.move_to_end(key)
        while len(self._models) > _RESIDENT:
            self._models.popitem(last=False)
        return self._models[key]

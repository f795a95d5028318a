"""Virtual hospitals on one machine.

    from simulations import simulate, synthetic_hospitals
    report = simulate("demo", synthetic_hospitals("out/cohort", 4), "out", epsilon=8)

The names are imported when first used: the Flower bundle holds only this file and `studies`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulations.cohort.shards import synthetic_hospitals
    from simulations.run import find_shards, simulate

__all__ = ["find_shards", "simulate", "synthetic_hospitals"]

_HOMES = {
    "find_shards": "simulations.run",
    "simulate": "simulations.run",
    "synthetic_hospitals": "simulations.cohort.shards",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'simulations' has no attribute '{name}'")

"""The rooms of the house: who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("common", "server", "client", "simulations", "deploy")
HEAVY = {"torch", "transformers", "opacus", "peft", "torchxrayvision", "torchvision"}
FLOWER_ALLOWED = {
    "common/envelope.py",
    "server/app.py",
    "server/federation.py",
    "deploy/site/gate.py",  # reads the bundle out of Flower's message
    "deploy/coordinator/superlink.py",
    "deploy/site/clientapp.py",
    "simulations/bundle.py",  # packs it as Flower does, to know its hash
    "simulations/inline.py",  # Flower's messages without its transport
    "simulations/launcher.py",
    "simulations/baselines/fed_xgb.py",  # a baseline that is Flower's own: its tree bagging
}
# shard -> encoders -> model -> training -> evaluation -> daemon: a later room knows earlier ones.
SITE_ORDER = ("shard", "encoders", "model", "training", "evaluation", "daemon")


def modules() -> list[Path]:
    return sorted(p for room in ROOMS for p in (REPOSITORY / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_module_knows_only_whom_it_may(path: Path) -> None:
    here = str(path.relative_to(REPOSITORY))
    names, top = imported(path), tops(path)
    own = {room for room in ROOMS if room in top}
    if here.startswith("common/"):
        assert own <= {"common"}
    elif here.startswith("server/"):
        assert own <= {"common", "server"}
    elif here.startswith("client/"):
        side = "client.relay" if here.startswith("client/relay/") else "client.site"
        assert own <= {"common", "client"}
        known = {n for n in names if n.startswith("client.")}
        assert all(n.startswith(side) for n in known), known
    if here.startswith(("common/", "server/", "client/relay/")):
        assert not top & HEAVY
    if "flwr" in top:
        assert here in FLOWER_ALLOWED or here.startswith("client/relay/")


@pytest.mark.parametrize("index", range(len(SITE_ORDER)))
def test_inside_a_site_the_data_goes_one_way(index: int) -> None:
    later = {f"client.site.{room}" for room in SITE_ORDER[index + 1 :]}
    for path in (REPOSITORY / "client" / "site" / SITE_ORDER[index]).rglob("*.py"):
        wrong = {n for n in imported(path) if any(n == r or n.startswith(r + ".") for r in later)}
        assert not wrong, f"{path.relative_to(REPOSITORY)} imports {wrong}"

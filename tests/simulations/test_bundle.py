"""What Flower ships: the coordinator and the relay, nothing of a site."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk, build_fab_from_files

from simulations.bundle import APP, INCLUDED, ROOT, assemble

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def names(fab: bytes) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        return {n for n in archive.namelist() if not n.startswith(".info")}


def test_the_bundle_holds_no_site(tmp_path: Path) -> None:
    held = names(build_fab_from_disk(assemble(tmp_path / "app")))
    assert {
        "server/app.py",
        "client/relay/app.py",
        "common/study.py",
        "client/__init__.py",
        "simulations/studies/demo.toml",
        "pyproject.toml",
    } <= held
    allowed = ("server/", "common/", "client/relay/", "simulations/studies/")
    others = {n for n in held if not n.startswith(allowed)}
    assert others == {"pyproject.toml", "client/__init__.py", "simulations/__init__.py"}


def test_flwr_run_on_the_checkout_ships_the_same(tmp_path: Path) -> None:
    files: dict[str, Path] = {"pyproject.toml": REPOSITORY / "pyproject.toml"}
    for room in ("client", "common", "deploy", "server", "simulations"):
        for path in (REPOSITORY / room).rglob("*"):
            if path.suffix in (".py", ".toml", ".md", ".json"):
                files[path.relative_to(REPOSITORY).as_posix()] = path
    shipped = names(build_fab_from_files(files)[0])
    assert shipped == names(build_fab_from_disk(assemble(tmp_path / "app")))


def test_pyproject_says_the_same() -> None:
    tool = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]
    assert tool["app"] == APP
    assert tool["app"]["fab-include"] == list(INCLUDED)
    assert "federations" not in tool  # Flower would rewrite the file
    assert ROOT == REPOSITORY

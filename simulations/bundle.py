"""The Flower app of this installation: coordinator, relay and what they share, nothing of a site.

`flwr run` walks the whole folder that it is given, an environment with tens of thousands of files
included, and an installed wheel has no pyproject.toml. So the launcher gives it a folder that holds
the bundle and nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parent.parent

INCLUDED = (
    "server/**/*.py",
    "common/**/*.py",
    "client/__init__.py",
    "client/relay/**/*.py",
    "simulations/__init__.py",
    "simulations/studies/__init__.py",
    "simulations/studies/*.toml",
)
"""Same as `fab-include` in pyproject.toml, which a bare `flwr run .` follows (tested)."""

APP: dict[str, Any] = {
    "publisher": "fedward",
    "fab-include": list(INCLUDED),
    "components": {"serverapp": "server.app:app", "clientapp": "client.relay.app:app"},
    "config": {
        "study": "demo",
        "start": "",
        "out-dir": "",
        "run-id": "",
        "resume": False,
        "coordinator-key": "",
    },
}
"""The section [tool.flwr.app] of pyproject.toml (tested to be equal)."""


def assemble(folder: Path) -> Path:
    """Copies the bundle's files and writes their pyproject.toml; returns `folder`."""
    for pattern in INCLUDED:
        for source in ROOT.glob(pattern):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    project = {
        "project": {"name": "fedward", "version": version("fedward"), "license": "Apache-2.0"},
        "tool": {"flwr": {"app": APP}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project))
    return folder


def packed() -> bytes:
    """The bundle as Flower ships it."""
    with tempfile.TemporaryDirectory() as folder:
        return bytes(build_fab_from_disk(assemble(Path(folder))))


def sha256() -> str:
    """Hash of the packed bundle, hex: the same wherever the same version is installed."""
    return hashlib.sha256(packed()).hexdigest()

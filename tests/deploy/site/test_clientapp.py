"""Flower's command for a message, without the SuperNode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from deploy.site import clientapp
from simulations.flower import environment, program

PROBE = """
import sys
from deploy.site import clientapp
sys.argv = ["flwr-clientapp", "--help"]
try:
    clientapp.main()
except SystemExit:
    pass
heavy = {"flwr.supernode.cli.flower_supernode", "sqlalchemy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def answer(command: str, path: str, home: Path) -> str:
    env = {**environment(home), "PATH": path, "COLUMNS": "80"}
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env=env, check=True)
    return done.stdout


def test_it_is_flowers_own_command(tmp_path: Path) -> None:
    folder = clientapp.provide(tmp_path / "bin")
    ours = answer(clientapp.NAME, str(folder), tmp_path)
    assert "Run a Flower ClientApp" in ours
    assert ours == answer(program(clientapp.NAME), os.defpath, tmp_path)
    assert clientapp.provide(folder) == folder, "a relay starts more than once"


def test_nothing_of_the_supernode_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_it_may_not_be_executed_flowers_own_is_found(tmp_path: Path) -> None:
    folder = clientapp.provide(tmp_path / "bin")
    (folder / clientapp.NAME).chmod(0o600)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}"
    assert "Run a Flower ClientApp" in answer(clientapp.NAME, path, tmp_path)

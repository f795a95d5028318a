"""`fedward site`: what an operator sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.site.daemon.cli import app
from client.site.daemon.service import Daemon
from common.errors import FedwardError

WIDE = {"COLUMNS": "200"}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=WIDE, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_metrics_ledger_key_and_status(ward_module: Any, tmp_path: Path) -> None:
    study = ward_module.make_study()
    world = ward_module.Ward(tmp_path)
    state = tmp_path / "sites" / "a"
    with pytest.raises(FedwardError, match="no exact metrics"):
        run("metrics", state)
    initial = world.prepared(study)
    world.ask(world.request("train", study, 1), initial)
    world.ask(world.request("evaluate", study, 1), initial)

    shown = run("metrics", state)
    assert "death" in shown
    assert "must stay in this hospital" in shown
    assert run("key", state).strip() == world.hospitals["a"].identity.public
    shown = run("ledger", state, "--delta", 1e-3)
    epsilon = world.hospitals["a"].ledger.book.epsilon(1e-3)
    assert f"{epsilon['train']:.3f}" in shown
    assert "chain whole" in shown
    assert world.hospitals["a"].ledger.book.head in shown

    with pytest.raises(FedwardError, match="no daemon answers"):
        run("status", world.config.socket)
    world.daemon._lock.release()
    with Daemon(world.config):
        assert "idle" in run("status", world.config.socket)
    with pytest.raises(FedwardError, match="no ledger"):
        run("ledger", tmp_path)


def test_a_key_can_be_made_before_the_first_start(ward_module: Any, tmp_path: Path) -> None:
    public = run("key", tmp_path / "sites" / "a").strip()
    assert ward_module.Ward(tmp_path).hospitals["a"].identity.public == public

"""The hospital's own things against real faults: a real ledger, real permissions."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site.daemon.config import DaemonConfig
from client.site.daemon.service import Daemon
from client.site.encoders.vault import Item, Vault
from common.identity import Identity
from common.privacy.ledger import Ledger
from common.roster import Roster
from deploy.site import setup
from deploy.site.doctor.visit import Finding
from deploy.site.layout import SiteFolder
from tests.deploy.site.doctor.looking import look, one


def test_what_other_users_can_read(site: SiteFolder) -> None:
    for path in (site.state, site.state / "site.key", site.state / "vault" / "vault.key"):
        before = path.stat().st_mode
        path.chmod(before | 0o040)
        finding = one(site, "permissions")
        assert finding.verdict == "fail"
        assert str(path) in finding.text
        path.chmod(before)
    site.relay.key.chmod(0o604)
    assert one(site, "permissions").cure == f"chmod 600 {site.relay.key}"
    site.relay.key.chmod(0o600)
    finding = one(site, "permissions")  # in these tests one user owns all
    assert finding.verdict == "warn"
    if os.geteuid() == 0:
        os.chown(site.relay.root, 65534, 65534)
        assert one(site, "permissions").verdict == "pass"
        os.chown(site.state / "site.key", 65534, 65534)
        assert "belongs to another user" in one(site, "permissions").text


def test_what_other_users_can_write(site: SiteFolder) -> None:
    """Who writes policy.toml may name themselves an approver."""
    for path in (site.root, site.policy_file, site.config_file):
        before = path.stat().st_mode
        path.chmod(before | 0o020)
        finding = one(site, "permissions")
        assert (finding.verdict, str(path) in finding.text) == ("fail", True)
        path.chmod(before)
    if os.geteuid() == 0:
        os.chown(site.policy_file, 65534, 65534)
        assert str(site.policy_file) in one(site, "permissions").text


def test_a_state_or_socket_that_lies_elsewhere(site: SiteFolder) -> None:
    usual = site.config_file.read_text()
    site.config_file.write_text(usual.replace('state = "state"', 'state = "elsewhere"'))
    assert "keeps its state outside" in one(site, "configuration").text
    site.config_file.write_text(usual.replace("run/daemon.sock", "run/other.sock"))
    finding = look(site, "configuration", "relay")["relay"]
    assert finding.verdict == "fail"
    assert "run/other.sock" in finding.text


@pytest.mark.skipif(os.geteuid() != 0, reason="one user owns all")
def test_a_shard_that_the_relays_user_may_enter(
    make_site: Callable[..., SiteFolder], shard: Path
) -> None:
    site, before = make_site(), shard.stat().st_mode
    os.chown(site.relay.root, 65534, 65534)
    try:
        shard.chmod(0o755)
        assert one(site, "shard").verdict == "warn"
        shard.chmod(0o750)
        assert one(site, "shard").verdict == "pass"
    finally:
        shard.chmod(before)


def test_the_shard_names_table_and_column(
    make_site: Callable[..., SiteFolder], tmp_path: Path, shard: Path
) -> None:
    import polars as pl

    site, copy = make_site(), tmp_path / "copy"
    assert one(site, "shard").verdict == "pass"
    copy.mkdir()
    for path in shard.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    pl.read_parquet(copy / "records.parquet").drop("cutoff_hours").write_parquet(
        copy / "records.parquet"
    )
    config = site.config_file
    config.write_text(config.read_text().replace(str(shard), str(copy)))
    finding = one(site, "shard")
    assert finding.verdict == "fail"
    assert "records.parquet" in finding.text
    assert "cutoff_hours" in finding.text


def test_the_policy(site: SiteFolder, coordinator: Any) -> None:
    text = site.policy_file.read_text()
    assert "nobody may approve" in one(site, "policy").text
    site.policy_file.write_text(text + f'dr-weber = "{"1" * 64}"\n')
    assert one(site, "policy").verdict == "pass"
    site.policy_file.write_text(text.replace(coordinator.identity.public, "2" * 64))
    assert "does not hear the coordinator" in one(site, "policy").text
    site.policy_file.write_text(text.replace("[lifetime.train]", "[lifetimes.train]"))
    found = look(site, "policy", "shard")
    assert "lifetimes" in found["policy"].text
    assert found["configuration"].verdict == "fail"
    assert found["shard"].verdict == "skip"
    site.policy_file.write_text(f'coordinators = ["{coordinator.identity.public}"]')
    assert "no lifetime" in one(site, "policy").text


def test_the_ledger(site: SiteFolder) -> None:
    assert "not begun" in one(site, "ledger").text
    path, key = site.state / "ledger.jsonl", Identity.open(site.state / "site.key")
    ledger = Ledger.open(path, "north", key)
    ledger.give_receipt("a board")
    old = path.read_bytes()
    ledger.give_receipt("another board")
    newest = path.read_bytes()
    assert one(site, "ledger").verdict == "pass"
    path.write_bytes(old)
    finding = one(site, "ledger")
    assert finding.verdict == "fail"
    assert "lacks line 3" in finding.text
    path.write_bytes(newest.replace(b"board", b"BOARD"))
    assert "line 2" in one(site, "ledger").text
    path.unlink()
    assert "is gone" in one(site, "ledger").text
    path.write_bytes(newest)
    (site.state / "site.key").unlink()
    Identity.open(site.state / "site.key")
    assert "another key" in one(site, "ledger").text


def test_the_vaults_key(site: SiteFolder) -> None:
    vault, key = site.state / "vault", site.state / "vault" / "vault.key"
    with Vault.open(vault) as opened:
        opened.write([(Item("e" * 64, "p", "i"), np.ones((1, 2), np.float32))])
    assert one(site, "vault").verdict == "pass"
    right = key.read_bytes()
    key.write_bytes(os.urandom(32))
    assert "does not belong" in one(site, "vault").text
    key.write_bytes(right[:-1])
    assert "not a vault key" in one(site, "vault").text
    key.unlink()
    assert "is lost" in one(site, "vault").text


def test_the_roster(site: SiteFolder, tmp_path: Path) -> None:
    assert one(site, "roster").verdict == "warn"
    north, south = Identity.open(site.state / "site.key"), Identity.open(tmp_path / "south.key")
    roster = Roster(name="t", sites={"north": north.public, "south": south.public})
    half = roster.signed("south", south)
    half.write(setup.roster_path(site))
    assert "not signed by north" in one(site, "roster").text
    half.signed("north", north).write(setup.roster_path(site))
    assert "site.toml does not name it" in look(site, "configuration", "roster")["roster"].text
    setup.sign_roster(site.root, half, tmp_path / "out.json")
    assert look(site, "configuration", "roster")["roster"].verdict == "pass"
    alone = Roster(name="t", sites={"south": south.public}).signed("south", south)
    alone.write(setup.roster_path(site))
    assert "does not list this site" in one(site, "roster").text


def test_the_daemon(site: SiteFolder) -> None:
    assert "no daemon listens" in one(site, "daemon").text
    config = DaemonConfig.load(site.config_file).model_copy(update={"device": "cpu", "threads": 1})
    with Daemon(config):
        assert one(site, "daemon") == Finding("daemon", "pass", "the daemon answers: idle")
        site.socket.chmod(0o666)
        assert "open to every user" in one(site, "daemon").text
        site.socket.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(site.relay.root, 65534, 65534)
            finding = one(site, "daemon")
            assert finding.verdict == "fail"
            assert "cannot use" in finding.text
            os.chown(site.relay.root, 0, 0)
    with socket.socket(socket.AF_UNIX) as dead:  # bound, and nobody behind it
        dead.bind(str(site.socket))
        site.socket.chmod(0o600)
        assert "no daemon answers" in one(site, "daemon", timeout=1.0).text

"""What a backup takes along, of one moment, and what it leaves behind."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import numpy as np
import pytest

from client.site.encoders.vault import Item, Vault
from common.errors import FedwardError
from deploy.site.archive import inspect
from deploy.site.backup import backup
from deploy.site.restore import restore
from tests.deploy.site.life import WORDS, Life


def test_answers_logs_and_exact_metrics_stay_behind(life: Life, tmp_path: Path) -> None:
    state = life.site.state
    (state / "exact").mkdir()
    for name in ("daemon.log", "status.json", "exact/release-1.json"):
        (state / name).write_text("about patients")
    contents = backup(life.site.root, tmp_path / "b", WORDS)
    assert not {name for name in contents.files if "log" in name or "exact" in name}
    assert list(contents.files)[:2] == ["state/ledger.jsonl", "state/ledger.head"]


def test_the_vault_comes_along_when_asked(life: Life, tmp_path: Path) -> None:
    item, value = Item("e" * 64, "p", "i"), np.ones((2, 3), np.float32)
    with Vault.open(life.site.state / "vault") as vault:
        vault.write([(item, value)])
        backup(life.site.root, tmp_path / "b", WORDS, with_vault=True)  # while it is in use
    restore(tmp_path / "b", tmp_path / "there", WORDS)
    with Vault.open(tmp_path / "there" / "state" / "vault") as vault:
        (found,) = vault.read([item])
    assert found is not None
    assert (found == value).all()
    assert sorted(p.name for p in (life.site.state / "vault").glob("*backup*")) == []


def test_a_backup_that_cannot_be_written_leaves_nothing(
    life: Life, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = archive.read_bytes()
    with pytest.raises(FedwardError, match="exists already"):
        backup(life.site.root, archive, WORDS)
    with pytest.raises(FedwardError, match="passphrase is empty"):
        backup(life.site.root, tmp_path / "b", "")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        backup(life.site.root, tmp_path / "b", WORDS)
    assert archive.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".b", "b"))]


def test_a_state_kept_elsewhere_is_not_half_backed_up(life: Life, tmp_path: Path) -> None:
    config = life.site.config_file
    config.write_text(config.read_text().replace('state = "state"', 'state = "elsewhere"'))
    with pytest.raises(FedwardError, match="keeps its state outside"):
        backup(life.site.root, tmp_path / "b", WORDS)


def test_a_link_of_the_relay_is_not_followed(life: Life, tmp_path: Path) -> None:
    """A restore would give the relay's user what the link names."""
    patients = tmp_path / "records.parquet"
    patients.write_text("patients")
    life.site.relay.authority.unlink()
    life.site.relay.authority.symlink_to(patients)
    with pytest.raises(FedwardError, match="is a link"):
        backup(life.site.root, tmp_path / "b", WORDS)
    assert not (tmp_path / "b").exists()


def test_ledger_and_head_are_of_one_moment(life: Life, tmp_path: Path) -> None:
    """While a writer holds the ledger, a backup waits."""
    with life.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            try:
                backup(life.site.root, tmp_path / "b", WORDS)
            finally:
                os._exit(0)
        time.sleep(2)  # it takes a fraction of that
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert not (tmp_path / "b").exists()
        fcntl.flock(file, fcntl.LOCK_UN)
    os.waitpid(child, 0)
    assert inspect(tmp_path / "b", WORDS).ledger == life.path.read_bytes()

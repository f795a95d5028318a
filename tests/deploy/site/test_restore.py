"""A restored site is the one that was backed up; never an older ledger over a newer one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from client.site.daemon.config import DaemonConfig
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.ledger import Ledger
from deploy.site import setup
from deploy.site.backup import backup
from deploy.site.evidence import receipts_of
from deploy.site.layout import SiteFolder
from deploy.site.restore import restore, restore_missing
from tests.deploy.site.life import WORDS, Life, everything


def test_what_was_backed_up_comes_back_byte_for_byte(
    life: Life, archive: Path, tmp_path: Path
) -> None:
    site, there = life.site, SiteFolder(tmp_path / "there")
    done = restore(archive, there.root, WORDS)
    assert (done.aside, done.lacking) == (None, None)
    before, after = everything(site.root), everything(there.root)
    left_out = {name for name in before if name.startswith("state/vault/")}
    assert before.keys() - after.keys() == left_out
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"relay/relay.toml", "state/paused"}
    assert there.relay.config().socket == there.socket
    for name in after.keys() & before.keys():
        assert (there.root / name).stat().st_mode == (site.root / name).stat().st_mode, name
    for folder in (there.state, there.relay.root, there.root):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert DaemonConfig.load(there.config_file).sites[0].state == there.state
    Life(there).go_on()


def test_a_folder_that_is_not_empty_is_left_alone(archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    restore(archive, other, WORDS)  # empty: fine
    shutil.rmtree(other)
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(FedwardError, match="is not empty"):
        restore(archive, other, WORDS)
    with pytest.raises(FedwardError, match="no site's folder"):
        restore(archive, other, WORDS, replace=True)
    assert everything(other) == {"file": b"mine"}


def test_an_older_ledger_never_replaces_a_newer_one(life: Life, archive: Path) -> None:
    life.go_on()
    before = everything(life.site.root)
    with pytest.raises(FedwardError, match="patients be spent twice"):
        restore(archive, life.site.root, WORDS, replace=True)
    assert everything(life.site.root) == before


def test_a_torn_end_does_not_make_a_ledger_old(life: Life, archive: Path) -> None:
    life.go_on()
    with life.path.open("ab") as file:
        file.write(b'{"half')
    with pytest.raises(FedwardError, match="patients be spent twice"):
        restore(archive, life.site.root, WORDS, replace=True)


def test_another_sites_ledger_is_not_replaced(
    archive: Path, make_site: Callable[..., SiteFolder]
) -> None:
    other = Life(make_site("other"))
    other.go_on(1)
    with pytest.raises(FedwardError, match="is another one"):
        restore(archive, other.site.root, WORDS, replace=True)


def test_a_running_daemon_is_not_replaced(life: Life, archive: Path) -> None:
    config = life.site.config_file
    usual, elsewhere = config.read_text(), life.site.root.parent / "daemon.sock"
    for socket in (life.site.socket, elsewhere):
        config.write_text(usual.replace('"run/daemon.sock"', f'"{socket}"'))
        with open(f"{socket}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(FedwardError, match="runs"):
                restore(archive, life.site.root, WORDS, replace=True)
    config.write_text(usual)
    assert restore(archive, life.site.root, WORDS, replace=True).lacking is None


def test_a_restored_site_is_paused_until_a_person_has_compared_it(
    life: Life, archive: Path, tmp_path: Path
) -> None:
    """An older ledger looks whole: only receipts that others keep can tell."""
    restore(archive, tmp_path / "there", WORDS)
    note = json.loads((tmp_path / "there" / "state" / "paused").read_text())
    assert "receipt" in note["reason"]
    setup.pause(life.site.root, "driver update")
    backup(life.site.root, tmp_path / "b", WORDS)
    restore(tmp_path / "b", tmp_path / "again", WORDS)
    note = json.loads((tmp_path / "again" / "state" / "paused").read_text())
    assert note["reason"] == "driver update"


def test_a_socket_that_lies_elsewhere_is_found_by_the_restored_relay(
    life: Life, tmp_path: Path
) -> None:
    config, elsewhere = life.site.config_file, tmp_path / "daemon.sock"
    config.write_text(config.read_text().replace('"run/daemon.sock"', f'"{elsewhere}"'))
    backup(life.site.root, tmp_path / "b", WORDS)
    restore(tmp_path / "b", tmp_path / "there", WORDS)
    assert SiteFolder(tmp_path / "there").relay.config().socket == elsewhere


def test_a_newer_archive_replaces_and_the_old_folder_is_kept(life: Life, tmp_path: Path) -> None:
    old = everything(life.site.root)
    life.go_on(2)
    backup(life.site.root, tmp_path / "b", WORDS)
    lines = life.lines
    for name, data in old.items():
        (life.site.root / name).write_bytes(data)
    done = restore(tmp_path / "b", life.site.root, WORDS, replace=True)
    assert life.lines == lines
    assert done.lacking is None
    assert done.aside is not None
    assert everything(done.aside) == old


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_what_the_lost_ledger_wrote_later_still_shows(life: Life, archive: Path, loss: str) -> None:
    """The newer head is kept, so that the daemon refuses to charge until it is reconciled."""
    kept = life.lines
    life.go_on(2)
    if loss == "gone":
        life.path.unlink()
    else:
        life.path.write_bytes(life.path.read_bytes().replace(b'"site"', b'"SITE"', 1))
    done = restore(archive, life.site.root, WORDS, replace=True)
    assert life.lines == kept
    assert done.lacking is not None
    assert done.lacking.lines == kept + 2
    ledger = Ledger.open(life.path, "north", Identity.open(life.site.state / "site.key"))
    assert ledger.behind is not None
    assert ledger.behind.lines == kept + 2


def test_receipts_that_others_showed_are_kept(life: Life, archive: Path, tmp_path: Path) -> None:
    """A receipt in ledger.receipts of the replaced folder is not lost with it."""
    twin = SiteFolder(tmp_path / "twin")
    shutil.copytree(life.site.root, twin.root)
    Life(twin).go_on(5)
    shown = (twin.state / "ledger.head").read_text()
    (life.site.state / "ledger.receipts").write_text(shown + "\n")
    done = restore(archive, life.site.root, WORDS, replace=True)
    assert done.lacking is not None
    assert done.lacking.lines == life.lines + 5


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("site.toml", b'socket = "~no-such-user/daemon.sock"'),
        ("site.toml", b"\xff"),
        ("state/ledger.receipts", b"\xff"),
        ("state/ledger.head", b"\xff"),
        ("relay/relay.toml", b"\xff"),
    ],
)
def test_whatever_is_damaged_is_replaced(
    life: Life, archive: Path, name: str, damage: bytes
) -> None:
    (life.site.root / name).write_bytes(damage)
    restore(archive, life.site.root, WORDS, replace=True)
    assert DaemonConfig.load(life.site.config_file).socket == life.site.relay.config().socket
    assert receipts_of(life.site.state)


def test_a_restore_that_fails_halfway_puts_the_folder_back(
    life: Life, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = everything(life.site.root), os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda a, b: rename(a, b) if Path(b) != life.site.root or "replaced" in str(a) else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        restore(archive, life.site.root, WORDS, replace=True)
    monkeypatch.undo()
    assert everything(life.site.root) == before
    assert [p.name for p in life.site.root.parent.glob(".site.*")] == []


def test_a_single_file_is_put_back_only_where_it_is_missing(life: Life, archive: Path) -> None:
    life.go_on()
    key, newer = life.site.state / "site.key", life.path.read_bytes()
    before = key.read_bytes()
    with pytest.raises(FedwardError, match="exists"):
        restore_missing(archive, life.site.root, WORDS, ("state/site.key",))
    with pytest.raises(FedwardError, match="has no file 'state/nothing'"):
        restore_missing(archive, life.site.root, WORDS, ("state/nothing",))
    key.unlink()
    restore_missing(archive, life.site.root, WORDS, ("state/site.key",))
    assert key.read_bytes() == before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert life.path.read_bytes() == newer
    assert not list(life.site.root.glob(".restore*"))

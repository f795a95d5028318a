"""Archives: everything or nothing, under the right passphrase only, and never an older ledger over
a newer one."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client.site.daemon.config import DaemonConfig
from client.site.encoders.vault import Item, Vault
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.book import Book
from common.privacy.ledger import Ledger
from deploy.site import backup as backups
from deploy.site import setup
from deploy.site.backup import Header, backup, inspect, receipts_of, restore, restore_missing
from deploy.site.layout import SiteFolder
from simulations import bundle

WORDS = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """The least cost of scrypt that is admitted."""
    field = Header.model_fields["cost"]
    usual, field.default = field.default, 2**14
    Header.model_rebuild(force=True)
    yield
    field.default = usual
    Header.model_rebuild(force=True)


class Life:
    """What a daemon does to a site's ledger."""

    def __init__(self, site: SiteFolder) -> None:
        self.site, self.path = site, site.state / "ledger.jsonl"

    def go_on(self, lines: int = 1) -> None:
        ledger = Ledger.open(self.path, "north", Identity.open(self.site.state / "site.key"))
        for n in range(lines):
            ledger.give_receipt(f"board {n}")

    @property
    def lines(self) -> int:
        return len(Book.read(self.path).lines)


@pytest.fixture
def life(site: SiteFolder) -> Life:
    life = Life(site)
    life.go_on(3)
    return life


@pytest.fixture
def archive(life: Life, tmp_path: Path) -> Path:
    backup(life.site.root, tmp_path / "north.backup", WORDS)
    return tmp_path / "north.backup"


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


# -- the archive ----------------------------------------------------------------------------------


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


def test_nothing_secret_stands_in_the_archive(life: Life, archive: Path) -> None:
    data, state = archive.read_bytes(), life.site.state
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    for path in (state / "site.key", life.path, life.site.relay.key, life.site.policy_file):
        for line in path.read_bytes().splitlines():
            assert len(line) < 8 or line not in data, path


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


def test_a_large_archive_has_many_chunks(life: Life, tmp_path: Path) -> None:
    torn = life.site.state / "ledger.torn"
    torn.write_bytes(os.urandom(3_500_000))
    backup(life.site.root, tmp_path / "b", WORDS)
    restore(tmp_path / "b", tmp_path / "there", WORDS)
    assert (tmp_path / "there" / "state" / "ledger.torn").read_bytes() == torn.read_bytes()


def test_a_wrong_passphrase_writes_nothing(archive: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FedwardError, match="passphrase is wrong"):
        restore(archive, tmp_path / "there", WORDS + " ")
    assert sorted(tmp_path.iterdir()) == before


def spoil(data: bytes, kind: str) -> bytes:
    first = data.index(b"\n") + 1
    return {
        "header changed": data.replace(b'"site":"north"', b'"site":"south"', 1),
        "first byte": data[:first] + bytes([data[first] ^ 1]) + data[first + 1 :],
        "last byte": data[:-1] + bytes([data[-1] ^ 1]),
        "cut by one": data[:-1],
        "cut at a chunk": data[: first + (1 << 20) + 16],
        "chunk dropped": data[:first] + data[first + (1 << 20) + 16 :],
        "nothing but the header": data[:first],
        "longer": data + b"x",
        "empty": b"",
        "something else": b"PK\x03\x04" + data,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "header changed",
        "first byte",
        "last byte",
        "cut by one",
        "cut at a chunk",
        "chunk dropped",
        "nothing but the header",
        "longer",
        "empty",
        "something else",
    ],
)
def test_an_archive_that_was_touched_writes_nothing(life: Life, tmp_path: Path, kind: str) -> None:
    (life.site.state / "ledger.torn").write_bytes(os.urandom(2_500_000))
    backup(life.site.root, tmp_path / "b", WORDS)
    data = (tmp_path / "b").read_bytes()
    changed = spoil(data, kind)
    assert changed != data
    (tmp_path / "b").write_bytes(changed)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FedwardError, match=r"changed|cut short|no backup"):
        restore(tmp_path / "b", tmp_path / "there", WORDS)
    assert sorted(tmp_path.iterdir()) == before


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


# -- restoring over something ---------------------------------------------------------------------


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


# -- upgrade --------------------------------------------------------------------------------------


def test_an_upgrade_pins_the_installed_code_and_nothing_else(site: SiteFolder) -> None:
    before = site.relay.config()
    site.relay.configure(before.model_copy(update={"bundle": "0" * 64}))
    change = backups.plan_upgrade(site.root)
    assert (change.before, change.after) == ("0" * 64, bundle.sha256())
    assert site.relay.config().bundle == "0" * 64
    backups.upgrade(site.root, change)
    assert site.relay.config() == before


@pytest.mark.parametrize("broken", ["site.toml", "policy.toml", "state/ledger.jsonl"])
def test_an_upgrade_that_does_not_read_the_site_changes_nothing(life: Life, broken: str) -> None:
    path = life.site.root / broken
    path.write_text('{"no": "ledger"}\n' if broken.endswith("jsonl") else "unknown_key = 1\n")
    with pytest.raises(FedwardError, match=path.name):
        backups.plan_upgrade(life.site.root)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "state/new.key", "relay"])
def test_a_sealed_archive_still_writes_no_unknown_file(
    name: str, archive: Path, tmp_path: Path
) -> None:
    """Whoever has the passphrase cannot write beside the site either."""
    header = inspect(archive, WORDS).header
    with (
        archive.open("wb") as out,
        backups._Sealing(out, header, WORDS) as sealed,
        tarfile.open(fileobj=sealed, mode="w|") as tar,
    ):
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(FedwardError, match="unknown file"):
        restore(archive, tmp_path / "there", WORDS)
    assert not (tmp_path / "there").exists()


def test_the_header_says_how_the_key_is_made(archive: Path) -> None:
    header = json.loads(archive.read_bytes().partition(b"\n")[0])
    assert header["format"] == "fedward backup 1"
    assert (header["site"], header["block"], header["lanes"]) == ("north", 8, 1)
    assert header["cost"] == 2**14  # of these tests

"""The vault: nothing readable at rest, nothing mixed up, nothing lost."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from client.site.encoders.vault import DATABASE, KEY_FILE, Item, Vault
from common.errors import VaultError

MARKER = np.frombuffer(b"PATIENT SECRET! " * 8, dtype=np.float32)[None]


def item(n: int = 0, *, encoder: str = "e" * 64, patient: str = "Jane Doe") -> Item:
    return Item(encoder, patient, f"note {n}")


def filled(folder: Path, count: int = 3) -> None:
    with Vault.open(folder) as vault:
        vault.write((item(n), MARKER) for n in range(count))


def change(folder: Path, query: str, *values: object) -> None:
    connection = sqlite3.connect(folder / DATABASE)
    assert connection.execute(query, values).rowcount > 0
    connection.commit()
    connection.close()


def test_what_is_written_is_read_back_exactly_also_after_reopening(tmp_path):
    values = {
        item(0): np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
        item(1): np.zeros((0, 5), dtype=np.float32),
        item(0, patient="John Roe"): np.ones((1, 1), dtype=np.float32),
    }
    with Vault.open(tmp_path) as vault:
        vault.write(values.items())
    with Vault.open(tmp_path) as vault:
        found = vault.read([*values, item(9)])
        assert len(vault) == 3
    for expected, value in zip(values.values(), found, strict=False):
        assert value is not None
        assert value.shape == expected.shape
        assert np.array_equal(value, expected)
    assert found[3] is None


def test_nothing_at_rest_names_a_patient_or_shows_a_value(tmp_path):
    with Vault.open(tmp_path) as vault:
        vault.write([(item(), MARKER)])
        stored = b"".join(p.read_bytes() for p in tmp_path.iterdir())  # the log included
    assert len(stored) > 4096
    for secret in (b"SECRET", b"Jane", b"Doe", b"note 0", b"e" * 64):
        assert secret not in stored


def test_equal_values_have_different_ciphertexts(tmp_path):
    filled(tmp_path)
    rows = sqlite3.connect(tmp_path / DATABASE).execute("SELECT sealed FROM entries").fetchall()
    assert len({sealed for (sealed,) in rows}) == 3


def test_key_and_database_are_for_their_owner_only(tmp_path):
    old = os.umask(0)
    try:
        filled(tmp_path / "vault")
    finally:
        os.umask(old)
    assert (tmp_path / "vault").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "vault" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "vault" / DATABASE).stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_can_read_is_refused(tmp_path):
    filled(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(VaultError, match="can be read by others") as caught:
        Vault.open(tmp_path)
    assert f"chmod 600 {tmp_path / KEY_FILE}" in caught.value.cure


def test_the_key_may_lie_elsewhere(tmp_path):
    key = tmp_path / "safe" / "master"
    Vault.open(tmp_path / "vault", key_file=key).close()
    assert key.stat().st_size == 32
    assert not (tmp_path / "vault" / KEY_FILE).exists()


def test_a_lost_key_is_not_replaced(tmp_path):
    filled(tmp_path)
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(VaultError, match=r"vault\.key is lost") as caught:
        Vault.open(tmp_path)
    assert "restore the key from the backup, or remove the vault's folder" in caught.value.cure
    assert not (tmp_path / KEY_FILE).exists()


def test_a_wrong_key_is_told_apart_from_damage(tmp_path):
    filled(tmp_path)
    (tmp_path / KEY_FILE).write_bytes(os.urandom(32))
    with pytest.raises(VaultError, match="the key does not belong to") as caught:
        Vault.open(tmp_path)
    assert "the key it was made with" in caught.value.cure
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(VaultError, match=r"not a vault key \(5 bytes, not 32\)"):
        Vault.open(tmp_path)


def test_keys_from_the_environment_are_for_tests_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDWARD_VAULT_KEY", "ab" * 32)
    monkeypatch.delenv("FEDWARD_TESTING", raising=False)
    with pytest.raises(VaultError, match="for tests only") as caught:
        Vault.open(tmp_path)
    assert "unset it" in caught.value.cure
    monkeypatch.setenv("FEDWARD_TESTING", "1")
    filled(tmp_path)
    assert not (tmp_path / KEY_FILE).exists()
    monkeypatch.setenv("FEDWARD_VAULT_KEY", "cd" * 32)
    with pytest.raises(VaultError, match="does not belong"):
        Vault.open(tmp_path)


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("UPDATE entries SET sealed = substr(sealed, 1, length(sealed) - 1)", ()),
        ("UPDATE entries SET sealed = substr(sealed, 1, 9)", ()),
        ("UPDATE entries SET sealed = x'00' || substr(sealed, 2)", ()),
        # Every entry now holds the next one's value: authentic bytes in the wrong place.
        (
            "UPDATE entries SET sealed = (SELECT sealed FROM entries AS other WHERE other.rowid = "
            "entries.rowid % 3 + 1)",
            (),
        ),
        ("UPDATE patients SET wrapped = zeroblob(60)", ()),
        ("DELETE FROM patients", ()),
    ],
)
def test_tampering_is_found_and_never_returned(tmp_path, query, values):
    filled(tmp_path)
    change(tmp_path, query, *values)
    with Vault.open(tmp_path) as vault, pytest.raises(VaultError, match=str(tmp_path)) as caught:
        vault.read([item(0), item(1), item(2)])
    assert "encoded again from the shard" in caught.value.cure


@pytest.mark.parametrize("size", [100, 5000])
def test_a_truncated_file_is_damage_with_a_cure(tmp_path, size):
    filled(tmp_path, 50)
    file = tmp_path / DATABASE
    os.truncate(file, size)

    def read() -> None:
        with Vault.open(tmp_path) as vault:
            vault.read([item(n) for n in range(50)])

    with pytest.raises(VaultError, match="is damaged") as caught:
        read()
    assert "remove it" in caught.value.cure


def test_encoders_never_mix(tmp_path):
    other = "f" * 64
    with Vault.open(tmp_path) as vault:
        vault.write([(item(), MARKER)])
        assert vault.read([item(encoder=other)]) == [None]
        vault.write([(item(encoder=other), 2 * MARKER)])
        mine, theirs = vault.read([item(), item(encoder=other)])
    assert mine is not None
    assert theirs is not None
    assert np.array_equal(mine, MARKER)
    assert np.array_equal(theirs, 2 * MARKER)


def test_the_encoder_is_bound_to_the_value_and_not_only_to_its_name(tmp_path):
    """With the names swapped by somebody who can compute them, the value still does not open."""
    other = item(encoder="f" * 64)
    with Vault.open(tmp_path) as vault:
        vault.write([(item(), MARKER)])
        old, new = vault._name(*item()), vault._name(*other)
    change(tmp_path, "UPDATE entries SET name = ? WHERE name = ?", new, old)
    with Vault.open(tmp_path) as vault, pytest.raises(VaultError, match="was changed"):
        vault.read([other])


def test_forgetting_a_patient_shreds_key_and_entries(tmp_path):
    jane, john = item(), item(patient="John Roe")
    with Vault.open(tmp_path) as vault:
        vault.write([(jane, MARKER), (item(1), MARKER), (john, MARKER)])
    query = "SELECT wrapped FROM patients"
    with Vault.open(tmp_path) as vault:
        connection = sqlite3.connect(tmp_path / DATABASE)
        before = {wrapped for (wrapped,) in connection.execute(query)}
        connection.close()
        backup = (tmp_path / DATABASE).read_bytes()
        assert vault.forget("Jane Doe") == 2
        assert vault.read([jane]) == [None]
        assert vault.read([john])[0] is not None
        connection = sqlite3.connect(tmp_path / DATABASE)
        (gone,) = before - {wrapped for (wrapped,) in connection.execute(query)}
        connection.close()
        stored = b"".join(p.read_bytes() for p in tmp_path.iterdir())
        assert gone in backup  # the search below would find it
        assert gone not in stored
        assert vault.forget("Jane Doe") == 0


def test_entries_of_a_shredded_patient_cannot_be_opened_from_a_copy(tmp_path):
    filled(tmp_path)
    (row,) = sqlite3.connect(tmp_path / DATABASE).execute("SELECT * FROM entries LIMIT 1")
    with Vault.open(tmp_path) as vault:
        vault.forget("Jane Doe")
    change(tmp_path, "INSERT INTO entries VALUES (?, ?, ?)", *row)
    with Vault.open(tmp_path) as vault, pytest.raises(VaultError, match="has lost its key"):
        vault.read([item(n) for n in range(3)])


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path):
    with Vault.open(tmp_path) as vault:
        vault.write([(item(0), MARKER)])
        with pytest.raises(AttributeError):
            vault.write([(item(1), MARKER), (item(2), None)])  # type: ignore[list-item]
        assert len(vault) == 1
        vault.write([(item(1), MARKER)])
        assert len(vault) == 2


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path):
    big = np.ones((100, 1000), dtype=np.float32)
    with Vault.open(tmp_path) as vault:
        vault.write([(item(0), big)])
        (pages,) = vault._connection.execute("PRAGMA page_count").fetchone()
        vault._connection.execute(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(VaultError, match=r"cannot store 0\.8 MB of embeddings in") as caught:
            vault.write([(item(1), big), (item(2), big)])
        assert str(tmp_path / DATABASE) in str(caught.value)
        assert "everything stored before is kept" in str(caught.value)
        assert "make room" in caught.value.cure
        vault._connection.execute(f"PRAGMA max_page_count = {10 * pages + 1000}")
        vault.write([(item(1), big)])
        found = vault.read([item(0), item(1), item(2)])
    assert [value is not None for value in found] == [True, True, False]


def test_a_quota_of_the_file_system_is_a_full_disk(tmp_path):
    script = f"""
import resource, signal
import numpy as np
from client.site.encoders.vault import Item, Vault
from common.errors import VaultError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = np.ones((100, 1000), dtype=np.float32)
with Vault.open({str(tmp_path)!r}) as vault:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, {resource.RLIM_INFINITY}))
    try:
        for n in range(20):
            vault.write([(Item("e", "p", str(n)), big)])
    except VaultError as error:
        print(n, "everything stored before is kept" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY},) * 2)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    stored, kept = run.stdout.split()
    assert kept == "True"
    assert 0 < int(stored) < 20
    with Vault.open(tmp_path) as vault:
        found = vault.read([Item("e", "p", str(n)) for n in range(20)])
    assert [value is not None for value in found] == [n < int(stored) for n in range(20)]


def test_a_vault_opened_by_several_at_once_has_one_key(tmp_path):
    problems: list[BaseException] = []

    def use(n: int) -> None:
        try:
            with Vault.open(tmp_path) as vault:
                vault.write([(item(n), MARKER)])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    with Vault.open(tmp_path) as vault:
        assert all(value is not None for value in vault.read([item(n) for n in range(8)]))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VaultError, match="cannot make the vault's folder") as caught:
        Vault.open(tmp_path / "file" / "vault")
    assert caught.value.cure

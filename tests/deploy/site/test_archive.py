"""Archives: everything or nothing, and under the right passphrase only."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path

import pytest

from common.errors import FedwardError
from deploy.site.archive import inspect, writing
from deploy.site.backup import backup
from deploy.site.restore import restore
from tests.deploy.site.life import WORDS, Life


def test_nothing_secret_stands_in_the_archive(life: Life, archive: Path) -> None:
    data, state = archive.read_bytes(), life.site.state
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    for path in (state / "site.key", life.path, life.site.relay.key, life.site.policy_file):
        for line in path.read_bytes().splitlines():
            assert len(line) < 8 or line not in data, path


def test_the_header_says_how_the_key_is_made(archive: Path) -> None:
    header = json.loads(archive.read_bytes().partition(b"\n")[0])
    assert header["format"] == "fedward backup 1"
    assert (header["site"], header["block"], header["lanes"]) == ("north", 8, 1)
    assert header["cost"] == 2**14  # of these tests


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


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "state/new.key", "relay"])
def test_a_sealed_archive_still_writes_no_unknown_file(
    name: str, archive: Path, tmp_path: Path
) -> None:
    """Whoever has the passphrase cannot write beside the site either."""
    header = inspect(archive, WORDS).header
    with archive.open("wb") as out, writing(out, header, WORDS) as writer:
        writer.add(name, io.BytesIO(), 0, 0o600, 0.0)
    with pytest.raises(FedwardError, match="unknown file"):
        restore(archive, tmp_path / "there", WORDS)
    assert not (tmp_path / "there").exists()

"""Checkpoints under kill -9 and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from server.checkpoint import Checkpoint, CheckpointError

WRITER = """
import sys, numpy as np
from pathlib import Path
from server.checkpoint import Checkpoint
n = 0
while True:
    n += 1
    array = np.full(200_000, n, dtype=np.float32)
    checkpoint = Checkpoint("h", "run", n, n, {"w": array}, {"m:w": array * 2}, {"n": n})
    checkpoint.write(Path(sys.argv[1]))
    print(n, flush=True)
"""


def make(number: int) -> Checkpoint:
    return Checkpoint("h", "run", number, number, {"a:b": np.arange(number, dtype=np.float32)})


def test_round_trip_and_two_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make(number).write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000002", "round-000003"]
    latest = Checkpoint.latest(tmp_path, study_hash="h")
    assert latest is not None
    np.testing.assert_array_equal(latest.adapter["a:b"], np.arange(3, dtype=np.float32))
    assert Checkpoint.latest(tmp_path / "none", study_hash="h") is None


def test_the_same_round_may_be_written_again(tmp_path: Path) -> None:
    make(4).write(tmp_path)
    make(4).write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000004"]


def test_damage_falls_back_and_then_fails_clearly(tmp_path: Path) -> None:
    make(1).write(tmp_path)
    make(2).write(tmp_path)
    arrays = tmp_path / "round-000002" / "arrays.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(bytes(data))
    latest = Checkpoint.latest(tmp_path, study_hash="h")
    assert latest is not None
    assert latest.round == 1
    (tmp_path / "round-000001" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="can be read"):
        Checkpoint.latest(tmp_path, study_hash="h")


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for trial in range(6):
        folder = tmp_path / str(trial)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        reached = 0
        for line in process.stdout:
            reached = int(line)
            if reached >= 3:
                break
        time.sleep(0.0017 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        latest = Checkpoint.latest(folder, study_hash="h")
        assert latest is not None
        assert latest.round >= reached
        assert latest.history == {"n": latest.round}
        assert set(latest.adapter["w"]) == {float(latest.round)}
        assert set(latest.optimizer["m:w"]) == {2.0 * latest.round}

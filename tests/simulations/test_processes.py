"""A family ends with all its descendants, and with nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from simulations.processes import Family

ORPHANS = """
import subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
for new in (True, False):
    p = subprocess.Popen([sys.executable, "-c", child], start_new_session=new)
    print(p.pid, flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_orphans_that_ignore_sigterm_end_too(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        with Family(grace_seconds=1) as family:
            log = tmp_path / "log"
            started = family.start(
                [sys.executable, "-c", ORPHANS], env=os.environ, cwd=tmp_path, log=log
            )
            started.wait()
            pids = [int(line) for line in log.read_text().split()]
            assert len(pids) == 2
            time.sleep(0.3)
            assert all(alive(pid) for pid in pids)
        assert not any(alive(pid) for pid in pids)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_error_inside_ends_it_too(tmp_path: Path) -> None:
    pid = 0
    try:
        with Family() as family:
            child = family.start(
                [sys.executable, "-c", "import time; time.sleep(100)"],
                env=os.environ,
                cwd=tmp_path,
                log=tmp_path / "log",
            )
            pid = child.pid
            raise RuntimeError
    except RuntimeError:
        assert not alive(pid)

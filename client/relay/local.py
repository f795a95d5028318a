"""The local simulation's daemon, for a `flwr run .` with nothing configured.

Whichever relay comes first starts it, under a file lock; it hosts every hospital of the ready
study `demo` and ends by itself when idle.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTUP_SECONDS = 600.0


class LocalDaemonError(Exception):
    """The daemon did not start; the text names its log."""


def home() -> Path:
    """Folder of everything local: environment FEDWARD_HOME, else `~/.fedward`."""
    return Path(os.environ.get("FEDWARD_HOME") or Path.home() / ".fedward").expanduser().absolute()


def answers(path: Path) -> bool:
    """Whether something listens on the Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def local_socket(command: Sequence[str] | None = None, *, seconds: float = STARTUP_SECONDS) -> Path:
    """Socket of the running local daemon, started when there is none.

    Args:
        command: What to run, in place of `python -m simulations.daemon --home HOME`.
        seconds: How long to wait for the socket; making the synthetic cohort is included.

    Raises:
        LocalDaemonError: It ended or stayed silent.
    """
    base = home()
    base.mkdir(parents=True, exist_ok=True)
    path, log = base / "daemon.sock", base / "daemon.log"
    if answers(path):
        return path
    with (base / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if answers(path):  # another relay was first
            return path
        # Ray exports its driver's sys.path, in which the bundle (without `client.site`) comes
        # first: the daemon must run the installed code instead.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with log.open("wb") as output:
            child = subprocess.Popen(
                command or [sys.executable, "-m", "simulations.daemon", "--home", str(base)],
                cwd=base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if answers(path):
                return path
            if child.poll() is not None:
                tail = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise LocalDaemonError(
                    f"the local daemon ended with {child.returncode}; log: {log}\n"
                    + "\n".join(tail)
                )
            time.sleep(0.1)
        raise LocalDaemonError(f"the local daemon did not answer in {seconds:.0f} s; log: {log}")

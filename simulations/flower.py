"""How Flower's processes are run: from this installation, quietly, with a home of their own."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOCAL = "localhost,127.0.0.1"
"""NO_PROXY of processes that talk to each other on this machine."""
_BIN = Path(sys.executable).parent


def environment(home: Path) -> dict[str, str]:
    """Environment of a process of Flower.

    Nothing is told to anybody or installed per run, and neither PYTHONPATH nor another federation's
    socket reaches the app's code.

    Args:
        home: FLWR_HOME.
    """
    return {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FEDWARD_SOCKET")},
        **_QUIET,
        "NO_PROXY": LOCAL,
        "no_proxy": LOCAL,  # it would win
        "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
    }


def program(name: str) -> str:
    """Path of a command that was installed with this interpreter, such as `flower-superlink`."""
    return str(_BIN / name)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

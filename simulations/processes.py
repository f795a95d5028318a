"""Processes that a run starts, their descendants, and their certain end.

Flower and Ray start further processes, some of which outlive their parents. A family is what
descends from a started process or carries the family's mark in its environment; nobody else is
ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_MARK = "FEDWARD_FAMILY"


class Family:
    """Context manager: on leaving it, by whatever path, every member is gone.

    Members are started in sessions of their own, so that a Ctrl-C at the terminal reaches only the
    launcher, which then ends them in order.
    """

    def __init__(self, *, grace_seconds: float = 5.0) -> None:
        self.grace_seconds = grace_seconds
        self._token = secrets.token_hex(16)
        self._children: list[subprocess.Popen[bytes]] = []
        self._known: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a member whose output goes to `log`."""
        with log.open("ab") as output:
            child = subprocess.Popen(
                list(command),
                cwd=cwd,
                env={**env, _MARK: self._token},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def watch(self) -> None:
        """Notes the present members, so that orphans are recognised later. Cheap; call it often."""
        table = _processes()
        alive = {p for p, began in self._known.items() if table.get(p, (0, ""))[1] == began}
        members = alive | {c.pid for c in self._children if c.pid in table}
        members |= {pid for pid in table if pid not in members and self._marked(pid)}
        grown = True
        while grown:
            more = {p for p, (parent, _) in table.items() if parent in members} - members
            members |= more
            grown = bool(more)
        self._known = {pid: table[pid][1] for pid in members if pid in table}

    def end(self) -> None:
        """Asks all members to end, waits, then kills what is left."""
        handlers = _ignore_interrupts()
        try:
            for sign, seconds in (
                (signal.SIGTERM, self.grace_seconds),
                (signal.SIGKILL, 5.0),
                (signal.SIGKILL, 5.0),
            ):
                if self._signal(sign, seconds):
                    return
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _signal(self, sign: signal.Signals, seconds: float) -> bool:
        """Signals all members; True when none is left within `seconds`."""
        self.watch()
        for pid in self._known:
            try:
                os.kill(pid, sign)
            except (ProcessLookupError, PermissionError):
                continue
        deadline = time.monotonic() + seconds
        while True:
            for child in self._children:
                child.poll()
            self.watch()
            if not self._known:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)

    def _marked(self, pid: int) -> bool:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"{_MARK}={self._token}".encode() in environ.split(b"\0")


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM becomes a KeyboardInterrupt, so that it cleans up; only in a main thread."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and start time (a number may be reused) of every process but zombies."""
    table: dict[int, tuple[int, str]] = {}
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (OSError, UnicodeDecodeError):
                continue
            if fields[0] not in ("Z", "X"):
                table[int(entry)] = (int(fields[1]), fields[19])
        return table
    listing = subprocess.run(
        ["ps", "-Ao", "pid=,ppid=,stat=,lstart="], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        pid, parent, state, *started = line.split()
        if not state.startswith("Z"):
            table[int(pid)] = (int(parent), " ".join(started))
    return table


def _ignore_interrupts() -> dict[int, Any]:
    """A second Ctrl-C must not stop the cleaning up; only a main thread can say so."""
    replaced: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            replaced[number] = signal.signal(number, signal.SIG_IGN)
        except ValueError:
            break
    return replaced

"""Runs a coordinator: SuperLink, the process that executes ServerApps, and the front.

In the foreground, for systemd or a container to hold. What dies is started again; a SuperLink that
comes back finds its nodes in its database, and the ServerApp that died with it goes on with
`resume`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from deploy.coordinator import front
from deploy.coordinator.enrol import Register
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.superlink import NodeKeyError, SuperLink, healthy
from simulations.flower import environment, program
from simulations.processes import Family

log = logging.getLogger("fedward.coordinator")

_TICK_SECONDS = 0.5
_START_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
_SETTLED_SECONDS = 60.0  # alive so long, a process that dies is restarted at once again
_STOP_SECONDS = 10.0


@dataclass
class Child:
    """A process that is kept alive.

    Attributes:
        start: Starts it, in a process group of its own.
        orphans: Whether what it leaves behind may live: a ServerApp goes on without the process
            that started it; nginx's workers would hold the port, and admit who was revoked since.
        wait: Seconds before the next restart.
        due: When it is to be restarted; None while it lives.
    """

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    orphans: bool = True
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    wait: float = _FIRST_WAIT_SECONDS
    due: float | None = None

    def launch(self, now: float) -> None:
        self.process, self.began, self.due = self.start(), now, None

    def tend(self, now: float) -> None:
        """Restarts it when it has died and waited; each death soon after the last doubles that."""
        if self.process is None:
            return
        if self.due is not None:
            if now >= self.due:
                self.launch(now)
            return
        code = self.process.poll()
        if code is None:
            return
        if now - self.began >= _SETTLED_SECONDS:
            self.wait = _FIRST_WAIT_SECONDS
        if not self.orphans:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        log.error("%s ended with exit code %d; again in %.0f s", self.name, code, self.wait)
        self.due, self.wait = now + self.wait, min(2 * self.wait, _LONGEST_WAIT_SECONDS)

    def end(self, seconds: float) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


@dataclass
class Coordinator:
    """The processes of one folder.

    Attributes:
        nginx: Program of the front; None where somebody else runs it on our configuration.
        stop: Set to end.
    """

    folder: CoordinatorFolder
    nginx: str | None
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves until `stop` is set; then everything that it started has ended.

        Args:
            ready: Called once hospitals can connect.

        Raises:
            CoordinatorError: It is served already, a port is taken, or the SuperLink does not come
                up.
        """
        with self.folder.serving(), Family(grace_seconds=_STOP_SECONDS) as family:
            with self.folder.changing():  # also of a folder that was restored from a backup
                Register.read(self.folder).publish(self.folder)
            self.folder.runs.mkdir(mode=0o700, exist_ok=True)
            self._check_ports()
            children = self._children(family)
            try:
                self._start(children)
                if not self.stop.is_set():
                    ready()
                while not self.stop.wait(_TICK_SECONDS):
                    family.watch()
                    for child in children:
                        child.tend(time.monotonic())
            finally:
                # Nobody new, then the ServerApp and what runs it, then what they talk to.
                for child in reversed(children):
                    child.end(_STOP_SECONDS)

    def _start(self, children: list[Child]) -> None:
        """Until hospitals can connect, or `stop` is set."""
        up = {
            "superlink": lambda: healthy(self.folder),
            "nginx": lambda: front.listening(self.folder),
        }
        for child in children:
            if self.stop.is_set():
                return
            child.launch(time.monotonic())
            self._await(child, up.get(child.name, lambda: True))
            if child.name == "superlink" and not self.stop.is_set():
                self.enrolled()

    def enrolled(self) -> None:
        """Registers the nodes of enrolled sites, and only those."""
        with self.folder.changing(), SuperLink.connected(self.folder) as superlink:
            try:
                superlink.reconcile(Register.read(self.folder).node_keys())
            except NodeKeyError as error:  # one hospital's trouble keeps no other away
                log.error("%s", error)

    def _children(self, family: Family) -> list[Child]:
        """In the order in which they start."""
        folder = self.folder
        env = environment(folder.flower)
        address = f"localhost:{folder.config().superlink_port}"
        empty = folder.flower / "empty"  # the ServerApp imports from where it stands before its app
        empty.mkdir(parents=True, exist_ok=True)
        commands = {
            "superlink": [
                program("flower-superlink"),
                *("--ssl-ca-certfile", str(folder.authority)),
                *("--ssl-certfile", str(folder.server_certificate)),
                *("--ssl-keyfile", str(folder.server_key)),
                *("--host", "127.0.0.1", "--port", address.rpartition(":")[2]),
                "--enable-supernode-auth",
                *("--database", str(folder.database)),
                *("--isolation", "process"),
                *("--superexec-auth-secret-file", str(folder.superexec_secret)),
            ],
            "superexec": [
                program("flower-superexec"),
                *("--root-certificates", str(folder.authority)),
                *("--runtime-api-address", address),
                *("--superexec-auth-secret-file", str(folder.superexec_secret)),
            ],
        }
        if self.nginx is not None:
            front.check(folder, self.nginx)
            commands["nginx"] = front.command(folder, self.nginx)

        def starter(name: str, command: list[str]) -> Callable[[], subprocess.Popen[bytes]]:
            def start() -> subprocess.Popen[bytes]:
                log.info("starting %s", name)
                return family.start(command, env=env, cwd=empty, log=folder.logs / f"{name}.log")

            return start

        return [
            Child(name, starter(name, command), orphans=name != "nginx")
            for name, command in commands.items()
        ]

    def _check_ports(self) -> None:
        config = self.folder.config()
        ports = [("127.0.0.1", config.superlink_port)]
        if self.nginx is not None:
            ports.append((config.listen, config.port))
        for host, port in ports:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise CoordinatorError(
                        f"cannot listen on {host} port {port} ({error.strerror})",
                        cure="end what listens there (a SuperLink or nginx whose `serve` was "
                        "killed, perhaps), or change coordinator.toml",
                    ) from None

    def _await(self, child: Child, up: Callable[[], bool]) -> None:
        """Returns when the child is up, or when told to stop."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.stop.is_set() and not up():
            ended = child.process is not None and child.process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise CoordinatorError(
                    f"the {child.name} does not start", cure=f"see the logs in {self.folder.logs}"
                )
            self.stop.wait(0.1)


@contextlib.contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C set `stop`."""

    def handle(number: int, frame: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The daemon as a process: a Unix socket, the guard behind it, and a clean end.

gRPC without generated code: `/fedward.Site/Call` takes and returns packed envelopes,
`/fedward.Site/Status` takes nothing and returns JSON, for the operator of this machine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc

from client.site.daemon.bench import Bench
from client.site.daemon.config import DaemonConfig
from client.site.daemon.guard import Guard
from client.site.daemon.hospital import Hospital
from common.errors import FedwardError

log = logging.getLogger("fedward.daemon")

SERVICE = "fedward.Site"
CALL, STATUS = f"/{SERVICE}/Call", f"/{SERVICE}/Status"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
"""For whoever calls: an answer is as large as the adapter."""
_REQUEST_BYTES = 2**30  # it is held in memory before anybody can ask who signed it
_SOCKET_BYTES = 107  # of a Unix socket's path on Linux
_GRACE_SECONDS = 5.0
_SPARE_THREADS = 4


class SocketError(FedwardError):
    """The daemon cannot listen."""

    code = "socket-unusable"


class Daemon:
    """Hospitals behind a socket. Use as a context manager.

    Raises:
        SocketError: Another daemon listens there, or the path is too long.
        PrivacyError: A site's ledger is broken or missing.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self.config = config
        self._lock = _SocketLock(config.socket)
        try:
            bench = Bench(config.device, config.threads)
            self.hospitals = {
                site.name: Hospital(site, bench, simulated=config.simulated)
                for site in config.sites
            }
        except BaseException:
            self._lock.release()
            raise
        self.guard = Guard(self.hospitals)
        self._active, self._last = 0, time.monotonic()
        self._mutex = threading.Lock()
        # Calls wait in line for the bench; there must be threads left for Status and short ones.
        threads = 2 * len(config.sites) + 14
        self._most = threads - _SPARE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="site"),
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", _REQUEST_BYTES),
            ],
            maximum_concurrent_rpcs=2 * threads,  # more is an attack, and is turned away
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))

    def __enter__(self) -> Daemon:
        path = self.config.socket
        path.unlink(missing_ok=True)  # left by a daemon that was killed: the lock is ours
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)
        _admit(path, self.config.socket_group)
        self._server.start()
        ready = {"pid": os.getpid(), "socket": str(path), "sites": list(self.hospitals)}
        self._ready_file.write_text(json.dumps(ready))
        return self

    def __exit__(self, *_: object) -> None:
        for hospital in self.hospitals.values():
            hospital.stopping = True
        self._ready_file.unlink(missing_ok=True)
        self._server.stop(_GRACE_SECONDS).wait()
        self.config.socket.unlink(missing_ok=True)
        self._lock.release()

    @property
    def idle_seconds(self) -> float:
        """Time since the last request was answered; 0 while one is being worked on."""
        with self._mutex:
            return 0.0 if self._active else time.monotonic() - self._last

    @property
    def _ready_file(self) -> Path:
        return self.config.socket.with_name(self.config.socket.name + ".ready")

    def _handlers(self) -> grpc.GenericRpcHandler:
        def call(packed: bytes, context: grpc.ServicerContext) -> bytes:
            with self._counted() as active:
                if active > self._most:  # a request that is repeated waits in line each time
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
                return self.guard.call(packed, context.is_active)

        def status(_: bytes, __: Any) -> bytes:
            return json.dumps(self.guard.status()).encode()

        def handler(act: Callable[[bytes, Any], bytes]) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(act)

        return grpc.method_handlers_generic_handler(
            SERVICE, {"Call": handler(call), "Status": handler(status)}
        )

    @contextmanager
    def _counted(self) -> Iterator[int]:
        """Calls that are being worked on, this one included."""
        with self._mutex:
            self._active += 1
            active = self._active
        try:
            yield active
        finally:
            with self._mutex:
                self._active -= 1
                self._last = time.monotonic()


def serve(config: DaemonConfig) -> None:
    """Runs a daemon until SIGTERM, SIGINT or idleness ends it.

    While it listens, `<socket>.ready` holds its process id. Work in progress when it ends is given
    up at its next step: what it charged stays charged.

    Raises:
        FedwardError: It cannot start.
    """
    ending = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        log.info("ending on signal %d", number)
        ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Daemon(config) as daemon:
            log.info("ready: %d sites on %s", len(daemon.hospitals), config.socket)
            while not ending.wait(0.2):
                if config.idle_exit_seconds and daemon.idle_seconds > config.idle_exit_seconds:
                    log.info("ending after %.0f idle seconds", daemon.idle_seconds)
                    break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _admit(socket: Path, group: str | None) -> None:
    """Opens the socket to its owner, and to the group that is named."""
    if group is None:
        socket.chmod(0o600)
        return
    try:
        shutil.chown(socket, group=group)
    except (LookupError, OSError) as error:
        raise SocketError(
            f"cannot give the socket {socket} to group '{group}' ({error})",
            cure="make the group, and this user a member of it",
        ) from None
    socket.chmod(0o660)


class _SocketLock:
    """Held by the daemon that owns a socket, for as long as its process lives."""

    def __init__(self, socket: Path) -> None:
        if len(os.fsencode(socket)) > _SOCKET_BYTES:
            raise SocketError(
                f"the socket's path {socket} is longer than the {_SOCKET_BYTES} bytes that Linux "
                "admits",
                cure="choose a shorter one, below /run or /tmp",
            )
        try:
            socket.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(f"{socket}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SocketError(
                f"cannot make the socket {socket} ({error.strerror})",
                cure="choose a folder that this user may write to",
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._handle, 20, 0).decode(errors="replace").strip()
            os.close(self._handle)
            raise SocketError(
                f"socket {socket} is in use by another daemon (process {owner})",
                cure="end that daemon, or give this one a socket of its own",
            ) from None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._handle)

"""`fedward site join`: the relay as a process: the gate and, behind it, Flower's SuperNode.

The SuperNode is started again whenever it ends: Flower refuses one that was killed for up to 60 s,
and it gives up where it should wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

import uvicorn

from common.errors import FedwardError
from deploy.pki import Facts, belongs, new_key, self_signed
from deploy.site import clientapp
from deploy.site.gate import Upstream, application
from deploy.site.layout import RelayConfig, RelayFolder, pem
from simulations.flower import environment, free_port, program

log = logging.getLogger("fedward.relay")

_AGAIN_SECONDS = 15.0
_GRACE_SECONDS = 10.0
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class JoinError(FedwardError):
    """The relay cannot be started."""

    code = "relay-unusable"


def run(folder: Path) -> None:
    """Runs gate and SuperNode until SIGTERM or SIGINT.

    Args:
        folder: The site's `relay/`.

    Raises:
        JoinError: The site is not admitted yet, or its certificate is of no use.
        LayoutError: relay.toml is absent or wrong.
    """
    relay = RelayFolder(folder.absolute())
    config = relay.config()
    _check(relay)
    _log_to(relay.log)
    asyncio.run(_run(relay, config))


def _check(relay: RelayFolder) -> None:
    try:
        certificate, key = pem(relay.certificate), pem(relay.key)
    except FileNotFoundError as error:
        raise JoinError(
            f"{error.filename} is not there: the coordinator has not admitted this site yet",
            cure="send request.json to the coordinator, then `fedward site accept` its answer",
        ) from None
    facts = Facts.of(certificate)
    if not belongs(certificate, key):
        raise JoinError(
            f"{relay.certificate} is not for {relay.key}", cure="accept the admission again"
        )
    if facts.not_after < datetime.now(UTC):
        raise JoinError(
            f"{relay.certificate} expired on {facts.not_after:%Y-%m-%d}",
            cure="ask the coordinator for `coordinator renew`, then `fedward site accept`",
        )


class _Server(uvicorn.Server):
    """Leaves the signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(relay: RelayFolder, config: RelayConfig) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    key, certificate = _own_certificate(relay)
    upstream = Upstream(relay, config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(
            uvicorn.Config(
                application(relay, config, upstream),
                ssl_keyfile=str(key),
                ssl_certfile=str(certificate),
                log_config=None,
                lifespan="off",
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        gate = asyncio.create_task(server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        log.info("gate on 127.0.0.1:%d to %s", port, upstream.base)
        node = asyncio.create_task(_keep_node(relay, config, port, certificate, key))
        stop = asyncio.create_task(ending.wait())
        await asyncio.wait({gate, node, stop}, return_when=asyncio.FIRST_COMPLETED)
        node.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await node
        server.should_exit = True
        await gate
        await upstream.close()
    log.info("ended")


async def _keep_node(
    relay: RelayFolder, config: RelayConfig, port: int, certificate: Path, key: Path
) -> None:
    """Starts the SuperNode again and again, until cancelled."""
    command = [
        program("flower-supernode"),
        *("--superlink", f"localhost:{port}", "--root-certificates", str(certificate)),
        *("--auth-supernode-private-key", str(relay.node_key)),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        *("--ssl-ca-certfile", str(certificate), "--isolation", "subprocess"),
    ]
    # The hospital's proxy is the gate's affair: the SuperNode only speaks to this machine.
    env = {k: v for k, v in environment(relay.flower).items() if k.lower() not in _PROXIES}
    env["FEDWARD_SOCKET"] = str(config.socket)
    relay.flower.mkdir(exist_ok=True)
    env["PATH"] = f"{clientapp.provide(relay.flower / 'bin')}{os.pathsep}{env['PATH']}"
    while True:
        node = await asyncio.create_subprocess_exec(
            *command,
            env=env,
            cwd=relay.flower,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        log.info("SuperNode started (process %d)", node.pid)
        try:
            assert node.stdout is not None
            async for line in _lines(node.stdout):
                log.info("supernode: %s", line.decode(errors="replace").rstrip())
            code = await node.wait()
        finally:
            await _end(node)
        log.warning("SuperNode ended with %d; again in %.0f s", code, _AGAIN_SECONDS)
        await asyncio.sleep(_AGAIN_SECONDS)


async def _lines(output: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of the SuperNode; what a coordinator makes it print may be longer than the reader
    holds, and is left out."""
    while True:
        try:
            line = await output.readline()
        except ValueError:
            line = b"(the beginning of a very long line was left out)"
        if not line:
            return
        yield line


async def _end(node: asyncio.subprocess.Process) -> None:
    """Ends the SuperNode and what it started; they are a process group of their own."""
    if node.returncode is None:
        node.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(node.wait(), _GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(node.pid, signal.SIGKILL)


def _own_certificate(relay: RelayFolder) -> tuple[Path, Path]:
    """A fresh key and certificate for listeners on this machine, good for this start."""
    key, certificate = relay.root / "gate.key", relay.root / "gate.crt"
    key.unlink(missing_ok=True)
    pem = new_key()
    descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(pem)
    certificate.write_text(self_signed(pem, ["localhost", "127.0.0.1"], days=397))
    return key, certificate


def _log_to(path: Path) -> None:
    handlers: list[logging.Handler] = [
        RotatingFileHandler(path, maxBytes=10 * 2**20, backupCount=5, encoding="utf-8"),
        logging.StreamHandler(),
    ]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

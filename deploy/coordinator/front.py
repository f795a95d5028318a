"""The front: nginx, which admits enrolled hospitals to the fleet's paths, and nobody to the rest.

Its configuration is written from the list of enrolled sites, so that a certificate carries the node
key of its own site only: the SuperLink knows node keys, but not whose certificate they came with.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from jinja2 import Environment, StrictUndefined

from common.files import write_atomically
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder

_RELOAD_SECONDS = 20


@dataclass(frozen=True)
class Entry:
    """One certificate that is admitted.

    Attributes:
        serial: Of the certificate, as nginx writes it.
        node_key: What the site's SuperNode sends in the header `flwr-public-key`.
    """

    serial: str
    site: str
    node_key: str


def node_public(openssh: str) -> bytes:
    """A node key in the form by which Flower knows it: PEM.

    Raises:
        CoordinatorError: `openssh` is no public key.
    """
    try:
        key = serialization.load_ssh_public_key(openssh.encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # a compressed point, say
        raise CoordinatorError("the node key of the request does not parse") from None
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def node_header(openssh: str) -> str:
    """The value of `flwr-public-key` that a SuperNode with this key sends."""
    return b64encode(node_public(openssh)).decode()


def write(folder: CoordinatorFolder, entries: Iterable[Entry]) -> Path:
    """Writes `nginx/nginx.conf` and the folders that it names; returns the file."""
    config = folder.config()
    template = resources.files("deploy.coordinator").joinpath("nginx.conf.j2").read_text()
    text = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    for needed in (folder.nginx / "tmp", folder.logs):
        needed.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder.nginx / "nginx.conf"
    write_atomically(
        path,
        text.render(
            entries=sorted(entries, key=lambda e: (e.site, e.serial)),
            listen=f"[{config.listen}]" if ":" in config.listen else config.listen,
            port=config.port,
            superlink_port=config.superlink_port,
        ),
    )
    return path


def binary() -> str | None:
    """Path of nginx, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def command(folder: CoordinatorFolder, program: str) -> list[str]:
    """Runs it in the foreground."""
    log = folder.logs / "nginx-error.log"  # without -e it opens one of the system's first
    return [program, "-p", f"{folder.nginx}/", "-c", "nginx.conf", "-e", str(log)]


def check(folder: CoordinatorFolder, program: str) -> None:
    """Raises `CoordinatorError` with nginx's own words where it refuses the configuration."""
    tried = subprocess.run(
        [*command(folder, program)[:-1], "stderr", "-t", "-q"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if tried.returncode:
        raise CoordinatorError(
            f"nginx refuses {folder.nginx / 'nginx.conf'}: {tried.stderr.strip()}",
            cure="port and listen are in coordinator.toml",
        )


def listening(folder: CoordinatorFolder) -> bool:
    """Whether somebody takes connections on the public port."""
    config = folder.config()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen, config.listen)
    try:
        socket.create_connection((host, config.port), timeout=1).close()
    except OSError:
        return False
    return True


def reload(folder: CoordinatorFolder) -> bool:
    """Has the front that runs on this configuration read it again, and waits until it counts.

    nginx starts new workers before it tells the old ones to stop, and an old one keeps admitting
    by the old list on connections that are open. One that is stopping has closed those at rest.

    Returns:
        False where none runs here, as far as its pid file tells.

    Raises:
        CoordinatorError: It has kept its old workers.
    """
    try:
        master = int((folder.nginx / "nginx.pid").read_text())
        title = _title(master)
        if not ("nginx" in title and f"-p {folder.nginx}/" in title):
            return False  # in another container, or gone and its number taken by somebody else
        old = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        os.kill(master, signal.SIGHUP)
    except (OSError, ValueError):
        return False
    deadline = time.monotonic() + _RELOAD_SECONDS
    while any(_admits(int(worker)) for worker in old):
        if time.monotonic() > deadline:
            raise CoordinatorError(
                f"the front (pid {master}) has not taken its new configuration",
                cure=f"{folder.logs / 'nginx-error.log'} says why; then restart it",
            )
        time.sleep(0.02)
    return True


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")


def _admits(worker: int) -> bool:
    """Whether a worker of nginx is neither gone nor about to be, by the title it gives itself."""
    try:
        title = _title(worker)
    except OSError:
        return False
    return bool(title.strip()) and "shutting down" not in title

"""The relay's process: what it refuses to start with, and that the SuperNode is kept running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import FedwardError
from deploy import pki
from deploy.site import join
from deploy.site.layout import LayoutError, RelayConfig, RelayFolder


@pytest.fixture
def relay(tmp_path: Path) -> RelayFolder:
    authority = pki.Authority.create(tmp_path, "test")
    relay = RelayFolder(tmp_path / "relay")
    relay.root.mkdir()
    config = RelayConfig(
        site="north", host="localhost", port=1, bundle="0" * 64, socket=tmp_path / "none"
    )
    relay.configure(config)
    key = pki.new_key()
    relay.key.write_text(key)
    relay.authority.write_text(authority.pem)
    relay.certificate.write_text(authority.issue_site(pki.signing_request(key, "north"), "north"))
    return relay


def test_a_folder_that_is_no_relays_is_named(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"relay\.toml"):
        join.run(tmp_path)


def test_without_admission_it_says_what_to_do(relay: RelayFolder) -> None:
    relay.certificate.unlink()
    with pytest.raises(join.JoinError, match=r"not admitted this site yet[\s\S]*site accept"):
        join.run(relay.root)


@pytest.mark.parametrize("name", ["relay.key", "relay.crt"])
def test_a_file_that_is_no_text_is_named_without_a_traceback(relay: RelayFolder, name: str) -> None:
    (relay.root / name).write_bytes(b"\xff\xfe")
    with pytest.raises(FedwardError):
        join._check(relay)


def test_a_certificate_for_another_key_is_refused(relay: RelayFolder) -> None:
    relay.key.write_text(pki.new_key())
    with pytest.raises(join.JoinError, match="is not for"):
        join.run(relay.root)


def test_an_expired_certificate_is_refused(relay: RelayFolder) -> None:
    authority = pki.Authority.open(relay.root.parent)
    request = pki.signing_request(relay.key.read_text(), "north")
    relay.certificate.write_text(authority.issue_site(request, "north", days=0))
    time.sleep(1.1)
    with pytest.raises(join.JoinError, match=r"expired on[\s\S]*coordinator renew"):
        join.run(relay.root)


STUB = """#!{python}
import os, sys, time
print("x" * 200_000)  # more than a reader of lines holds
print("node", os.getpid(), os.environ.get("HTTPS_PROXY"), os.environ["FEDWARD_SOCKET"], flush=True)
time.sleep({lives})
"""
RELAY = """
import sys
from pathlib import Path
from deploy.site import join
join.program = lambda name: sys.argv[2]
join._AGAIN_SECONDS = 0.2
join.run(Path(sys.argv[1]))
"""


def started(relay: RelayFolder, *, lives: float) -> subprocess.Popen[bytes]:
    stub = relay.root / "stub"
    stub.write_text(STUB.format(python=sys.executable, lives=lives))
    stub.chmod(0o700)
    return subprocess.Popen(
        [sys.executable, "-c", RELAY, str(relay.root), str(stub)],
        env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:1"},
        stderr=subprocess.DEVNULL,
    )


def nodes(relay: RelayFolder, at_least: int) -> list[list[str]]:
    """What each SuperNode printed: its process id, proxy and socket."""
    deadline = time.monotonic() + 60
    while True:
        text = relay.log.read_text() if relay.log.exists() else ""
        found = [
            line.split("supernode: node ")[1].split()
            for line in text.splitlines()
            if "supernode: node " in line
        ]
        if len(found) >= at_least:
            return found
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def test_a_supernode_that_ends_is_started_again_and_ends_with_the_relay(relay: RelayFolder) -> None:
    process = started(relay, lives=0.1)
    try:
        assert len({pid for pid, *_ in nodes(relay, 3)}) >= 3
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_supernode_knows_the_socket_and_no_proxy_and_does_not_outlive_the_relay(
    relay: RelayFolder,
) -> None:
    process = started(relay, lives=600)
    try:
        ((pid, proxy, socket),) = nodes(relay, 1)
        assert (proxy, socket) == ("None", str(relay.root.parent / "none"))
        assert os.stat(relay.root / "gate.key").st_mode & 0o077 == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not Path(f"/proc/{pid}").exists()

"""`serve`: real processes, killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy import pki
from deploy.coordinator import enrol, front, runs
from deploy.coordinator.enrol import Register
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.serve import Child, Coordinator
from deploy.coordinator.superlink import NodeKeyError, SuperLink, SuperLinkError, healthy
from tests.deploy.coordinator.ward import Joining, Served, ended, hello, started, until


def member(process: subprocess.Popen[bytes], name: str) -> psutil.Process | None:
    """A running child of `serve` by the name of its program."""
    for child in psutil.Process(process.pid).children():
        if running(child) and any(name in part for part in child.cmdline()[:2]):
            return child
    return None


def another(process: subprocess.Popen[bytes], name: str, old: psutil.Process) -> bool:
    """Whether one by that name runs that is not the old one."""
    try:
        found = member(process, name)
    except psutil.Error:  # gone while we looked
        return False
    return found is not None and found.pid != old.pid


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_is_killed_comes_back_and_knows_its_nodes(
    folder: CoordinatorFolder, hospital: Joining
) -> None:
    if front.binary() is None:
        pytest.skip("nginx is not installed")
    site = hospital("a").admitted(folder)
    process = started(folder)
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        with SuperLink.connected(folder) as superlink:
            before = superlink.nodes()
        assert [n.public_key for n in before] == [front.node_public(pki.openssh_public(site.node))]
        for name in ("flower-superlink", "flower-superexec", "nginx"):
            old = member(process, name)
            assert old
            left = old.children()
            began = time.monotonic()
            old.kill()
            until(lambda name=name, old=old: another(process, name, old), process)
            until(lambda: healthy(folder), process)
            assert time.monotonic() - began < 30
            if name == "nginx":
                assert left
                assert not [worker for worker in left if running(worker)]
        with SuperLink.connected(folder) as superlink:
            assert superlink.nodes() == before
    finally:
        alive = psutil.Process(process.pid).children(recursive=True)
        assert ended(process) == 0
    assert not [p for p in alive if running(p)]
    assert not folder.served
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", folder.config().port))


def test_only_one_serves_a_folder(folder: CoordinatorFolder) -> None:
    assert not folder.served
    with folder.serving():
        assert folder.served
        with pytest.raises(CoordinatorError, match=f"by process {os.getpid()}"):
            Coordinator(folder, None).run()
    assert not folder.served


def test_a_pid_file_of_the_dead_serves_nothing(folder: CoordinatorFolder) -> None:
    code = (
        "from pathlib import Path; import os, signal\n"
        "from deploy.coordinator.layout import CoordinatorFolder\n"
        f"with CoordinatorFolder(Path({str(folder.root)!r})).serving():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (folder.root / "serve.pid").read_text().strip().isdigit()
    assert not folder.served


def test_a_taken_port_is_told(folder: CoordinatorFolder) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", folder.config().superlink_port))
        other.listen()
        with pytest.raises(CoordinatorError, match="cannot listen"):
            Coordinator(folder, None).run()
    assert not folder.served


def test_a_superlink_that_cannot_start_is_told(folder: CoordinatorFolder) -> None:
    folder.server_key.write_text("no key")
    with pytest.raises(CoordinatorError, match="the superlink does not start"):
        Coordinator(folder, None).run()
    assert not folder.served


def test_nobody_to_ask(folder: CoordinatorFolder) -> None:
    with (
        pytest.raises(SuperLinkError, match="does not answer"),
        SuperLink.connected(folder) as superlink,
    ):
        superlink.nodes()


def test_this_machine_is_not_asked_for_at_a_proxy(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):  # programs mind the lower case first
            monkeypatch.setenv(name, "intranet.example")
        test_nobody_to_ask(folder)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_restarts_are_spaced_and_forgiven() -> None:
    starts = []

    class Dead:
        def poll(self) -> int:
            return 1

    child = Child("x", lambda: starts.append(now) or Dead())  # type: ignore[arg-type,return-value]
    now = 0.0
    child.launch(now)
    for tick in range(1, 400):
        now = tick * 0.5
        child.tend(now)
    gaps = [round(b - a, 1) for a, b in itertools.pairwise(starts)]
    assert gaps[:5] == [1.5, 2.5, 4.5, 8.5, 16.5]
    assert gaps[-1] == 30.5
    now += 100  # it lived for long, or so it seems
    child.due, child.began = None, now - 61
    child.tend(now)
    assert child.due == now + 1


def test_register_and_superlink_agree_after_a_change_while_it_was_down(
    folder: CoordinatorFolder, hospital: Joining
) -> None:
    sites = {name: hospital(name).admitted(folder) for name in "ab"}
    process = started(folder, "--no-nginx")
    assert ended(process) == 0
    enrol.revoke(folder, "a")
    sites["c"] = hospital("c").admitted(folder)
    (folder.root / "serve.log").unlink()
    process = started(folder, "--no-nginx")
    try:
        with SuperLink.connected(folder) as superlink:
            keys = {node.public_key for node in superlink.nodes()}
        expected = {front.node_public(pki.openssh_public(sites[n].node)) for n in "bc"}
        assert keys == expected
        assert {s["request"]["site"] for s in _sites(folder).values()} == {"b", "c"}
    finally:
        assert ended(process) == 0


def test_an_older_register_keeps_nobody_else_away(
    folder: CoordinatorFolder, hospital: Joining
) -> None:
    """It names a node that Flower has unregistered, and takes no more."""
    hospital("a").admitted(folder)
    old = folder.sites.read_text()
    process = started(folder, "--no-nginx")
    try:
        keys = Register.read(folder).node_keys()
        with SuperLink.connected(folder) as superlink:
            superlink.reconcile({})
        site = hospital("b").admitted(folder)
        keys["b"] = front.node_public(pki.openssh_public(site.node))
        with (
            pytest.raises(NodeKeyError, match="that of a was unregistered"),
            SuperLink.connected(folder) as superlink,
        ):
            superlink.reconcile(keys)
        with SuperLink.connected(folder) as superlink:
            assert [node.public_key for node in superlink.nodes()] == [keys["b"]]
    finally:
        assert ended(process) == 0
    folder.sites.write_text(old)
    (folder.root / "serve.log").unlink()
    process = started(folder, "--no-nginx")
    assert "Flower takes no node key twice" in (folder.root / "serve.log").read_text()
    assert ended(process) == 0


def test_a_folder_is_served_from_its_backup(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    """The files that the guide names are enough."""
    if front.binary() is None:
        pytest.skip("nginx is not installed")
    site = hospital("a").admitted(folder)
    hospital("b").admitted(folder)
    enrol.revoke(folder, "b")
    guide = (Path(__file__).parents[3] / "docs" / "coordinator-guide.md").read_text()
    kept = guide.partition("Back up, encrypted and offline")[2].partition(". Whoever")[0]
    names = [name for name in kept.split("`")[1::2] if "." in name]
    assert len(names) == 9
    again = CoordinatorFolder(tmp_path / "restored")
    again.root.mkdir(mode=0o700)
    for name in names:
        if (folder.root / name).exists():
            shutil.copy2(folder.root / name, again.root / name)
    process = started(again)
    try:
        served = Served(again, process, {})
        assert served.ask(site, headers=site.signed_headers(), body=hello(site)) in (200, 412)
        assert served.ask(None) in (403, 429)
        assert (again.nginx / "nginx.conf").read_text() == (folder.nginx / "nginx.conf").read_text()
        assert runs.outcomes(again) == []
    finally:
        assert ended(process) == 0


def _sites(folder: CoordinatorFolder) -> dict:
    return json.loads(Path(folder.sites).read_text())["sites"]

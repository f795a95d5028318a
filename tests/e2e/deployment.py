"""A federation of real processes on this machine: coordinator with nginx, and hospitals.

Everything is started by the commands that an administrator types. As root, each daemon runs as a
user of its own in a network namespace without any interface, and each relay as another user;
otherwise all run as the present user (`separate` says which).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common.privacy.policy import SENTENCE
from common.study import Study, resolve
from deploy.coordinator.enrol import Register
from deploy.coordinator.layout import CoordinatorFolder
from deploy.coordinator.runs import pinned
from deploy.site.layout import SiteFolder
from simulations.flower import free_port, program
from simulations.processes import Family

FEDWARD = program("fedward")
DAEMON_USER, RELAY_USER, GROUP = "daemon", "nobody", "nogroup"
_ONLY_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def separate() -> bool:
    """Whether users and network namespaces can be had here."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        return False
    tried = subprocess.run(
        ["unshare", "-n", *_as(RELAY_USER), sys.executable, "-c", "import common.study"],
        capture_output=True,
        cwd="/",
    )
    return tried.returncode == 0


def _as(user: str) -> list[str]:
    # By way of `env`: what setpriv itself runs is still found with the rights of root.
    return [
        *("setpriv", "--reuid", user, "--regid", GROUP, "--clear-groups", "--no-new-privs"),
        "env",
    ]


@dataclass
class Hospital:
    """One site's folder and its processes."""

    name: str
    folder: SiteFolder
    shard: Path
    daemon: subprocess.Popen[bytes] | None = None
    relay: subprocess.Popen[bytes] | None = None

    @property
    def ledger(self) -> list[dict[str, Any]]:
        path = self.folder.state / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def charges(self) -> list[dict[str, Any]]:
        return [line for line in self.ledger if line["line"] == "released"]

    @property
    def supernode(self) -> int:
        """Process id of the relay's SuperNode."""
        assert self.relay is not None
        for pid in descendants(self.relay.pid):
            if "flower-supernode" in command_line(pid):
                return pid
        raise LookupError("no SuperNode")


@dataclass
class Deployment:
    """A coordinator and hospitals.

    Args:
        shards: By site.
        policy: Lines that every hospital's policy gains.
    """

    folder: Path
    shards: Mapping[str, Path]
    family: Family
    separate: bool = field(default_factory=separate)
    hospitals: dict[str, Hospital] = field(default_factory=dict)
    coordinator: subprocess.Popen[bytes] | None = None

    @property
    def at(self) -> CoordinatorFolder:
        return CoordinatorFolder.at(self.folder / "coordinator")

    # -- commands ---------------------------------------------------------------------------

    def fedward(self, *words: str | Path, fails: bool = False) -> str:
        """Runs a command as an administrator would; its output."""
        done = subprocess.run(
            [FEDWARD, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "200", **_ONLY_ONE_THREAD},
        )
        assert fails or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def coordinate(self, *words: str | Path, fails: bool = False) -> str:
        """A command of `fedward coordinator` on this coordinator."""
        return self.fedward("coordinator", *words, "--folder", self.at.root, fails=fails)

    # -- setting up -------------------------------------------------------------------------

    def set_up(self) -> None:
        """From nothing to running processes, by the steps of the guides."""
        self.fedward(
            *("coordinator", "init", self.folder / "coordinator", "--host", "localhost"),
            *("--port", str(free_port()), "--superlink-port", str(free_port())),
            *("--listen", "127.0.0.1", "--name", "test"),
        )
        self.fedward("site", "approver-key", self.folder / "officer.key")
        for name in self.shards:
            self.enrol(name)
        self.serve()
        for hospital in self.hospitals.values():
            self.start(hospital)

    def enrol(self, name: str) -> Hospital:
        """Invite, request, admission, and a policy with an officer."""
        hospital = Hospital(name, SiteFolder(self.folder / name), self.shards[name])
        invite, admission = self.folder / f"{name}.invite", self.folder / f"{name}.admission"
        self.coordinate("invite", name, "--out", invite)
        users: tuple[str, ...] = ()
        if self.separate:
            users = ("--daemon-user", DAEMON_USER, "--relay-user", RELAY_USER)
            users = (*users, "--socket-group", GROUP)
        self.fedward(
            *("site", "init", hospital.folder.root, "--invite", invite, "--shard", hospital.shard),
            *users,
        )
        self.coordinate("enrol", hospital.folder.request, "--out", admission, "--yes")
        self.fedward("site", "accept", hospital.folder.root, admission)
        self._write_policy(hospital)
        self.hospitals[name] = hospital
        return hospital

    def _write_policy(self, hospital: Hospital) -> None:
        officer = self.fedward("site", "approver-key", self.folder / "officer.key").strip()
        given = tomllib.loads(hospital.folder.policy_file.read_text())
        coordinator = given["coordinators"][0]
        hospital.folder.policy_file.write_text(
            f'coordinators = ["{coordinator}"]\napprovers = {{ officer = "{officer}" }}\n'
            f'without_privacy = "{SENTENCE}"\n'
            "[lifetime.train]\nepsilon = 1000\ndelta = 1e-3\n"
            "[lifetime.validation]\nepsilon = 1000\ndelta = 1e-3\n"
        )

    # -- processes --------------------------------------------------------------------------

    def serve(self) -> None:
        self.coordinator = self._start(
            [FEDWARD, "coordinator", "serve", str(self.at.root)], "coordinator"
        )
        started, port = self.coordinator, self.at.config().port

        def ready() -> bool:
            assert started.poll() is None, f"the coordinator ended\n{self.story()}"
            return listening(port)

        wait_for(ready, 120, "the coordinator", self.story)

    def start(self, hospital: Hospital) -> None:
        self.start_daemon(hospital)
        self.start_relay(hospital)

    def start_daemon(self, hospital: Hospital) -> None:
        command = [FEDWARD, "site", "serve", str(hospital.folder.config_file)]
        if self.separate:
            command = ["unshare", "-n", *_as(DAEMON_USER), *command]
        started = hospital.daemon = self._start(command, f"{hospital.name}-daemon")
        mark = Path(f"{hospital.folder.socket}.ready")

        def ready() -> bool:
            assert started.poll() is None, f"the daemon ended\n{self.story()}"
            return mark.exists() and json.loads(mark.read_text() or "{}").get("pid") is not None

        wait_for(ready, 120, f"the daemon of {hospital.name}", self.story)

    def start_relay(self, hospital: Hospital, *, command: Sequence[str] | None = None) -> None:
        words = [*(command or [FEDWARD, "site", "join"]), str(hospital.folder.relay.root)]
        if self.separate:
            words = [*_as(RELAY_USER), *words]
        hospital.relay = self._start(words, f"{hospital.name}-relay")

    def _start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "HOME": "/nonexistent", **_ONLY_ONE_THREAD}
        return self.family.start(command, env=env, cwd=Path("/"), log=self.folder / f"{log}.log")

    # -- studies ----------------------------------------------------------------------------

    def settled(self, study: Study, *, private: bool = True) -> Path:
        """The study with its keys pinned and its noise settled, as hospitals approve it."""
        path = self.folder / f"{study.name}.toml"
        path.write_text(resolve(pinned(study, Register.read(self.at)), private=private).to_toml())
        return path

    def approve(self, study: Path, *sites: str, runs: int = 1) -> None:
        """The officer of each hospital lets the study in; as the daemon's user would."""
        for name in sites or self.hospitals:
            config = self.hospitals[name].folder.config_file
            words = ["site", "approve", str(study), "--as", "officer", "--yes", "--runs", str(runs)]
            words += ["--key", str(self.folder / "officer.key"), "--config", str(config)]
            self.fedward(*words)
            self._restore_owner(self.hospitals[name])

    def _restore_owner(self, hospital: Hospital) -> None:
        if self.separate:  # the test runs as root, an officer would run as the daemon's user
            for path in hospital.folder.state.rglob("*"):
                shutil.chown(path, DAEMON_USER, GROUP)

    def submit(self, study: Path, run: str) -> None:
        self.coordinate("submit", study, "--run-id", run)

    def run_folder(self, run: str) -> Path:
        return self.at.runs / run

    def lines(self, run: str) -> list[dict[str, Any]]:
        path = self.run_folder(run) / "rounds.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def await_round(self, run: str, number: int, seconds: float = 180) -> None:
        """Until `number` training rounds have been aggregated."""

        def reached() -> bool:
            self._not_failed(run)
            done = [line["completed"] for line in self.lines(run)]
            return bool(done) and max(done) >= number

        wait_for(reached, seconds, f"round {number} of {run}", self.story)

    def await_training(self, hospital: Hospital, seconds: float = 180) -> None:
        """Until the hospital is in the middle of a round."""
        status = hospital.folder.state / "status.json"

        def training() -> bool:
            shown = json.loads(status.read_text()) if status.exists() else {}
            return shown.get("phase") == "training"

        wait_for(training, seconds, f"training at {hospital.name}", self.story)

    def await_end(self, run: str, seconds: float = 300) -> dict[str, Any]:
        """The run's report."""

        def ended() -> bool:
            self._not_failed(run)
            return (self.run_folder(run) / "report.json").exists()

        wait_for(ended, seconds, f"the end of {run}", self.story)
        report: dict[str, Any] = json.loads((self.run_folder(run) / "report.json").read_text())
        return report

    def adapter(self, run: str) -> dict[str, np.ndarray]:
        """The published adapter."""
        return adapter_in(self.run_folder(run))

    def _not_failed(self, run: str) -> None:
        failed = self.run_folder(run) / "failed.json"
        assert not failed.exists(), f"{failed.read_text()}\n{self.story()}"

    def story(self) -> str:
        """Last lines of every log, for a failing test."""
        logs = [*self.folder.glob("*.log"), *self.at.logs.glob("*.log")]
        tails = (
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(logs)
        )
        return "\n".join(tails)


@contextmanager
def deployed(shards: Mapping[str, Path]) -> Iterator[Deployment]:
    """A deployment in a folder with a short name, which other users may enter; all of it is gone
    afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with Family() as family:
            there = {}
            for name, shard in shards.items():
                there[name] = folder / "shards" / name
                shutil.copytree(shard, there[name], copy_function=shutil.copyfile)
                there[name].chmod(0o755)
            made = Deployment(folder, there, family)
            made.set_up()
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def adapter_in(folder: Path) -> dict[str, np.ndarray]:
    """The adapter that a run published in its folder."""
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    assert files
    return {f"{f.stem}/{name}": a for f in files for name, a in load_file(f).items()}


def wait_for(
    condition: Callable[[], bool],
    seconds: float,
    what: str,
    story: Callable[[], str] = lambda: "",
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{story()}"
        time.sleep(0.1)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, nearest first."""
    found, wave = [], [pid]
    while wave:
        wave = [int(child) for parent in wave for child in _children(parent)]
        found += wave
    return found


def _children(pid: int) -> list[str]:
    try:
        tasks = Path(f"/proc/{pid}/task")
        return [c for t in tasks.iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

"""`flwr run` with its surroundings: a private Flower home, free ports, a daemon, a real outcome.

Flower's own CLI exits 0 when a run failed, leaves its SuperLink behind, and lets the SuperLink's
working directory shadow the app's code in Ray workers. Here the SuperLink runs in an empty folder,
everything started ends with the launcher, and failure is an error with its reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.errors import FedwardError
from common.study import Study
from simulations.bundle import assemble
from simulations.display import Display
from simulations.flower import environment, free_port, program
from simulations.processes import Family, sigterm_interrupts
from simulations.stories import stories, told

_STATUS = "/fedward.Site/Status"
_TICK_SECONDS = 0.25
_SUBMISSIONS = 3
_RAY_TOO_SLOW = "timed out during startup"


class LaunchError(FedwardError):
    """A run that failed; the text says why and where its logs are."""

    code = "run-failed"


@dataclass(frozen=True)
class Run:
    """What to launch.

    Attributes:
        study: Resolved study; written to `out/study.toml`.
        out: Absolute folder of the results.
        run_id: Identity of the run; a resumed run keeps the one in its checkpoint.
        coordinator_key: File of the coordinator's Ed25519 key.
        daemon: Command of the site daemon, which listens on the socket it is told of; see
            `launch`.
        start: Absolute folder of the adapter that the study starts from.
    """

    study: Study
    out: Path
    run_id: str
    resume: bool
    coordinator_key: Path
    daemon: Callable[[Path], Sequence[str]]
    start: Path | None = None


def launch(run: Run, display: Display) -> None:
    """Runs the study through `flwr run` and returns when it has completed.

    `run.daemon` is called with the path of a Unix socket and returns the command to start.

    Raises:
        LaunchError: The run failed or something needed ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything that was started is gone by then.
    """
    logs = run.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for stale in ("failed.json", "report.json"):
        (run.out / stale).unlink(missing_ok=True)
    (run.out / "study.toml").write_text(run.study.to_toml())
    # Short, because the paths of Unix sockets end at 107 bytes, and Ray adds 60 of its own.
    private = Path(tempfile.mkdtemp(prefix="fedward-", dir=_short_folder()))
    try:
        with sigterm_interrupts(), Family() as family:
            _Session(run, display, family, private, logs).run_to_end()
    finally:
        shutil.rmtree(private, ignore_errors=True)


class _Session:
    """One launch: the processes, and looking after them."""

    def __init__(
        self, run: Run, display: Display, family: Family, private: Path, logs: Path
    ) -> None:
        self.run, self.display, self.family = run, display, family
        self.private, self.logs = private, logs
        self.socket = private / "daemon.sock"
        self.neutral = private / "empty"
        self.neutral.mkdir()
        self.env = {
            **environment(private / "flower"),
            "FEDWARD_SOCKET": str(self.socket),
            "RAY_TMPDIR": str(private),
        }
        self.watched: dict[str, subprocess.Popen[bytes]] = {}
        # Of rounds.jsonl, those that were shown: in an earlier session already.
        self._lines = len(_read_lines(run.out)) if run.resume else 0

    def run_to_end(self) -> None:
        (self.private / "flower").mkdir()
        for log in ("daemon", "superlink", "run"):
            (self.logs / f"{log}.log").unlink(missing_ok=True)
        self.display.heading("starting Flower and the hospitals' daemon")
        self.watched["daemon"] = self._start("daemon", self.run.daemon(self.socket))
        address = f"127.0.0.1:{free_port()}"
        self.watched["superlink"] = self._start(
            "superlink",
            [
                program("flower-superlink"),
                "--insecure",
                "--simulation",
                "--isolation",
                "subprocess",
                "--host",
                "127.0.0.1",
                "--port",
                address.rpartition(":")[2],
            ],
        )
        (self.private / "flower" / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n'
            f'[superlink.local]\naddress = "{address}"\ninsecure = true\n'
        )
        app = assemble(self.private / "app")
        self._await("Flower's SuperLink", 120, lambda: _healthy(address))
        # The daemon first: Ray gives its agents 15 s to start, and they need the processors.
        self._await("the daemon", 300, lambda: _listening(self.socket))
        for left in reversed(range(_SUBMISSIONS)):
            if self._follow(self._start("run", self._command(app)), last=not left):
                return
            self.display.say("Ray did not start in time on this busy machine; trying again")

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return self.family.start(
            command, env=self.env, cwd=self.neutral, log=self.logs / f"{name}.log"
        )

    def _command(self, app: Path) -> list[str]:
        nodes = max(1, min(len(self.run.study.federation.sites), os.cpu_count() or 1, 4))
        config = {
            "study": str(self.run.out / "study.toml"),
            "start": str(self.run.start or ""),
            "out-dir": str(self.run.out),
            "run-id": self.run.run_id,
            "resume": self.run.resume,
            "coordinator-key": str(self.run.coordinator_key),
        }
        # Relays only wait: a share of a processor each, and no GPU, which is the daemon's.
        federation = (
            f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
            f"init-args-num-cpus={nodes} init-args-num-gpus=0"
        )
        return [
            program("flwr"),
            "run",
            str(app),
            "local",
            "--stream",
            "--run-config",
            " ".join(f"{k}={json.dumps(v)}" for k, v in config.items()),
            "--federation-config",
            federation,
        ]

    # -- looking after it -------------------------------------------------------------------

    def _await(self, what: str, seconds: float, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._error(f"{what} did not answer in {seconds:.0f} s")
            time.sleep(0.1)

    def _follow(self, submitted: subprocess.Popen[bytes], *, last: bool) -> bool:
        """Shows progress until the report is there (True), or Ray did not start (False)."""
        ended_at = None
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            ask = channel.unary_unary(_STATUS)
            while True:
                self.family.watch()
                self._show(ask)
                if (self.run.out / "report.json").exists():
                    self._show(ask)
                    return True
                self._check_failed()
                self._check_alive()
                if submitted.poll():
                    raise self._error("flwr run could not start the run", "run")
                # The stream of the run's log ends with the run. The coordinator writes its outcome
                # before that, unless something below it broke.
                if submitted.returncode == 0:
                    ended_at = ended_at or time.monotonic()
                    if time.monotonic() - ended_at > 2:
                        text = (self.logs / "run.log").read_text(errors="replace")
                        if _RAY_TOO_SLOW in text and not last:
                            (self.logs / "run.log").rename(self.logs / "run-failed.log")
                            return False
                        raise self._error(f"the run ended: {self._flower_says()}", "run")
                time.sleep(_TICK_SECONDS)

    def _show(self, ask: Callable[..., bytes]) -> None:
        lines = _read_lines(self.run.out)
        self._lines = min(self._lines, len(lines))  # a resumed run drops lines without checkpoint
        for text in lines[self._lines :]:
            self._lines += 1
            self.display.line(json.loads(text))
        with contextlib.suppress(grpc.RpcError, ValueError, TypeError):
            status = json.loads(ask(b"", timeout=1.0))
            sites = status.get("sites", []) if isinstance(status, Mapping) else status
            phases = {site.get("phase") for site in sites}
            for phase in ("encoding", "training", "evaluating"):
                if phase in phases:
                    self.display.heading(phase)
                    break
            self.display.sites(sites)

    def _check_failed(self) -> None:
        path = self.run.out / "failed.json"
        if path.exists():
            reason = json.loads(path.read_text())
            why = stories(self.run.out)
            raise LaunchError(
                reason["reason"] + told(why),
                cure=f"mend that; the logs are in {self.logs}"
                if why
                else f"{reason.get('cure') or 'read the logs'}\n  logs: {self.logs}",
            )

    def _check_alive(self) -> None:
        for name, process in self.watched.items():
            if process.poll() is not None:
                raise self._error(f"the {name} ended with exit code {process.returncode}", name)

    def _error(self, what: str, log: str = "superlink") -> LaunchError:
        path = self.logs / f"{log}.log"
        tail = path.read_text(errors="replace").strip().splitlines()[-8:] if path.exists() else []
        quoted = "".join(f"\n  | {line}" for line in tail)
        return LaunchError(f"{what}{quoted}", cure=f"the logs are in {self.logs}")

    def _flower_says(self) -> str:
        """Status of the run by `flwr ls`, the only place where Flower tells it."""
        listed = subprocess.run(
            [program("flwr"), "ls", "local", "--format", "json"],
            env=self.env,
            cwd=self.neutral,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        with contextlib.suppress(ValueError, LookupError, TypeError):
            found = json.loads(listed.stdout[listed.stdout.index("{") :])["runs"][0]
            return f"{found['status']} {found.get('status-details', '')}".strip()
        return "without a report"


def _read_lines(out: Path) -> list[str]:
    """The complete lines of rounds.jsonl."""
    path = out / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _short_folder() -> str | None:
    """The system's folder for temporary files, unless its name is too long for sockets below."""
    return None if len(tempfile.gettempdir()) <= 20 else "/tmp"

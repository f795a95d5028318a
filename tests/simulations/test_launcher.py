"""`flwr run` end to end with sites that do nothing: outcome, overhead, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.study import Study
from simulations.display import Display
from simulations.launcher import LaunchError, Run, launch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


def display(run: Run) -> Display:
    return Display(Console(stderr=True), run.study.federation.rounds)


def test_four_sites_on_two_nodes(fake_run: Any, processes_under: Any, tmp_path: Path) -> None:
    run = fake_run()
    launch(run, display(run))
    rows = [json.loads(x) for x in (run.out / "rounds.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["train", "train", "train", "evaluate"]
    assert all(r["sites"] == ["alpha", "beta", "gamma", "delta"] for r in rows)
    assert max(r["seconds"] for r in rows[1:]) < 3  # sites do nothing: all of it is overhead
    report = json.loads((run.out / "report.json").read_text())
    assert report["status"] == "completed"
    assert report["rounds"] == 3
    assert (run.out / "adapter" / "projectors.safetensors").exists()
    assert Study.from_toml((run.out / "study.toml").read_text()).hash == run.study.hash
    assert processes_under(str(tmp_path)) == []


def test_a_failed_run_is_an_error_with_its_reason(
    fake_run: Any, processes_under: Any, tmp_path: Path
) -> None:
    run = fake_run(quorum=1.0, startup_seconds=3)
    without = [sys.executable, str(HERE.parent / "server" / "fake_sites.py")]
    short = Run(
        run.study,
        run.out,
        run.run_id,
        False,
        run.coordinator_key,
        lambda socket: [*without, str(socket), str(tmp_path / "keys"), "0", "alpha", "beta"],
    )
    with pytest.raises(LaunchError, match=r"(?s)appeared in 3 s.*logs: "):
        launch(short, display(run))
    assert json.loads((run.out / "failed.json").read_text())["code"] == "federation-failed"
    assert not (run.out / "report.json").exists()
    assert processes_under(str(tmp_path)) == []


def test_a_daemon_that_ends_is_quoted(fake_run: Any) -> None:
    run = fake_run()
    broken = Run(
        run.study,
        run.out,
        run.run_id,
        False,
        run.coordinator_key,
        lambda socket: [sys.executable, "-c", "import sys; sys.exit('no records.parquet')"],
    )
    with pytest.raises(LaunchError, match=r"(?s)daemon ended with exit code 1.*no records.parquet"):
        launch(broken, display(run))


SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from common.study import Study
from simulations.display import Display
from simulations.launcher import Run, launch
study, base, fake, delay, *names = sys.argv[1:]
base = Path(base)
command = lambda socket: [sys.executable, fake, str(socket), str(base / "keys"), delay, *names]
run = Run(Study.load(study), base / "out", "run", False, base / "coordinator.key", command)
try:
    launch(run, Display(Console(), 3))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("sign", "when"), [(signal.SIGINT, "superlink.log"), (signal.SIGTERM, "round 1/3")]
)
def test_interrupted_at_any_time_leaves_no_process(
    study: Study, tmp_path: Path, processes_under: Any, sign: signal.Signals, when: str
) -> None:
    (tmp_path / "in.toml").write_text(study.to_toml())
    names = list(study.federation.sites)
    fake = HERE.parent / "server" / "fake_sites.py"
    output = (tmp_path / "output").open("w+")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(tmp_path / "in.toml"),
            str(tmp_path),
            str(fake),
            "2",
            *names,
        ],
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        started = (tmp_path / "out" / "logs" / when).exists()
        if started or when in (tmp_path / "output").read_text():
            break
        time.sleep(0.1)
    assert process.poll() is None, (tmp_path / "output").read_text()
    os.killpg(process.pid, sign)
    assert process.wait(timeout=60) == 130
    assert processes_under(str(tmp_path)) == []

"""The relay forwards bytes, answers with codes, and starts one local daemon."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.relay import local
from client.relay.app import app
from common.envelope import error_code, from_record, request_message
from common.identity import Identity, open_envelope
from common.messages import Answer, Envelope, Request

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture
def daemon(tmp_path_factory: Any) -> Any:
    path = REPOSITORY / "tests" / "server" / "fake_sites.py"
    spec = importlib.util.spec_from_file_location("fake_sites_of_relay", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("r")
    sites = module.FakeSites(["alpha"], folder)
    sites.socket = folder / "s"
    server = module.serve(sites, sites.socket)
    yield sites
    server.stop(None)


def context(socket: Path | str) -> Context:
    return Context(1, 1, {"fedward-socket": str(socket)}, RecordDict(), {})


def sealed(tmp_path: Path, request: Request) -> Envelope:
    return Identity.open(tmp_path / "c.key").seal(request)


def test_forwards_and_answers(daemon: Any, tmp_path: Path) -> None:
    envelope = sealed(tmp_path, Request(kind="initialise", run="r", site="alpha"))
    reply = app(request_message(envelope, "initialise", 1, seconds=30), context(daemon.socket))
    answered = from_record(reply.content)
    answer = open_envelope(answered, Answer, [daemon.keys["alpha"].public])
    assert answer.request_digest == Request.model_validate_json(envelope.header).digest
    assert answered.arrays["bias"].tolist() == [1.0, 1.0]
    assert daemon.calls == [("initialise", "alpha", 0, 0)]


def test_unreachable_daemon_is_a_code(tmp_path: Path) -> None:
    envelope = sealed(tmp_path, Request(kind="train", run="r", site="alpha"))
    message = request_message(envelope, "train", 1, seconds=5)
    reply = app(message, context(tmp_path / "secret-patient-7"))
    assert error_code(reply) == "daemon-unreachable"
    assert "secret" not in str(reply.content)


def test_anything_else_is_a_code(daemon: Any) -> None:
    message = Message(
        RecordDict({"x": ConfigRecord({"y": 1})}), dst_node_id=1, message_type="query"
    )
    assert error_code(app(message, context(daemon.socket))) == "relay-failed"
    daemon.behave = lambda request: 1 / 0
    assert not daemon.calls


def test_a_late_daemon_is_a_code(daemon: Any, tmp_path: Path) -> None:
    release = threading.Event()
    daemon.behave = lambda request: release.wait(20) and None
    envelope = sealed(tmp_path, Request(kind="train", run="r", site="alpha"))
    reply = app(request_message(envelope, "train", 1, seconds=1), context(daemon.socket))
    release.set()
    assert error_code(reply) == "daemon-late"


LISTEN = """
import os, socket, sys, time
from pathlib import Path
home = Path(sys.argv[1])
with (home / "starts").open("a") as f: f.write(f"{os.environ.get('PYTHONPATH')} {os.getcwd()}\\n")
s = socket.socket(socket.AF_UNIX); s.bind(str(home / "daemon.sock")); s.listen()
time.sleep(20)
"""


def test_relays_start_one_daemon(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("FEDWARD_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", "/the/bundle")
    found: list[Path] = []
    command = [sys.executable, "-c", LISTEN, str(home)]
    threads = [
        threading.Thread(target=lambda: found.append(local.local_socket(command, seconds=60)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / "daemon.sock"] * 4
    assert (home / "starts").read_text().splitlines() == [f"None {home}"]


def test_a_daemon_that_ends_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDWARD_HOME", str(tmp_path))
    with pytest.raises(local.LocalDaemonError, match=r"(?s)ended with 1; log: .*no room left"):
        local.local_socket([sys.executable, "-c", "import sys; sys.exit('no room left')"])


@pytest.mark.parametrize("module", ["client.relay.app", "server.app"])
def test_no_heavy_imports(module: str) -> None:
    """Flower starts a process per message, and the coordinator handles arrays only."""
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'polars', 'opacus', 'sklearn', 'tensorflow'}\n"
        "print(sorted(heavy & set(sys.modules)), 'client.site' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert out.stdout.strip() == "[] False"

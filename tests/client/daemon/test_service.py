"""The daemon as a process: socket, calls, ending."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.site.daemon import service
from client.site.daemon import work as work_module
from client.site.daemon.config import ConfigError, DaemonConfig
from client.site.daemon.service import CALL, STATUS, UNLIMITED, Daemon, SocketError, serve
from common.errors import FedwardError
from common.identity import Identity, open_envelope
from common.messages import Answer, Envelope


def call(socket: Path, packed: bytes, method: str = CALL) -> bytes:
    with grpc.insecure_channel(f"unix:{socket}", options=UNLIMITED) as channel:
        answer: bytes = channel.unary_unary(method)(packed, timeout=60, wait_for_ready=True)
        return answer


@pytest.fixture
def world(ward_module: Any, tmp_path: Path) -> Any:
    world = ward_module.Ward(tmp_path)
    world.daemon._lock.release()  # the tests start daemons of their own
    return world


def test_a_round_over_the_socket(ward_module: Any, world: Any) -> None:
    study = ward_module.make_study()
    socket = world.config.socket
    with Daemon(world.config):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        ready = json.loads(Path(f"{socket}.ready").read_text())
        assert ready == {"pid": os.getpid(), "socket": str(socket), "sites": ["a"]}
        (idle,) = json.loads(call(socket, b"", STATUS))
        assert (idle["site"], idle["phase"]) == ("a", "idle")

        def ask(kind: str, round_: int = 0, arrays: Any = None) -> Any:
            request = world.request(kind, study, round_)
            packed = call(socket, world.coordinator.seal(request, arrays).pack())
            envelope = Envelope.unpack(packed)
            keys = [world.hospitals["a"].identity.public]
            answer = open_envelope(envelope, Answer, keys)
            assert answer.refusal is None
            return envelope.arrays

        ask("prepare")
        assert ask("train", 1, ask("initialise"))
        (done,) = json.loads(call(socket, b"", STATUS))
        assert (done["phase"], done["round"], done["step"]) == ("ready", 1, 2)
        assert 0 < done["epsilon"]["train"] < study.privacy.epsilon
    assert not socket.exists()
    assert not Path(f"{socket}.ready").exists()


def test_the_same_request_twice_at_once_is_charged_once(ward_module: Any, tmp_path: Path) -> None:
    study = ward_module.make_study(("a", "b"))
    world = ward_module.Ward(tmp_path, ("a", "b"))
    initial = {site: world.prepared(study, site) for site in "ab"}
    requests = {site: world.request("train", study, 1, site=site) for site in "ab"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda site: world.send(requests[site], initial[site]), "abababab"))
    assert len(set(answers)) == 2
    assert [len(world.charges(site)) for site in "ab"] == [1, 1]


def test_a_message_that_is_too_large_is_turned_away(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reaches the socket must not fill the memory; the daemon goes on for others."""
    monkeypatch.setattr(service, "_REQUEST_BYTES", 2**20)
    with Daemon(world.config):
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            call(world.config.socket, bytes(2**20 + 1))
        assert json.loads(call(world.config.socket, b"", STATUS))[0]["site"] == "a"


def test_a_request_repeated_many_times_leaves_room_for_others(ward_module: Any, world: Any) -> None:
    """While a round is computed, a relay repeats a genuine request; it is charged once."""
    study = ward_module.make_study()
    packed = world.coordinator.seal(world.request("train", study, 1), world.prepared(study)).pack()
    prepare = world.coordinator.seal(world.request("prepare", study)).pack()

    def code() -> str:
        try:
            call(world.config.socket, packed)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    with Daemon(world.config) as daemon, ThreadPoolExecutor(30) as pool:
        call(world.config.socket, prepare)
        with daemon.hospitals["a"].bench.lock:
            repeated = [pool.submit(code) for _ in range(25)]
            done, _ = wait(repeated, 30, FIRST_COMPLETED)
            assert {each.result() for each in done} == {"RESOURCE_EXHAUSTED"}
            assert json.loads(call(world.config.socket, b"", STATUS))[0]["site"] == "a"
        assert {each.result() for each in repeated} == {"OK", "RESOURCE_EXHAUSTED"}
    assert len(world.charges()) == 1


def test_socket_in_use_and_socket_left_behind(world: Any) -> None:
    socket = world.config.socket
    with Daemon(world.config), pytest.raises(SocketError, match=rf"in use .*{os.getpid()}"):
        Daemon(world.config)
    socket.touch()  # what a killed daemon leaves
    with Daemon(world.config):
        assert json.loads(call(socket, b"", STATUS))[0]["site"] == "a"


def test_a_path_too_long_for_a_socket_is_named(world: Any, tmp_path: Path) -> None:
    far = tmp_path / ("d" * 100) / "d.sock"
    with pytest.raises(SocketError, match="longer than the 107 bytes"):
        Daemon(world.config.model_copy(update={"socket": far}))


def test_it_ends_when_idle(world: Any) -> None:
    start = time.monotonic()
    serve(world.config.model_copy(update={"idle_exit_seconds": 0.3}))
    assert 0.3 < time.monotonic() - start < 20
    assert not world.config.socket.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_middle_of_a_round(
    ward_module: Any, world: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = ward_module.make_study()
    training = threading.Event()

    def endless(self: Any) -> Any:
        training.set()
        while True:
            self._hospital.check_stopping()
            time.sleep(0.01)

    monkeypatch.setattr(work_module.TrainingRound, "run", endless)
    refused: list[bytes] = []

    def coordinator() -> None:
        socket = world.config.socket
        while not socket.exists():
            time.sleep(0.02)
        call(socket, world.coordinator.seal(world.request("prepare", study)).pack())
        request = world.request("initialise", study)
        initial = Envelope.unpack(call(socket, world.coordinator.seal(request).pack())).arrays
        timer = threading.Thread(target=lambda: training.wait(30) and os.kill(os.getpid(), number))
        timer.start()
        request = world.request("train", study, 1)
        refused.append(call(socket, world.coordinator.seal(request, initial).pack()))

    caller = threading.Thread(target=coordinator)
    caller.start()
    serve(world.config)
    caller.join(30)
    assert b'"refusal":"internal"' in refused[0]
    assert len(world.charges()) == 1, "charged and given up"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_command_runs_a_daemon_and_ends_on_sigterm(ward_module: Any, world: Any) -> None:
    file = world.folder / "daemon.toml"
    file.write_text(world.config.to_toml())
    program = "from client.site.daemon.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(file)], stderr=subprocess.PIPE, text=True
    )
    try:
        ready = Path(f"{world.config.socket}.ready")
        deadline = time.monotonic() + 240
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        study = ward_module.make_study()
        packed = world.coordinator.seal(world.request("prepare", study)).pack()
        assert b'"refusal":null' in call(world.config.socket, packed)
        with pytest.raises(SocketError, match=f"process {process.pid}"):
            Daemon(world.config)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert "Traceback" not in (process.stderr.read() if process.stderr else "")
    assert not world.config.socket.exists()


def test_configuration_is_read_with_its_mistakes_named(world: Any, tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text(world.config.to_toml())
    assert DaemonConfig.load(file) == world.config
    key = Identity.open(tmp_path / "k").public
    lifetime = "{ train = { epsilon = 20 }, validation = { epsilon = 10 } }"
    file.write_text(
        f'socket = "d.sock"\n[[sites]]\nname = "a"\nshard = "data"\nstate = "s"\n'
        f'policy = {{ coordinators = ["{key}"], lifetime = {lifetime} }}\n'
    )
    config = DaemonConfig.load(file)
    assert config.sites[0].state == tmp_path / "s"
    assert config.socket == tmp_path / "d.sock"
    assert config.sites[0].policy.approvers == {}
    assert not config.sites[0].policy.allows("none")

    for text, message in (
        ("socket = ", "not valid TOML"),
        ('socket = "s"\nsites = []\n', "sites"),
        (file.read_text() + "colour = 1\n", "sites.0.colour: unknown key"),
        (file.read_text().replace(key, "xyz"), "policy.coordinators"),
        (file.read_text() + file.read_text().partition("\n")[2], "two sites have the name 'a'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            DaemonConfig.load(file)
        file.write_text(
            f'socket = "d.sock"\n[[sites]]\nname = "a"\nshard = "data"\nstate = "s"\n'
            f'policy = {{ coordinators = ["{key}"], lifetime = {lifetime} }}\n'
        )
    with pytest.raises(ConfigError, match="cannot read"):
        DaemonConfig.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sites = 3", "sites"),
        ('socket = "s"\n[[sites]]\nname = "a"\npolicy = "~nobody-here/p.toml"', "no home folder"),
        ('socket = "s"\n[[sites]]\nname = "a"\npolicy = "p\\u0000.toml"', "p"),
        ("a = " + "[" * 5000, "not valid TOML"),
        (
            'socket = "s"\n[[sites]]\nname = "a"\nshard = "d"\nstate = "t"\n'
            "[sites.policy.lifetime.train]\nepsilon = 1e-20",
            "lifetime.train.epsilon",
        ),
    ],
)
def test_no_configuration_makes_a_traceback(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(FedwardError, match=message):
        DaemonConfig.load(file)

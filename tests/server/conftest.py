"""A study, fake sites, and a Grid that delivers to them within the process."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from common.envelope import from_record, to_record
from common.identity import Identity
from common.messages import Envelope
from common.study import Study, resolve
from server.exchange import Exchange
from server.federation import Federation

NAMES = ["alpha", "beta", "gamma", "delta"]
TOML = """
name = "fake"
[sources.age]
modality = "table"
encoder = "demographics"
[tasks.death]
prevalence = 0.2
[privacy]
mode = "none"
spare_rounds = 0.5
[federation]
rounds = 4
quorum = 0.75
deadline_seconds = 100
startup_seconds = 50
retries = 1
"""


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeGrid:
    """Delivers at once to in-process sites.

    Attributes:
        nodes: Ids of the nodes present.
        fate: Turns (node, envelope) into None, `"lost"` (no reply ever), any other text (the node
            fails at once) or the seconds after which the reply arrives.
    """

    def __init__(self, sites: Any, clock: Clock, nodes: list[int]) -> None:
        self.sites, self.clock, self.nodes = sites, clock, nodes
        self.fate: Callable[[int, Envelope], Any] = lambda node, envelope: None
        self.pushed: list[tuple[int, Envelope]] = []
        self._replies: dict[str, tuple[float, Message]] = {}
        self._ids = itertools.count(1)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: list[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.nodes:
                continue
            identifier = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = identifier
            identifiers.append(identifier)
            envelope = from_record(message.content)
            self.pushed.append((node, envelope))
            fate = self.fate(node, envelope)
            if fate == "lost":
                continue
            if isinstance(fate, str):
                reply = Message(Error(code=5, reason="secret=/data/patient7"), reply_to=message)
            else:
                answer = Envelope.unpack(self.sites(envelope.pack()))
                reply = Message(to_record(answer), reply_to=message)
            delay = fate if isinstance(fate, float) else 0.0
            self._replies[identifier] = (self.clock.now + delay, reply)
        return identifiers

    def pull_messages(self, identifiers: list[str]) -> list[Message]:
        there = [i for i in identifiers if i in self._replies]
        due = [i for i in there if self._replies[i][0] <= self.clock.now]
        return [self._replies.pop(i)[1] for i in due]


@pytest.fixture(scope="session")
def fake_sites() -> ModuleType:
    path = Path(__file__).with_name("fake_sites.py")
    spec = importlib.util.spec_from_file_location("fake_sites", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_sites"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study() -> Study:
    sizes = {name: 100 * (i + 1) for i, name in enumerate(NAMES)}
    return resolve(Study.from_toml(TOML), sites=sizes)


class World:
    """Everything that a test of the coordinator touches."""

    def __init__(self, module: ModuleType, study: Study, folder: Path, nodes: list[int]) -> None:
        self.study, self.folder = study, folder
        self.clock = Clock()
        self.sites = module.FakeSites(list(study.federation.sites), folder / "keys")
        self.grid = FakeGrid(self.sites, self.clock, nodes)

    def federation(
        self, out: str = "out", *, run: str = "r1", study: Study | None = None, **more: Any
    ) -> Federation:
        chosen = study or self.study
        (self.folder / out).mkdir(exist_ok=True)
        exchange = Exchange(
            self.grid,
            Identity.open(self.folder / "coordinator.key"),
            chosen,
            run,
            clock=self.clock,
            sleep=self.clock.sleep,
        )
        return Federation(exchange, chosen, self.folder / out, clock=self.clock, **more)


@pytest.fixture
def world(fake_sites: ModuleType, study: Study, tmp_path: Path) -> World:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return World(fake_sites, study, tmp_path, [11, 12])

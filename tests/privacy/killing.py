"""A daemon that is killed (SIGKILL) at random moments, and what its ledger says afterwards.

`FEDWARD_KILLS=200 pytest tests/privacy/test_kill.py` does it 200 times. A nursery process imports
torch once and forks a daemon on demand, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from client.site.daemon.config import DaemonConfig
from client.site.daemon.service import CALL, UNLIMITED
from common.identity import Identity, open_envelope
from common.messages import Answer, Arrays, Envelope, Request
from common.privacy.book import Book
from common.privacy.receipts import Receipt
from common.study import Study

_NURSERY = """
import os, signal, sys
from client.site.daemon.config import DaemonConfig
from client.site.daemon.service import serve
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        serve(DaemonConfig.load(line.strip()))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


class Nursery:
    """Starts one daemon at a time. Use as a context manager."""

    def __init__(self, config: Path) -> None:
        self.config, self.socket = config, DaemonConfig.load(config).socket
        self._ready = self.socket.with_name(self.socket.name + ".ready")
        self._log = config.with_name("daemon.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.pid: int | None = None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid is not None:
            self.kill()
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def start(self) -> None:
        """A fresh daemon; returns when it listens."""
        self._ready.unlink(missing_ok=True)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{self.config}\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())
        for _ in range(600):
            if self._ready.exists():
                return
            time.sleep(0.05)
        raise TimeoutError(f"the daemon does not listen; see {self._log.name}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self.pid is not None
        assert self._process.stdout
        os.kill(self.pid, signal.SIGKILL)
        assert self._process.stdout.readline().strip() == "gone"
        self.pid = None


@dataclass
class Outcome:
    """What the coordinator saw, and how the kills fell.

    Attributes:
        answers: Packed answers that arrived, by request digest; each is a release.
        kinds: Of the request of each.
        landed: How often the kill came before the answer did.
        lost: Requests that were charged and whose answer was lost.
    """

    answers: dict[str, bytes] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    landed: int = 0
    lost: int = 0
    torn: int = 0


class Killer:
    """A coordinator whose hospital is killed over and over.

    Args:
        world: A `ward.Ward` of a real hospital, whose officer approved `study`.
    """

    def __init__(self, world: Any, study: Study, folder: Path, seed: int) -> None:
        self.world, self.study, self.folder = world, study, folder
        self.ledger = folder / "sites" / "a" / "ledger.jsonl"
        self.site_key = Identity.open(folder / "sites" / "a" / "site.key").public
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.receipts: list[Receipt] = []
        self._seconds: dict[str, float] = {}

    def run(self, nursery: Nursery, kills: int) -> Outcome:
        """Kills `kills` times, in training and in evaluation, and checks after each."""
        nursery.start()
        initial = self._prepared(nursery)
        for kind in ("train", "evaluate"):  # how long each takes, undisturbed
            began = time.monotonic()
            self._ask(nursery, self.world.request(kind, self.study, 1), initial)
            self._seconds[kind] = time.monotonic() - began
        nursery.kill()
        for number in range(2, kills + 2):
            nursery.start()
            self._prepared(nursery)
            kind = "evaluate" if number % 4 == 0 else "train"
            request = self.world.request(kind, self.study, number)
            self._ask_and_kill(nursery, request, initial)
            self.check(number)
            if number % 5 == 0:  # what becomes of the very same request
                nursery.start()
                self._prepared(nursery)
                self._ask_again(nursery, request, initial)
                nursery.kill()
                self.check(number)
        return self.outcome

    def check(self, number: int) -> None:
        """The ledger verifies, and holds a charge for every answer that was ever given."""
        with contextlib.suppress(FileNotFoundError):
            self.outcome.torn = self.ledger.with_name("ledger.torn").read_bytes().count(b"\n")
        book = Book.read(self.ledger) if _whole(self.ledger) else None
        if book is None:
            return  # torn: the next start sets it aside, and the next check reads it
        assert not book.anomalies, f"after kill {number}"
        charged = {line.request_digest for line in book.released(self.study.hash)}
        assert set(self.outcome.answers) <= charged, f"a release without a charge, kill {number}"
        assert len(charged) == len(book.released(self.study.hash)), "one request, one charge"
        for receipt in self.receipts:
            assert receipt.genuine
            assert book.holds(receipt), f"line {receipt.lines} is gone after kill {number}"

    def _ask_and_kill(self, nursery: Nursery, request: Request, arrays: Arrays) -> None:
        asking = threading.Thread(target=self._ask, args=(nursery, request, arrays))
        asking.start()
        time.sleep(self.random.uniform(0, 1.1 * self._seconds[request.kind]))
        self.outcome.landed += asking.is_alive()
        nursery.kill()
        asking.join()

    def _ask_again(self, nursery: Nursery, request: Request, arrays: Arrays) -> None:
        """Stored bytes, a lost answer, or a first charge; never a second one."""
        digest = self.world.coordinator.seal(request, arrays)
        known = self.outcome.answers.get(_digest(digest))
        answer = self._ask(nursery, request, arrays)
        assert answer is not None
        if known is not None:
            assert self.outcome.answers[_digest(digest)] == known, "other bytes for one request"
        elif answer.refusal is not None:
            assert answer.refusal == "answer-lost"
            self.outcome.lost += 1

    def _prepared(self, nursery: Nursery) -> Arrays:
        answer = self._ask(nursery, self.world.request("prepare", self.study))
        assert answer is not None
        assert answer.refusal is None, answer.refusal
        packed = self._call(nursery, self.world.request("initialise", self.study), None)
        assert packed is not None
        return dict(Envelope.unpack(packed).arrays)

    def _ask(
        self, nursery: Nursery, request: Request, arrays: Arrays | None = None
    ) -> Answer | None:
        packed = self._call(nursery, request, arrays)
        if packed is None:
            return None
        answer = open_envelope(Envelope.unpack(packed), Answer, [self.site_key])
        if answer.refusal is None and request.kind in ("train", "evaluate"):
            self.outcome.kinds[request.kind] += answer.request_digest not in self.outcome.answers
            self.outcome.answers[answer.request_digest] = packed
        if answer.refusal is None:
            self.receipts.append(Receipt.model_validate(answer.body["receipt"]))
        return answer

    def _call(self, nursery: Nursery, request: Request, arrays: Arrays | None) -> bytes | None:
        sealed = self.world.coordinator.seal(request, arrays).pack()
        with grpc.insecure_channel(f"unix:{nursery.socket}", options=UNLIMITED) as channel:
            try:
                packed: bytes = channel.unary_unary(CALL)(sealed, timeout=60)
            except grpc.RpcError:
                return None
        return packed


def make(ward: ModuleType, folder: Path, kills: int) -> tuple[Any, Study, Path]:
    """A real hospital, a study with rounds enough, approved; and the daemon's configuration."""
    study = ward.make_study(
        privacy={"sample_rate": 0.2, "delta": 1e-3, "epsilon": 8.0, "spare_rounds": 1.0},
        training={"steps_per_round": 40},
        evaluation={"validation_fraction": 0.25, "bins": 4, "releases": kills},
        federation={
            "rounds": kills + 2,
            "sites": {"a": {"patients_declared": 30}},
        },
    )
    world = ward.Ward(folder, simulated=False)
    world.approve(study)
    world.daemon._lock.release()
    config = folder / "site.toml"
    config.write_text(world.config.to_toml())
    return world, study, config


def _digest(envelope: Envelope) -> str:
    return Request.model_validate(json.loads(envelope.header)).digest


def _whole(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")

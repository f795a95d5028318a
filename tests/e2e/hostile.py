"""A hospital that misbehaves: something stands between its relay and its daemon, with its key.

The real daemon listens elsewhere, so that whatever the hospital says outside, what it charged can
be held against it. What is said instead is one function per round, from `Turn` to packed bytes.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tomli_w

from client.site.daemon.service import CALL, SERVICE, UNLIMITED
from common.identity import Identity
from common.messages import Answer, Arrays, Envelope, Request
from deploy.site.layout import SiteFolder
from tests.e2e.deployment import Deployment, Hospital


@dataclass(frozen=True)
class Turn:
    """One request to the hospital.

    Attributes:
        seconds: What is left of the relay's patience.
        before: Honest answers so far, by kind and round.
        state: The site's folder of keys and ledger.
        relay: Its process id.
        ask: Sends packed bytes to the daemon and waits that many seconds.
    """

    request: Request
    packed: bytes
    seconds: float
    before: dict[tuple[str, int], bytes]
    state: Path
    relay: int
    ask: Callable[[bytes, float], bytes]

    def honest(self) -> bytes:
        """The daemon's own answer, packed."""
        answer = self.ask(self.packed, self.seconds)
        self.before[self.request.kind, self.request.round] = answer
        return answer

    def opened(self) -> tuple[Answer, Arrays]:
        """The daemon's own answer."""
        envelope = Envelope.unpack(self.honest())
        return Answer.model_validate_json(envelope.header), envelope.arrays

    def signed(self, answer: Answer, arrays: Arrays | None = None) -> bytes:
        """An answer with the site's valid signature."""
        return Identity.open(self.state / "site.key").seal(answer, arrays).pack()


Fault = Callable[[Turn], bytes]


def honest(turn: Turn) -> bytes:
    return turn.honest()


def slow(turn: Turn) -> bytes:
    answer = turn.honest()
    time.sleep(4)
    return answer


def not_a_number(turn: Turn) -> bytes:
    answer, arrays = turn.opened()
    return turn.signed(answer, {n: np.full_like(a, np.nan) for n, a in arrays.items()})


def wrong_shapes(turn: Turn) -> bytes:
    answer, arrays = turn.opened()
    return turn.signed(answer, {n: np.stack([a, a]) for n, a in arrays.items()})


def wrong_names(turn: Turn) -> bytes:
    answer, arrays = turn.opened()
    return turn.signed(answer, {f"{n}.other": a for n, a in arrays.items()})


def too_many_bytes(turn: Turn) -> bytes:
    """48 MB more than the adapter."""
    answer, arrays = turn.opened()
    more = np.random.default_rng(0).normal(size=12_000_000).astype(np.float32)
    return turn.signed(answer, {**arrays, "more": more})


def lying_body(turn: Turn) -> bytes:
    """Steps and ε of the wrong types, beside a sound adapter."""
    answer, arrays = turn.opened()
    body = {**answer.body, "steps": "many", "epsilon": ["none"]}
    return turn.signed(answer.model_copy(update={"body": body}), arrays)


def invented_code(turn: Turn) -> bytes:
    answer, _ = turn.opened()
    return turn.signed(answer.model_copy(update={"refusal": "on-holiday", "body": {}}))


def stale(turn: Turn) -> bytes:
    """The last round's answer, as it was signed then."""
    turn.honest()
    return turn.before[turn.request.kind, turn.request.round - 1]


def of_another_study(turn: Turn) -> bytes:
    """An update that says it answers the same round of another study."""
    answer, arrays = turn.opened()
    other = turn.request.model_copy(update={"study_hash": "ab" * 32})
    return turn.signed(answer.model_copy(update={"request_digest": other.digest}), arrays)


def unsigned(turn: Turn) -> bytes:
    return Envelope.unpack(turn.honest()).model_copy(update={"signature": b"\0" * 64}).pack()


def garbage(turn: Turn) -> bytes:
    turn.honest()
    return os.urandom(4096)


def hang(turn: Turn) -> bytes:
    """The daemon has the request and waits for its ledger until the relay has lost patience."""
    with (turn.state / "ledger.jsonl").open() as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        return turn.honest()


def cut_off(turn: Turn) -> bytes:
    """The relay stands still, from before the daemon's answer until somebody lets it go on."""
    os.kill(turn.relay, signal.SIGSTOP)
    return turn.honest()


class Hidden(SiteFolder):
    """The same site, whose daemon listens beside the socket that the relay knows."""

    @property
    def config_file(self) -> Path:
        return self.root / "hidden.toml"

    @property
    def socket(self) -> Path:
        return super().socket.with_name("hidden.sock")


@dataclass
class Hostile:
    """Answers the relay in the daemon's place.

    Attributes:
        script: By kind and round; `honest` where it says nothing.
    """

    hospital: Hospital
    socket: Path
    script: Mapping[tuple[str, int], Fault]
    before: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def call(self, packed: bytes, context: grpc.ServicerContext) -> bytes:
        assert self.hospital.relay is not None
        request = Request.model_validate_json(Envelope.unpack(packed).header)
        turn = Turn(
            request,
            packed,
            context.time_remaining() or 600.0,
            self.before,
            self.hospital.folder.state,
            self.hospital.relay.pid,
            self._ask,
        )
        return self.script.get((request.kind, request.round), honest)(turn)

    def _ask(self, packed: bytes, seconds: float) -> bytes:
        # A connection of its own for each request, as of the relay's processes.
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.socket}", options=options) as channel:
            answer: bytes = channel.unary_unary(CALL)(packed, timeout=seconds)
            return answer


@contextmanager
def hostile(
    deployment: Deployment, hospital: Hospital, script: Mapping[tuple[str, int], Fault]
) -> Iterator[None]:
    """The hospital misbehaves by the script as long as this lasts; then its daemon is gone."""
    assert hospital.daemon is not None
    hospital.daemon.terminate()
    hospital.daemon.wait(30)
    known, hidden = hospital.folder, Hidden(hospital.folder.root)
    raw: dict[str, Any] = tomllib.loads(known.config_file.read_text())
    hidden.config_file.write_text(tomli_w.dumps({**raw, "socket": str(hidden.socket)}))
    real = Hospital(hospital.name, hidden, hospital.shard)
    deployment.start_daemon(real)
    assert real.daemon is not None
    hospital.daemon = real.daemon
    stage = Hostile(hospital, hidden.socket, script)
    handler = grpc.unary_unary_rpc_method_handler(stage.call)
    server = grpc.server(ThreadPoolExecutor(4), options=UNLIMITED)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"Call": handler}),)
    )
    server.add_insecure_port(f"unix:{known.socket}")
    known.socket.chmod(0o666)  # the relay may be another user's
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()
        real.daemon.terminate()

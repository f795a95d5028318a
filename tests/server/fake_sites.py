"""Sites without data, models or privacy, for tests of coordinator, relay and launcher.

Training moves the adapter by a fixed function of (site, round, adapter), so that two runs can be
compared bit for bit. As a script it serves several sites on a Unix socket.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import numpy as np

from common.identity import Identity
from common.messages import Answer, Arrays, Envelope, Request, roster_proof
from common.study import Study


class FakeSites:
    """All sites of one fake daemon.

    Attributes:
        calls: (kind, site, round, attempt) of every request, in order of arrival.
        charged: How often each (site, round) trained, as opposed to answering from its store.
        behave: May return a refusal code, sleep, or raise, before a request is acted on.
    """

    def __init__(self, names: list[str], folder: Path, *, shape: tuple[int, ...] = (4, 3)) -> None:
        self.names, self.shape = names, shape
        self.keys = {name: Identity.open(folder / f"{name}.key") for name in names}
        self.calls: list[tuple[str, str, int, int]] = []
        self.charged: dict[tuple[str, int], int] = {}
        self.stored: dict[str, bytes] = {}
        self.study: Study | None = None
        self.behave: Callable[[Request], str | None] = lambda request: None
        self._lock = threading.Lock()

    def __call__(self, packed: bytes) -> bytes:
        """The daemon's `Call`: a packed request to a packed answer."""
        envelope = Envelope.unpack(packed)
        request = Request.model_validate_json(envelope.header)
        self.calls.append((request.kind, request.site, request.round, request.attempt))
        signer = self.keys[request.site or self.names[0]]
        with self._lock:
            if request.digest in self.stored:
                return self.stored[request.digest]
            refusal = self.behave(request)
            arrays: Arrays = {}
            body: dict[str, object] = {}
            if refusal is None:
                body, arrays = self._act(request, envelope.arrays)
            answer = Answer(
                site=request.site, request_digest=request.digest, refusal=refusal, body=body
            )
            sealed = signer.seal(answer, arrays).pack()
            if refusal is None and request.kind in ("train", "evaluate"):
                self.stored[request.digest] = sealed
            return sealed

    def _act(self, request: Request, arrays: Arrays) -> tuple[dict[str, object], Arrays]:
        if request.kind == "roster":
            return {
                "sites": [
                    {
                        "name": name,
                        "public_key": key.public,
                        "proof": key.sign(roster_proof(request.digest)).hex(),
                    }
                    for name, key in self.keys.items()
                ],
                "version": "0",
                "code_hash": "",
            }, {}
        if request.kind == "prepare":
            self.study = Study.model_validate_json(request.study or "")
            return {
                "ready": True,
                "spec": {
                    "trainable_parameters": int(np.prod(self.shape)) + 2,
                    "bytes": 56,
                    "slm": {"name": "nano", "revision": None, "sha256": "00", "embedded": True},
                    "lora": None,
                    "designated": [3],
                    "logits": "of a head",
                    "dims": {"age": 3},
                },
                "encoders": {"age": "demographics"},
                "slm": {"name": "nano"},
                "simulated": True,
                "public_key": self.keys[request.site].public,
            }, {}
        if request.kind == "initialise":
            return {}, {
                "projectors.age.weight": np.zeros(self.shape, np.float32),
                "bias": np.ones(2, np.float32),
            }
        if request.kind == "train":
            key = (request.site, request.round)
            self.charged[key] = self.charged.get(key, 0) + 1
            seed = self.names.index(request.site) * 1000 + request.round
            rng = np.random.default_rng(seed)
            moved = {
                name: (0.9 * array + rng.normal(size=array.shape)).astype(np.float32)
                for name, array in sorted(arrays.items())
            }
            spent = {"train": 0.1 * request.round, "validation": 0.0}
            return {"steps": 5, "epsilon": spent, "rounds_charged": request.round}, moved
        assert self.study is not None
        shape = (len(self.study.tasks), 2, self.study.evaluation.bins)
        rng = np.random.default_rng(self.names.index(request.site))
        histograms = rng.poisson(20.0, size=shape).astype(np.float64)
        return {"epsilon": {"train": 0.1, "validation": 0.5}, "release": request.round}, {
            "histograms": histograms
        }

    def status(self, _: bytes = b"") -> bytes:
        """The daemon's `Status`."""
        return json.dumps(
            [{"site": n, "phase": "ready", "done": 0, "total": 0, "round": 0} for n in self.names]
        ).encode()


def serve(sites: FakeSites, socket: Path) -> object:
    """Listens on a Unix socket; the server is returned started."""
    import grpc

    handler = grpc.method_handlers_generic_handler(
        "fedward.Site",
        {
            "Call": grpc.unary_unary_rpc_method_handler(lambda data, context: sites(data)),
            "Status": grpc.unary_unary_rpc_method_handler(lambda data, context: sites.status()),
        },
    )
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=(handler,))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    return server


def main() -> None:
    """`fake_sites.py SOCKET FOLDER DELAY SITE…`: DELAY seconds of work per training round."""
    socket, folder, delay, *names = sys.argv[1:]
    sites = FakeSites(names, Path(folder))

    def work(request: Request) -> str | None:
        if request.kind == "train":
            time.sleep(float(delay))
        return None

    sites.behave = work
    server = serve(sites, Path(socket))
    threading.Event().wait()
    del server  # which would stop when collected


if __name__ == "__main__":
    main()

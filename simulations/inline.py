"""A run within this process: coordinator, guard, ledger and noise are those of a deployment, only
Flower's transport is left out.

`simulate` starts a SuperLink, Ray and a daemon for every run, which is what a user of Flower has; a
matrix of hundreds of runs has no use for their start. Here the coordinator's messages go to the
guard by a call, and come back as it answered: signed, charged, noised.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.supercore.task_identity import TaskIdentity

from client.site.daemon.bench import Bench
from client.site.daemon.guard import Guard
from client.site.daemon.hospital import Hospital
from client.site.evaluation.exact import pooled_exact
from common.envelope import from_record, to_record
from common.identity import Identity
from common.messages import Arrays, Envelope
from common.study import Study
from server import publish, report
from server.exchange import Exchange
from server.federation import Federation
from server.report import Report, attach_exact
from server.start import started
from simulations.daemon import daemon_config
from simulations.run import compose, share_state

_NODE = 1


class DirectGrid:
    """Flower's `Grid` as the exchange uses it, with one node: a guard that is called at once."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._answers: dict[str, Any] = {}
        self._numbers = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return [_NODE]

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        pushed = []
        for message in messages:
            identifier = str(next(self._numbers))
            answer = Envelope.unpack(self._guard.call(from_record(message.content).pack()))
            self._answers[identifier] = SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=identifier),
                content=to_record(answer),
                has_error=lambda: False,
            )
            pushed.append(identifier)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        return [self._answers.pop(i) for i in list(message_ids) if i in self._answers]


def run_inline(
    study: Study,
    shards: Mapping[str, Path],
    out: Path,
    *,
    vaults: Mapping[str, Path] | None = None,
    start: Path | None = None,
    sites: Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    on_round: Callable[[int, Arrays], None] | None = None,
) -> Report:
    """Runs a resolved study over virtual hospitals in this process.

    Args:
        study: Resolved, with `shards` as its roster.
        out: Receives what `simulate` writes, but for Flower's logs and live curves.
        vaults: Folder of each site's encoded records, shared between runs: encoding happens once.
            By default each run has its own.
        start, sites: See `simulate`.
        resume: Go on with the run whose checkpoint lies in `out`.
        threads: Of torch; by default half of the processors.
        on_round: Called with the number and the adapter of each aggregated round.

    Returns:
        The report, with `simulation_exact` filled in.

    Raises:
        FedwardError: The study, the shards or the run; the text names the cure.
    """
    study, begun = started(study, start)
    out.mkdir(parents=True, exist_ok=True)
    if sites is not None:
        share_state(out, sites)
    identity = Identity.open(out / "coordinator.key")
    config = daemon_config(shards, out / "sites", out / "daemon.sock", identity.public)
    bench = Bench(config.device, threads or config.threads)
    for site, folder in (vaults or {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        (out / "sites" / site).mkdir(parents=True, exist_ok=True, mode=0o700)
        link = out / "sites" / site / "vault"
        if not link.exists():
            link.symlink_to(folder.absolute(), target_is_directory=True)
    hospitals = {
        site.name: Hospital(site, bench, simulated=config.simulated) for site in config.sites
    }
    # Flower's messages want to know whose they are, which its runtime says in a ServerApp.
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _NODE, _NODE, _NODE
    exchange = Exchange(DirectGrid(Guard(hospitals)), identity, study, "inline", poll_seconds=0.0)
    (out / "study.toml").write_text(study.to_toml())
    federation = Federation(exchange, study, out, resume=resume, start=begun)
    if on_round is not None:
        federation.on_line = lambda line: on_round(line["round"], federation.adapter)
    finished = federation.run()
    described = report.build(finished)
    publish.write(out, study, finished.adapter, finished.spec, described)
    report.write(out, described)
    logging.getLogger("fedward").info("completed: %s", out)
    exact = attach_exact(out, pooled_exact({site: out / "sites" / site for site in shards}))
    return exact if sites is None else compose(out, shards)

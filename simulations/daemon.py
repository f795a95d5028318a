"""The one daemon that hosts all virtual hospitals of a simulation.

`python -m simulations.daemon CONFIG` serves a configuration that the launcher wrote;
`python -m simulations.daemon --home HOME` is what the relay starts for a bare `flwr run .`: the
synthetic hospitals of the ready study `demo`, until idle.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from client.site.daemon.config import DaemonConfig, SiteConfig
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.policy import SENTENCE, Policy
from common.study import Study

_IDLE_SECONDS = 300.0


def daemon_config(
    shards: Mapping[str, Path],
    state: Path,
    socket: Path,
    coordinator: str,
    *,
    idle_exit_seconds: float | None = None,
) -> DaemonConfig:
    """A daemon for `shards`, obedient to one coordinator and open to studies without privacy.

    Args:
        shards: Folder of each site.
        state: Folder that holds each site's state, under the site's name.
        coordinator: Its public key, hex.
    """
    policy = Policy(
        coordinators=(coordinator,),
        without_privacy=SENTENCE,
        allow_batch_slack=True,
    )
    return DaemonConfig(
        socket=socket,
        sites=tuple(
            SiteConfig(name=name, shard=path.absolute(), state=state / name, policy=policy)
            for name, path in shards.items()
        ),
        idle_exit_seconds=idle_exit_seconds,
        threads=_threads(),
        simulated=True,
    )


def _threads() -> int:
    """Half of the processors: Flower and Ray need the others. Threads of one kernel wait for each
    other, so on two busy processors two of them were measured 10 times slower than one."""
    return max(1, (os.cpu_count() or 1) // 2)


def daemon_command(config: Path) -> list[str]:
    """Serves a configuration with this interpreter."""
    return [sys.executable, "-m", "simulations.daemon", str(config)]


def local(home: Path) -> DaemonConfig:
    """The daemon of a bare `flwr run .`; writes the cohort on first use."""
    from simulations.cohort.shards import synthetic_hospitals

    names = list(Study.load("demo").federation.sites)
    shards = synthetic_hospitals(home / "cohort", len(names))
    return daemon_config(
        {name: shards[name] for name in names},
        home / "sites",
        home / "daemon.sock",
        Identity.open(home / "coordinator.key").public,
        idle_exit_seconds=_IDLE_SECONDS,
    )


def main() -> None:
    """Serves until SIGTERM or idle; a `FedwardError` is one clear message, exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--home", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if arguments.home:
            config = local(arguments.home.absolute())
        else:
            config = DaemonConfig.load(arguments.config)
        from client.site.daemon.service import serve  # imports torch

        serve(config)
    except FedwardError as error:
        sys.exit(f"error ({error.code}): {error}")


if __name__ == "__main__":
    main()

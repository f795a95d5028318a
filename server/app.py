"""The ServerApp: reads its few settings, runs the federation, writes what came of it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import FedwardError
from common.files import write_atomically
from common.fingerprint import code_hash
from common.identity import Identity
from common.privacy.receipts import Receipts
from common.study import Study, resolve
from server import publish, report
from server.curves import Curves
from server.exchange import Exchange
from server.federation import Federation
from server.start import Start, started

log = logging.getLogger("fedward")


@dataclass(frozen=True)
class Settings:
    """What the run configuration says (`[tool.flwr.app.config]` lists the keys).

    Attributes:
        study: Resolved; a ready study or an unresolved file is resolved here.
        start: The adapter that the study starts from; None where it starts from its seed.
        out: Absolute folder of the results.
        run: Identity of the run; drawn when not given.
        coordinator_key: File of the key that signs requests.
    """

    study: Study
    start: Start | None
    out: Path
    run: str
    resume: bool
    coordinator_key: Path

    @classmethod
    def read(cls, config: Any) -> Settings:
        """From Flower's run configuration; a mistake raises `StudyError`."""
        home = Path(os.environ.get("FEDWARD_HOME") or Path.home() / ".fedward").expanduser()
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        out = str(config.get("out-dir") or home / "runs" / stamp)
        study = Study.load(str(config.get("study") or "demo"))
        begun = str(config.get("start") or "")
        study, start = started(study, Path(begun).expanduser() if begun else None)
        return cls(
            study=study if study.resolved else resolve(study),
            start=start,
            out=Path(out).expanduser().absolute(),
            run=str(config.get("run-id") or f"{stamp}-{secrets.token_hex(4)}"),
            resume=bool(config.get("resume")),
            coordinator_key=Path(str(config.get("coordinator-key") or home / "coordinator.key")),
        )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the study. A failure is written to `failed.json` and raised, so that Flower knows."""
    _log_to_stdout()
    out = Path(str(context.run_config.get("out-dir") or "")).expanduser()
    try:
        settings = Settings.read(context.run_config)
        out = settings.out
        out.mkdir(parents=True, exist_ok=True)
        log.info("study %s (%s), results in %s", settings.study.name, settings.study.hash[:12], out)
        (out / "study.toml").write_text(settings.study.to_toml())
        _run(grid, settings)
    except Exception as error:
        if out.is_absolute() and out.is_dir():
            _write_failure(out, error)
        raise


def _run(grid: Grid, settings: Settings) -> None:
    study, out = settings.study, settings.out
    exchange = Exchange(
        grid,
        Identity.open(settings.coordinator_key),
        study,
        settings.run,
        code_hash=code_hash(),
        receipts=Receipts(settings.coordinator_key.with_suffix(".receipts.json")),
    )
    with Curves(out / "events") as curves:
        finished = Federation(
            exchange,
            study,
            out,
            resume=settings.resume,
            on_line=curves.line,
            start=settings.start,
        ).run()
    described = report.build(finished)
    publish.write(out, study, finished.adapter, finished.spec, described)
    report.write(out, described)  # last: its presence says that the run completed
    log.info("completed: %s", out)


def _write_failure(out: Path, error: Exception) -> None:
    reason = str(error).partition("\n  cure: ")[0]
    if not isinstance(error, FedwardError):
        reason = f"{type(error).__name__}: {reason}"
    failure = {
        "code": getattr(error, "code", "internal"),
        "reason": reason,
        "cure": getattr(error, "cure", ""),
    }
    write_atomically(out / "failed.json", json.dumps(failure, indent=1), mode=0o644)


def _log_to_stdout() -> None:
    """Flower captures stdout and shows it in the run's log."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False

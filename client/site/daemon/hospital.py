"""One hosted hospital: its data, its ledger, its keys, and the work done on them.

State folder: `ledger.jsonl`, `site.key` (identity), `population.key` and `.fraction` (who
trains, who validates),
`vault/` (encrypted embeddings), `answers/`, `exact/` (metrics that stay here), `status.json`,
`daemon.log` (the full story of every refusal; it may name files and rows, and stays here).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from client.site.daemon.answers import Answers, write_durably
from client.site.daemon.bench import Bench
from client.site.daemon.config import SiteConfig
from client.site.encoders.registry import describe, dimensions
from client.site.encoders.run import EncodeProgress, Populations, encode_site
from client.site.encoders.vault import Vault
from client.site.shard.shard import Shard
from common.errors import PrivacyError, Refusal
from common.identity import Identity
from common.messages import Arrays, Request
from common.privacy.ledger import Ledger
from common.study import Study

Phase = Literal["idle", "encoding", "ready", "training", "evaluating"]

_STUDIES_KEPT = 2  # encoded populations in memory


class Stopped(Exception):
    """The daemon is ending; what was charged stays charged."""


class DataProblem(Exception):
    """Work on data failed; its cause may say anything about patients and stays inside."""


@dataclass
class Status:
    """What the operator's display shows; public and ledger state only.

    Attributes:
        done, total: Percent of a source while encoding.
        step, steps: Of the round while training.
        epsilon: By population, at the study's delta; None for infinity.
    """

    site: str
    phase: Phase = "idle"
    study: str = ""
    done: int = 0
    total: int = 0
    round: int = 0
    step: int = 0
    steps: int = 0
    epsilon: dict[str, float | None] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A study that this hospital is ready for."""

    study: Study
    populations: Populations
    dims: dict[str, int]


class Hospital:
    """One site of a daemon.

    Args:
        config: Name, shard, state folder and policy.
        bench: Shared with the daemon's other hospitals.
        simulated: See `DaemonConfig.simulated`.

    Raises:
        PrivacyError: The ledger is broken, or missing where there was one.
    """

    def __init__(self, config: SiteConfig, bench: Bench, *, simulated: bool = False) -> None:
        self.name, self.policy, self.state = config.name, config.policy, config.state
        self.simulated = simulated
        self._shard_path, self.bench = config.shard, bench
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (self.state / "population.key").exists() and not (self.state / "ledger.jsonl").exists():
            raise PrivacyError(
                f"the ledger of site '{self.name}' is gone from {self.state}: what was released "
                "can no longer be counted",
                cure="restore ledger.jsonl from the backup",
            )
        self.ledger = Ledger.open(self.state / "ledger.jsonl", self.name)
        self.identity = Identity.open(self.state / "site.key")
        self.answers = Answers(self.state / "answers")
        self.log = _log_file(self.name, self.state / "daemon.log")
        self.status = Status(site=self.name)
        self.stopping = False
        self._prepared: OrderedDict[str, Prepared] = OrderedDict()
        self._shard: Shard | None = None
        self._vault: Vault | None = None

    # -- preparing ----------------------------------------------------------------------------

    def prepare(self, study: Study) -> dict[str, Any]:
        """Encodes what the study needs, splits the patients, builds the model; slow at first.

        Returns:
            The public body of the answer.

        Raises:
            Refusal: `patients-too-few`.
            FedwardError: Shard, encoders or model do not serve the study.
        """
        with self.bench.lock:
            self.show(phase="encoding", study=study.name, done=0, total=0)
            try:
                dims = dimensions(study)
                resident = self.bench.resident(study, dims)
                populations = self._encode(study)
                self._enough(study, populations.train.n_patients)
            except BaseException:
                self.show(phase="idle")
                raise
            self._prepared[study.hash] = Prepared(study, populations, dims)
            self._prepared.move_to_end(study.hash)
            while len(self._prepared) > _STUDIES_KEPT:
                self._prepared.popitem(last=False)
            self.show(phase="ready", epsilon=self.epsilon(study))
            return {
                "ready": True,
                "spec": resident.spec,
                "encoders": dict(describe(study)),
                "slm": resident.spec["slm"],
                "simulated": self.simulated or self.ledger.simulated,
                "public_key": self.identity.public,
            }

    def prepared(self, study_hash: str) -> Prepared:
        """What `prepare` left.

        Raises:
            Refusal: `not-prepared`.
        """
        found = self._prepared.get(study_hash)
        if found is None:
            raise Refusal("not-prepared", f"study {study_hash} was not prepared since the start")
        return found

    def initial(self, prepared: Prepared) -> Arrays:
        """The adapter that the study's seed gives."""
        with self.bench.lock:
            return self.bench.resident(prepared.study, prepared.dims).initial

    # -- the past ------------------------------------------------------------------------------

    def forget_old_answers(self, study: Study, request: Request, keep: int = 8) -> None:
        """Only the latest answers of a run can still be asked for: the coordinator resumes from
        its last round."""
        for charge in self.ledger.released(study.hash, request.run)[-keep - 2 : -keep]:
            self.answers.forget(charge.request_digest)

    def epsilon(self, study: Study) -> dict[str, float | None]:
        """Price of what was released for the study so far, at its delta; None is infinity, also
        where another study released the same patients without privacy."""
        spent = self.ledger.epsilon(study.privacy.delta, study.hash)
        for population in self.ledger.unprotected():
            spent[population] = math.inf  # whatever the study: nothing takes it back
        return {name: e if math.isfinite(e) else None for name, e in spent.items()}

    # -- inner --------------------------------------------------------------------------------

    def _encode(self, study: Study) -> Populations:
        key = self._population_key(study)
        try:
            if self._shard is None:
                self._shard = Shard.open(self._shard_path)
            if self._vault is None:
                self._vault = Vault.open(self.state / "vault")
            populations = encode_site(
                study,
                self._shard,
                self._vault,
                population_key=key,
                on_progress=self._encoded,
            )
        except Stopped:
            raise
        except Exception as error:
            raise DataProblem from error
        for remark in populations.remarks:
            self.log.info("study '%s': %s", study.name, remark)
        return populations

    def _enough(self, study: Study, patients: int) -> None:
        declared = study.federation.sites[self.name].patients_declared
        least = max(declared, self.policy.min_patients)
        if patients < least:
            raise Refusal(
                "patients-too-few",
                f"{patients} training patients at site '{self.name}', {least} are needed "
                f"({declared} declared, {self.policy.min_patients} by policy)",
                cure="declare fewer patients in the study, or leave the site out",
            )

    def _population_key(self, study: Study) -> bytes:
        """Decides who validates. Key and share are set by the first study and then fixed for the
        site's life: a patient who moved from one population to the other would spend in both.

        Raises:
            Refusal: `validation-fraction-fixed`.
        """
        path, share = self.state / "population.key", self.state / "population.fraction"
        wanted = study.evaluation.validation_fraction
        if self.ledger.events() and not (path.exists() and share.exists()):
            raise PrivacyError(
                f"population.key or population.fraction of site '{self.name}' is gone from "
                f"{self.state}: a new split would let patients spend in both populations",
                cure="restore both from the backup",
            )
        if not share.exists():
            write_durably(share, repr(wanted).encode(), once=True)
        pinned = float(share.read_text())
        if wanted != pinned:
            raise Refusal(
                "validation-fraction-fixed",
                f"site '{self.name}' keeps {pinned:g} of its patients for validation, study "
                f"'{study.name}' asks for {wanted:g}",
                cure=f"set evaluation.validation_fraction = {pinned:g} in the study",
            )
        if not path.exists():
            fresh = os.urandom(32)
            if self.simulated:
                text = f"fedward simulated population\0{study.seed}\0{self.name}"
                fresh = hashlib.sha256(text.encode()).digest()
            write_durably(path, fresh, once=True)
        return path.read_bytes()

    def _encoded(self, progress: EncodeProgress) -> None:
        # In percent: the relay, too, may ask for the status, and how many inputs a real hospital
        # holds is not public.
        self.status.done = 100 * progress.done // max(progress.total, 1)
        self.status.total = 100
        self.check_stopping()

    def check_stopping(self) -> None:
        """Called between pieces of work. Raises `Stopped` when the daemon is ending."""
        if self.stopping:
            raise Stopped

    def show(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.status, name, value)
        shown = {**asdict(self.status), "at": time.time()}
        write_durably(self.state / "status.json", json.dumps(shown).encode())


class _PrivateFile(RotatingFileHandler):
    """Rotating log files that only their owner can read."""

    def _open(self) -> TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return TextIOWrapper(os.fdopen(handle, "ab", buffering=0), "utf-8", write_through=True)


def _log_file(name: str, path: Path) -> logging.Logger:
    """A logger into the hospital's own file and nowhere else."""
    handler = _PrivateFile(path, maxBytes=10_000_000, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.Logger(f"site.{name}", logging.INFO)
    logger.addHandler(handler)
    return logger

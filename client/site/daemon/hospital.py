"""One hosted hospital: its data, its ledger, its keys, and the work done on them.

State folder: `ledger.jsonl` (with `ledger.head`, `ledger.receipts` and `ledger.torn`, see
`common.privacy.chain`), `site.key` (identity), `population.key` and `.fraction` (who trains, who
validates), `erasure.key` (recognises erased patients), `vault/` (encrypted embeddings), `answers/`,
`witness.json` (receipts of other sites), `paused` (while a person holds releases), `exact/`
(metrics that stay here), `status.json`, `daemon.log` (the full story of every refusal; it may name
files and rows, and stays here).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from client.site.daemon.answers import Answers
from client.site.daemon.bench import Bench
from client.site.daemon.config import SiteConfig
from client.site.daemon.demands import Demand, demands, enough_patients, model_demands
from client.site.daemon.state import LEDGER, PAUSED, open_identity
from client.site.encoders.registry import describe, dimensions, fingerprints
from client.site.encoders.run import EncodeProgress, Populations, encode_site, validates
from client.site.encoders.vault import Vault
from client.site.shard.shard import Shard
from common.errors import PrivacyError, Refusal
from common.files import write_atomically
from common.fingerprint import software_hash
from common.messages import Arrays, Request
from common.privacy.ledger import Ledger
from common.privacy.receipts import Receipt, Receipts
from common.roster import Roster, RosterError
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
    """A study that this hospital is ready for. `erased`: patients erased by then."""

    study: Study
    populations: Populations
    dims: dict[str, int]
    erased: int


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
        self.virtual = simulated
        self._shard_path, self.bench = config.shard, bench
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.identity = open_identity(self.state, self.name)
        self.ledger = Ledger.open(self.state / LEDGER, self.name, self.identity, virtual=simulated)
        self.ledger.settle_software(version("fedward"), software_hash())
        self.ledger.settle_policy(self.policy)
        self.roster = _roster(config)
        self.witnessed = Receipts(self.state / "witness.json")
        self.answers = Answers(self.state / "answers")
        self.log = _log_file(self.name, self.state / "daemon.log")
        self.status = Status(site=self.name)
        self.stopping = False
        self._prepared: OrderedDict[str, Prepared] = OrderedDict()
        self._shard: Shard | None = None
        self._shard_without = 0
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
                for demand in model_demands(
                    self.policy, fingerprints(study), resident.spec["slm"]["sha256"]
                ):
                    demand.insist()
                self.ledger.refresh()
                erased = len(self.ledger.book.erased)
                populations = self._encode(study)
                self.enough(study, populations.train.n_patients).insist()
            except BaseException:
                self.show(phase="idle")
                raise
            self._prepared[study.hash] = Prepared(study, populations, dims, erased)
            self._prepared.move_to_end(study.hash)
            while len(self._prepared) > _STUDIES_KEPT:
                self._prepared.popitem(last=False)
            self.show(phase="ready", epsilon=self.epsilon(study))
            return {
                "ready": True,
                "spec": resident.spec,
                "encoders": dict(describe(study)),
                "slm": resident.spec["slm"],
                "simulated": self.virtual or self.ledger.book.simulated,
                "public_key": self.identity.public,
            }

    def prepared(self, study_hash: str) -> Prepared:
        """What `prepare` left.

        Raises:
            Refusal: `not-prepared`.
        """
        self.ledger.refresh()
        found = self._prepared.get(study_hash)
        if found is not None and found.erased != len(self.ledger.book.erased):
            del self._prepared[study_hash]  # a patient was erased since
            found = None
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
        for charge in self.ledger.book.released(study.hash, request.run)[-keep - 2 : -keep]:
            self.answers.forget(charge.request_digest)

    def epsilon(self, study: Study) -> dict[str, float | None]:
        """Price of what was released for the study so far, at its delta; None is infinity, also
        where another study released the same patients without privacy."""
        spent = self.ledger.book.epsilon(study.privacy.delta, study.hash)
        for population in self.ledger.book.unprotected():
            spent[population] = math.inf  # whatever the study: nothing takes it back
        return {name: e if math.isfinite(e) else None for name, e in spent.items()}

    def compare(self, receipts: Sequence[Receipt]) -> None:
        """Holds the receipts that the coordinator keeps of this site against the ledger.

        Raises:
            Refusal: `receipt-foreign`.
        """
        for receipt in receipts:
            if receipt.site == self.name:
                try:
                    self.ledger.compare(receipt)
                except PrivacyError as error:
                    raise Refusal("receipt-foreign", str(error)) from None

    def witness(self, study: Study, receipts: Sequence[Receipt]) -> None:
        """Keeps the receipts of the study's other sites, for whoever audits them."""
        for receipt in receipts:
            site = study.federation.sites.get(receipt.site)
            if site is not None and receipt.site != self.name:
                key = site.public_key or receipt.public_key
                self.witnessed.take(receipt.site, key, receipt.model_dump(mode="json"))

    # -- persons -------------------------------------------------------------------------------

    def demand(self, study: Study) -> None:
        """The policy on a study. Raises the refusal of the first condition that is not met."""
        account = self.ledger.book.studies.get(study.hash)
        committed = account.committed if account else {}
        for found in demands(
            self.policy, self.name, self.identity.public, study, committed, self.roster
        ):
            found.insist()

    def not_paused(self) -> None:
        """Raises the refusal `site-paused` while a person holds releases (`fedward site pause`)."""
        if (self.state / PAUSED).exists():
            raise Refusal(
                "site-paused",
                f"site '{self.name}' is paused: {self.state / PAUSED} says since when and why",
                cure="`fedward site unpause` lets it go on",
            )

    def training_patients(self, study: Study) -> int:
        """Training patients here, by the split as it is or, before the first study, would be. The
        number never leaves the hospital."""
        split = validates(self._open_shard().records, self._split_key(study), self._share(study))
        return int((~split).sum())

    def fix_split(self, study: Study) -> bytes:
        """Who trains and who validates, from now on for the site's life; the key that decides it.

        Raises:
            Refusal: `validation-fraction-fixed`: it was fixed otherwise. A patient who moved from
                one population to the other would spend in both.
        """
        wanted = self._share(study)
        share = self.state / "population.fraction"
        if not share.exists():
            write_atomically(share, repr(wanted).encode(), once=True)
        return self._split_key(study)

    def enough(self, study: Study, patients: int) -> Demand:
        """Whether there are as many training patients as were declared and the policy wants."""
        declared = study.federation.sites[self.name].patients_declared
        return enough_patients(self.policy, self.name, declared, patients)

    def erase(self, patient_id: str) -> int:
        """A patient's embeddings and their key are destroyed, the ledger keeps a keyed hash, and a
        re-imported shard with that patient is read without them.

        Returns:
            Embeddings that were destroyed.
        """
        self.ledger.erase(self._commitment(patient_id))  # first: a crash must not bring them back
        if self._vault is None:
            self._vault = Vault.open(self.state / "vault")
        count = self._vault.forget(patient_id)
        self._prepared.clear()
        return count

    def await_slot(self) -> None:
        """Sleeps to the next multiple of the policy's `release_slot`."""
        if slot := self.policy.release_slot:
            time.sleep(slot - time.time() % slot)

    # -- inner --------------------------------------------------------------------------------

    def _encode(self, study: Study) -> Populations:
        key = self.fix_split(study)
        try:
            shard = self._open_shard()
            if self._vault is None:
                self._vault = Vault.open(self.state / "vault")
            populations = encode_site(
                study,
                shard,
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

    def _open_shard(self) -> Shard:
        """The shard without the patients that were erased."""
        erased = self.ledger.book.erased
        if self._shard is None or self._shard_without != len(erased):
            shard = Shard.open(self._shard_path)
            if erased:
                patients = shard.records["patient_id"]
                gone = [p for p in patients.unique() if self._commitment(p) in erased]
                shard = replace(shard, records=shard.records.filter(~patients.is_in(gone)))
            self._shard, self._shard_without = shard, len(erased)
        return self._shard

    def _commitment(self, patient_id: str) -> str:
        """Keyed, so that the ledger's reader cannot try patient ids."""
        path = self.state / "erasure.key"
        if not path.exists():
            if self.ledger.book.erased:
                raise PrivacyError(
                    f"erasure.key of site '{self.name}' is gone from {self.state}: erased patients "
                    "cannot be recognised",
                    cure="restore it from the backup",
                )
            write_atomically(path, os.urandom(32), once=True)
        return hmac.new(path.read_bytes(), patient_id.encode(), hashlib.sha256).hexdigest()

    def _share(self, study: Study) -> float:
        path = self.state / "population.fraction"
        wanted = study.evaluation.validation_fraction
        if not path.exists():
            self._not_lost(path)
            return wanted
        pinned = float(path.read_text())
        if wanted != pinned:
            raise Refusal(
                "validation-fraction-fixed",
                f"site '{self.name}' keeps {pinned:g} of its patients for validation, study "
                f"'{study.name}' asks for {wanted:g}",
                cure=f"set evaluation.validation_fraction = {pinned:g} in the study",
            )
        return pinned

    def _split_key(self, study: Study) -> bytes:
        path = self.state / "population.key"
        if not path.exists():
            self._not_lost(path)
            fresh = os.urandom(32)
            if self.virtual:
                text = f"fedward simulated population\0{study.seed}\0{self.name}"
                fresh = hashlib.sha256(text.encode()).digest()
            write_atomically(path, fresh, once=True)
        return path.read_bytes()

    def _not_lost(self, path: Path) -> None:
        if self.ledger.book.events():
            raise PrivacyError(
                f"{path.name} of site '{self.name}' is gone from {self.state}: a new split would "
                "let patients spend in both populations",
                cure="restore population.key and population.fraction from the backup",
            )

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
        write_atomically(self.state / "status.json", json.dumps(shown).encode())


def _roster(config: SiteConfig) -> Roster | None:
    if config.roster is None:
        return None
    roster = Roster.load(config.roster)
    if missing := roster.unsigned():
        raise RosterError(
            f"roster {config.roster} is not signed by {', '.join(missing)}",
            cure="get it from the coordinator when all hospitals have signed it",
        )
    return roster


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

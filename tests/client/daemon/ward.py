"""Small hospitals behind a guard, and a coordinator that talks to them without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from client.site.daemon.config import DaemonConfig, SiteConfig
from client.site.daemon.review import approve, review
from client.site.daemon.service import Daemon
from client.site.shard.shard import write_shard
from common.identity import Identity, open_envelope
from common.messages import Answer, Arrays, Envelope, Request
from common.privacy.decisions import decide
from common.privacy.lifetime import Cap, Lifetime
from common.privacy.policy import Policy
from common.study import Study, resolve

PATIENTS = 60
SECRET = "Ada Lovelace"
GENEROUS = Lifetime(train=Cap(epsilon=1000, delta=1e-3), validation=Cap(epsilon=1000, delta=1e-3))


def make_shard(path: Path, hospital: str, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    ids = [f"{hospital}-{SECRET}-{n}" for n in range(PATIENTS)]
    ill = rng.random(PATIENTS) < 0.4
    write_shard(
        path,
        meta={"name": hospital, "hospital": hospital, "dataset": "made up"},
        records=pl.DataFrame(
            {
                "record_id": [f"r{i}" for i in ids],
                "patient_id": ids,
                "stay_id": [f"s{i}" for i in ids],
                "cutoff_hours": [24.0] * PATIENTS,
                "age": rng.uniform(20, 90, PATIENTS),
                "sex": ["F", "M"] * (PATIENTS // 2),
                "y_death": ill,
            }
        ),
        events=pl.DataFrame(
            {
                "stay_id": [f"s{i}" for i in ids],
                "hours": [3.0] * PATIENTS,
                "source": ["lab"] * PATIENTS,
                "series": ["lactate"] * PATIENTS,
                "value": np.where(ill, 5.0, 1.0) + rng.random(PATIENTS),
            }
        ),
    )


def make_study(sites: Sequence[str] = ("a",), *, private: bool = True, **changes: Any) -> Study:
    """A resolved study of `sites`; `changes` go to its parts, e.g. `training={...}`."""
    raw: dict[str, Any] = {
        "name": "ward",
        "sources": {
            "lab": {
                "modality": "series",
                "encoder": "series-statistics",
                "series": ["lactate"],
            }
        },
        "tasks": {"death": {"prevalence": 0.4}},
        "training": {"steps_per_round": 2},
        "privacy": {"sample_rate": 0.2, "delta": 1e-3, "spare_rounds": 0.5},
        "evaluation": {"validation_fraction": 0.25, "bins": 4},
        "federation": {
            "rounds": 2,
            "sites": {name: {"patients_declared": 30} for name in sites},
        },
    }
    for part, values in changes.items():
        raw[part] = {**raw[part], **values} if isinstance(values, dict) else values
    return resolve(Study.model_validate(raw), private=private)


class Ward:
    """A daemon's hospitals in `folder`, and the coordinator they know."""

    def __init__(
        self, folder: Path, sites: Sequence[str] = ("a",), *, simulated: bool = True, **policy: Any
    ) -> None:
        self.folder, self.names = folder, list(sites)
        self.coordinator = Identity.open(folder / "coordinator.key")
        for number, name in enumerate(sites):
            if not (folder / "shards" / name).exists():
                make_shard(folder / "shards" / name, name, number)
        self.approver = Identity.open(folder / "officer.key")
        rules = {
            "coordinators": (self.coordinator.public,),
            "approvers": {} if simulated else {"officer": self.approver.public},
            "lifetime": None if simulated else GENEROUS,
            **policy,
        }
        self.config = DaemonConfig(
            socket=folder / "d.sock",
            threads=1,
            device="cpu",
            simulated=simulated,
            sites=tuple(
                SiteConfig(
                    name=name,
                    shard=folder / "shards" / name,
                    state=folder / "sites" / name,
                    policy=Policy(**rules),
                )
                for name in sites
            ),
        )
        self.restart()

    def approve(self, study: Study, site: str | None = None, *, runs: int = 1) -> None:
        """The officer lets a study in, for a year."""
        hospital = self.hospitals[site or self.names[0]]
        expires = (datetime.now(UTC) + timedelta(days=365)).isoformat(timespec="milliseconds")
        shown = review(hospital, study, runs)
        decision = decide(
            self.approver,
            "officer",
            "approve",
            hospital.ledger.book.ledger_id,
            study.hash,
            reserve=shown.reserve,
            expires=expires,
        )
        approve(hospital, shown, decision, expires)

    def revoke(self, study: Study, site: str | None = None) -> None:
        """The officer ends a study."""
        ledger = self.hospitals[site or self.names[0]].ledger
        ledger.revoke(
            study.hash,
            decide(self.approver, "officer", "revoke", ledger.book.ledger_id, study.hash),
        )

    def set_policy(self, rules: dict[str, Any]) -> None:
        """All sites restart under another policy."""
        policy = Policy.model_validate(rules)
        sites = tuple(s.model_copy(update={"policy": policy}) for s in self.config.sites)
        self.config = self.config.model_copy(update={"sites": sites})
        self.restart()

    def restart(self) -> None:
        """The daemon's process ends and a new one begins, as far as its objects can tell."""
        if hasattr(self, "daemon"):
            self.daemon._lock.release()
            del self.daemon
        self.daemon = Daemon(self.config)
        self.guard, self.hospitals = self.daemon.guard, self.daemon.hospitals

    def request(self, kind: Any, study: Study, round: int = 0, **changes: Any) -> Request:
        values: dict[str, Any] = {
            "kind": kind,
            "run": "run",
            "site": self.names[0],
            "study_hash": study.hash,
            "round": round,
            "study": study.canonical().decode() if kind == "prepare" else None,
        }
        return Request(**{**values, **changes})

    def send(
        self, request: Request, arrays: Arrays | None = None, *, identity: Identity | None = None
    ) -> bytes:
        return self.guard.call((identity or self.coordinator).seal(request, arrays).pack())

    def ask(
        self, request: Request, arrays: Arrays | None = None, *, identity: Identity | None = None
    ) -> tuple[Answer, Arrays]:
        """The verified answer: signed by the site, and bound to the request."""
        envelope = Envelope.unpack(self.send(request, arrays, identity=identity))
        keys = [hospital.identity.public for hospital in self.hospitals.values()]
        answer = open_envelope(envelope, Answer, keys)
        sealed = self.coordinator.seal(request, arrays)
        assert answer.request_digest == Request.model_validate_json(sealed.header).digest
        return answer, envelope.arrays

    def prepared(self, study: Study, site: str | None = None) -> Arrays:
        """Prepares a site and returns the study's initial adapter."""
        site = site or self.names[0]
        answer, _ = self.ask(self.request("prepare", study, site=site))
        assert answer.refusal is None, answer.refusal
        return self.ask(self.request("initialise", study, site=site))[1]

    def ledger_lines(self, site: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "sites" / (site or self.names[0]) / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def charges(self, site: str | None = None) -> list[dict[str, Any]]:
        return [line for line in self.ledger_lines(site) if line["line"] == "released"]

    def log(self, site: str | None = None) -> str:
        return (self.folder / "sites" / (site or self.names[0]) / "daemon.log").read_text()

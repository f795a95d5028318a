"""Ledgers with a history: lines written at chosen times, through the fold that all readers use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import copy
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.identity import Identity
from common.privacy.accounts import reserves
from common.privacy.book import Book, rotation
from common.privacy.decisions import decide
from common.privacy.ledger import planned
from common.privacy.lines import (
    Decision,
    Genesis,
    KeyRotated,
    Line,
    PatientErased,
    PolicyChanged,
    Refused,
    Released,
    Software,
    StudyApproved,
    StudyRevoked,
    body_of,
    reserve_hash,
    signed,
)
from common.privacy.policy import Policy
from common.privacy.receipts import Receipt
from common.study import Study, resolve

SITE = "st-clara"
START = datetime(2026, 3, 2, 8, 15, tzinfo=UTC)


def person(name: str) -> Identity:
    """The same key for the same name, so that a ledger is the same in every run."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


@lru_cache
def study(
    name: str = "sepsis",
    *,
    rounds: int = 4,
    epsilon: float = 2.0,
    releases: int = 1,
    private: bool = True,
    sites: tuple[str, ...] = (SITE,),
) -> Study:
    """A small study, resolved."""
    return resolve(
        Study.model_validate(
            {
                "name": name,
                "sources": {
                    "lab": {
                        "modality": "series",
                        "encoder": "series-statistics",
                        "series": ["lactate"],
                    }
                },
                "tasks": {"death": {}},
                "privacy": {"epsilon": epsilon, "delta": 1e-6, "sample_rate": 0.05},
                "evaluation": {"releases": releases},
                "training": {"steps_per_round": 5},
                "federation": {
                    "rounds": rounds,
                    "sites": {site: {"patients_declared": 2000} for site in sites},
                },
            }
        ),
        private=private,
    )


class Scribe:
    """Writes a ledger as a daemon would, at times of its own choosing."""

    def __init__(self, site: str = SITE, *, key: str = "", **genesis: Any) -> None:
        self.site, self.book = site, Book()
        self.identity = person(key or site)
        self.officer = person("dr-weber")
        self.raws: list[bytes] = []
        self.clock = START
        self.number = 0
        self.write(
            Genesis,
            **{"site": site, "entropy": "os", "public_key": self.identity.public, **genesis},
        )

    def resumed(self, raws: list[bytes]) -> Scribe:
        """The same site going on from other lines."""
        other = copy(self)
        other.book, other.raws = Book(), list(raws)
        for raw in raws:
            other.book.take(raw)
        other.clock = datetime.fromisoformat(other.book.last_at)
        return other

    def wait(self, **span: float) -> Scribe:
        """Lets time pass."""
        self.clock += timedelta(**span)
        return self

    def write(self, kind: type[Line], **fields: Any) -> None:
        line = kind(
            previous=self.book.head, at=self.clock.isoformat(timespec="milliseconds"), **fields
        )
        body = body_of(line)
        raw = signed(body, self.identity.sign(body))
        self.book.take(raw)
        self.raws.append(raw)

    def policy(self, policy: Policy) -> None:
        self.write(
            PolicyChanged,
            sha256=policy.sha256,
            lifetime=policy.lifetime,
            unprotected=policy.without_privacy is not None,
            approvers=policy.approvers,
        )

    def approve(self, study: Study, *, runs: int = 1, expires: str | None = None) -> None:
        reserved = reserves(planned(study, self.site, runs))
        reserve = reserve_hash(study.hash, study.privacy.delta, runs, reserved)
        decision = self.decide("approve", study, reserve=reserve, expires=expires)
        self.write(
            StudyApproved,
            study_hash=study.hash,
            name=study.name,
            delta=study.privacy.delta,
            runs=runs,
            reserved=reserved,
            patients_declared=study.federation.sites[self.site].patients_declared,
            expires=expires,
            decision=None if self.book.virtual else decision,
        )

    def revoke(self, study: Study) -> None:
        decision = self.decide("revoke", study)
        self.write(StudyRevoked, study_hash=study.hash, decision=decision)

    def decide(self, verdict: Any, study: Study, **terms: Any) -> Decision:
        ledger = self.book.ledger_id
        return decide(self.officer, "dr-weber", verdict, ledger, study.hash, at=self.clock, **terms)

    def release(self, study: Study, *, evaluate: bool = False, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.number += 1
            self.write(
                Released,
                study_hash=study.hash,
                run="run-1",
                round=self.number,
                attempt=0,
                request_digest=hashlib.sha256(str(self.number).encode()).hexdigest(),
                event=study.evaluation_event() if evaluate else study.round_event(self.site),
            )

    def refuse(self, study: Study, code: str) -> None:
        self.number += 1
        digest = hashlib.sha256(str(self.number).encode()).hexdigest()
        self.write(
            Refused, study_hash=study.hash, request="train", request_digest=digest, code=code
        )

    def erase(self, patient: str) -> None:
        self.write(PatientErased, commitment=hashlib.sha256(patient.encode()).hexdigest())

    def rotate(self, key: str) -> None:
        fresh = person(key)
        proof = fresh.sign(rotation(self.book.head, self.site)).hex()
        self.write(KeyRotated, public_key=fresh.public, proof=proof)
        self.identity = fresh

    def software(self, version: str) -> None:
        code = hashlib.sha256(version.encode()).hexdigest()
        self.write(Software, version=version, code_hash=code)

    def receipt(self) -> Receipt:
        return Receipt(
            site=self.site,
            public_key=self.identity.public,
            lines=len(self.book.lines),
            head=self.book.head,
            approvals=self.book.approvals,
            approvals_hash=self.book.approvals_hash,
            ancestors=self.book.ancestors,
        ).sealed(self.identity)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(raw + b"\n" for raw in self.raws))
        return path


POLICY = Policy.model_validate(
    {
        "coordinators": [person("coordinator").public],
        "approvers": {"dr-weber": person("dr-weber").public},
        "lifetime": {
            "train": {"epsilon": 8.0, "delta": 1e-5},
            "validation": {"epsilon": 10.0, "delta": 1e-5, "rule": "sum"},
        },
    }
)


def bare(site: str = SITE, **options: Any) -> Scribe:
    """A ledger that has begun, with a policy unless the hospital is virtual."""
    scribe = Scribe(site, **options)
    if not options.get("virtual"):
        scribe.policy(POLICY)
    return scribe


def small(site: str = SITE, **options: Any) -> Scribe:
    """One study of 4 rounds, 3 of them released, evaluated once, refused once."""
    scribe = bare(site, **options)
    one = study(sites=(site,))
    scribe.wait(days=1).approve(one)
    for _ in range(3):
        scribe.wait(hours=2).release(one)
    scribe.release(one, evaluate=True)
    scribe.wait(hours=1).refuse(one, "budget-exhausted")
    return scribe


def months() -> Scribe:
    """Four months of a hospital: studies that end, are revoked, go on; refusals; erasures."""
    scribe = Scribe()
    sepsis = study("sepsis-early-warning", rounds=20, epsilon=2.0, releases=3)
    xray = study("pneumonia-chest-xray", rounds=15, epsilon=1.5)
    death = study("mortality-48h", rounds=30, epsilon=2.5, releases=2)
    stay = study("length-of-stay", rounds=10, epsilon=1.0)
    scribe.software("0.1.0")
    scribe.wait(hours=1).policy(POLICY)
    scribe.wait(days=1).approve(sepsis, expires="2026-06-30T00:00:00.000+00:00")
    for number in range(20):
        scribe.wait(days=1.3).release(sepsis)
        if number % 10 == 9:
            scribe.wait(minutes=9).release(sepsis, evaluate=True)
    scribe.wait(days=2).refuse(sepsis, "rounds-per-day")
    scribe.erase("patient 1")
    scribe.wait(days=3).approve(xray, expires="2026-12-31T00:00:00.000+00:00")
    for _ in range(6):
        scribe.wait(days=2).release(xray)
    scribe.wait(hours=5).refuse(xray, "encoder-unknown")
    scribe.refuse(xray, "encoder-unknown")
    scribe.wait(days=4).revoke(xray)
    for _ in range(3):
        scribe.wait(hours=3).refuse(xray, "study-revoked")
    scribe.wait(days=5).software("0.2.0")
    scribe.rotate("st-clara, second key")
    scribe.wait(days=6).approve(death, expires="2027-03-01T00:00:00.000+00:00")
    scribe.wait(days=2).erase("patient 2")
    for number in range(22):
        scribe.wait(days=1.7).release(death)
        if number == 14:
            scribe.wait(minutes=7).release(death, evaluate=True)
    scribe.wait(days=3).approve(stay)
    scribe.wait(days=1).release(stay, rounds=4)
    scribe.wait(days=9).erase("patient 3")
    return scribe


@pytest.fixture(scope="session")
def ledgers() -> dict[str, Callable[..., Scribe]]:
    """Makers of ledgers, by name."""
    return {"bare": bare, "small": small, "months": months}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture(scope="session")
def studies() -> Callable[..., Study]:
    """Maker of small studies."""
    return study


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The policy of these ledgers."""
    return POLICY

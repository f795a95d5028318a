"""The guard: every request passes policy, then budget, and only then acts.

It assumes that relay and coordinator are hostile. What it lets out is a charged release, or a
function of public and ledger state; of an error only a stable code leaves, and the full story goes
to the hospital's own log.

Every code has a page in docs/refusals/: what happened, and how to resolve it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from client.site.daemon.hospital import DataProblem, Hospital, Prepared, Stopped
from client.site.daemon.work import Work, ready
from common.errors import FedwardError, ModelError, PrivacyError, Refusal, StudyError
from common.fingerprint import code_hash
from common.identity import open_envelope, verify
from common.messages import Answer, Arrays, Envelope, Request, roster_proof
from common.privacy.receipts import Receipt
from common.study import Study

log = logging.getLogger("fedward.daemon")

CHARGED = ("train", "evaluate")
"""Kinds of request whose answers are releases."""


class Guard:
    """Answers requests to the hospitals of one daemon.

    Args:
        hospitals: By site name; the first one signs what concerns no site.
    """

    def __init__(self, hospitals: Mapping[str, Hospital]) -> None:
        self.hospitals = dict(hospitals)
        self._speaker = next(iter(self.hospitals.values()))
        self._code_hash = code_hash()

    def status(self) -> list[dict[str, Any]]:
        """For the operator's display, one entry per site; see `hospital.Status`."""
        return [asdict(hospital.status) for hospital in self.hospitals.values()]

    def call(self, packed: bytes, wanted: Callable[[], bool] = lambda: True) -> bytes:
        """A packed, signed answer to a packed request. Never raises.

        Args:
            wanted: Whether somebody still waits for the answer. Asked before anything is charged:
                what nobody would receive is not worth its price.
        """
        hospital: Hospital | None = None
        request: Request | None = None
        digest = ""
        try:
            envelope = _unpack(packed)
            digest = hashlib.sha256(envelope.header).hexdigest()
            request, signers = self._signed(envelope)
            if request.kind == "roster":
                return self._roster(digest)
            hospital = self._addressed(request, signers)
            packed = self._answer(hospital, request, envelope.arrays, wanted)
        except Exception as error:
            packed = self._refuse(error, hospital, request, digest)
        if hospital and request and request.kind in CHARGED:
            hospital.await_slot()
        return packed

    # -- who speaks, and to whom ------------------------------------------------------------

    def _signed(self, envelope: Envelope) -> tuple[Request, frozenset[str]]:
        known = {key for h in self.hospitals.values() for key in h.policy.coordinators}
        signers = [k for k in known if verify(k, envelope.header, envelope.signature)]
        return open_envelope(envelope, Request, signers), frozenset(signers)

    def _addressed(self, request: Request, signers: frozenset[str]) -> Hospital:
        hospital = self.hospitals.get(request.site)
        if hospital is None:
            raise Refusal("site-unknown", f"no site '{request.site}' is hosted here")
        if not signers & set(hospital.policy.coordinators):
            raise Refusal("signature-invalid", "a coordinator of another site signed this")
        return hospital

    def _roster(self, digest: str) -> bytes:
        sites = [
            {
                "name": name,
                "public_key": hospital.identity.public,
                "proof": hospital.identity.sign(roster_proof(digest)).hex(),
            }
            for name, hospital in self.hospitals.items()
        ]
        body = {"sites": sites, "version": version("fedward"), "code_hash": self._code_hash}
        return _sealed(self._speaker, Answer(site="", request_digest=digest, body=body))

    # -- what is asked ----------------------------------------------------------------------

    def _answer(
        self, hospital: Hospital, request: Request, arrays: Arrays, wanted: Callable[[], bool]
    ) -> bytes:
        if request.kind == "prepare":
            return self._prepare(hospital, request)
        if request.kind == "initialise":
            initial = hospital.initial(hospital.prepared(request.study_hash))
            return _sealed(hospital, _reply(hospital, request, {}), initial)
        # First without the lock: a repeated question need not wait for another site's round.
        stored = hospital.answers.read(request.digest)
        if stored is not None:
            return stored
        with hospital.bench.lock:
            return hospital.answers.read(request.digest) or self._release(
                hospital, request, arrays, wanted
            )

    def _prepare(self, hospital: Hospital, request: Request) -> bytes:
        if request.code_hash not in ("", self._code_hash):
            raise Refusal(
                "code-mismatch",
                "the coordinator's package `common` is not the one installed here",
                cure="install the same version of Fedward on both sides",
            )
        study = _study(request)
        hospital.compare(_receipts(request))
        if not hospital.virtual:  # before anything is worked out for it
            hospital.ledger.check_open(study)
        hospital.demand(study)
        hospital.witness(study, _receipts(request))
        body = hospital.prepare(study)
        if hospital.virtual:  # lets every run in: virtual patients lose nothing, but it is counted
            charged = {line.run for line in hospital.ledger.book.released(study.hash)}
            hospital.ledger.approve(study, runs=len(charged | {request.run}))
        body = {**body, "receipt": hospital.ledger.receipt().model_dump(mode="json")}
        return _sealed(hospital, _reply(hospital, request, body))

    def _release(
        self, hospital: Hospital, request: Request, arrays: Arrays, wanted: Callable[[], bool]
    ) -> bytes:
        """Policy, budget, act: the one path on which patients' data leaves, as a charged answer."""
        prepared = hospital.prepared(request.study_hash)
        hospital.demand(prepared.study)
        hospital.not_paused()
        work = ready(hospital, prepared, request, arrays)
        try:
            hospital.check_stopping()
            hospital.not_paused()  # again: to make ready takes its time
            if not wanted():
                raise Refusal("request-late", "nobody waits for the answer any more")
            hospital.ledger.charge(
                prepared.study,
                hospital.name,
                request,
                rounds_per_day=hospital.policy.rounds_per_day,
            )
            body, released = _act(work)
        finally:
            work.close()
            hospital.show(phase="ready")
        packed = self._charged(hospital, prepared, request, body, released)
        # Stored before it is returned: were it lost on the way, asking again must cost nothing.
        hospital.answers.write(request.digest, packed)
        hospital.forget_old_answers(prepared.study, request)
        return packed

    def _charged(
        self,
        hospital: Hospital,
        prepared: Prepared,
        request: Request,
        body: dict[str, Any],
        released: Arrays,
    ) -> bytes:
        epsilon = hospital.epsilon(prepared.study)
        hospital.show(epsilon=epsilon)
        charges = hospital.ledger.book.released(prepared.study.hash)
        rounds = sum(charge.event.population == "train" for charge in charges)
        receipt = hospital.ledger.receipt().model_dump(mode="json")
        body = {**body, "epsilon": epsilon, "rounds_charged": rounds, "receipt": receipt}
        return _sealed(hospital, _reply(hospital, request, body), released)

    # -- saying no --------------------------------------------------------------------------

    def _refuse(
        self, error: Exception, hospital: Hospital | None, request: Request | None, digest: str
    ) -> bytes:
        code = _code(error)
        speaker = hospital or self._speaker
        what = f"{request.kind} {request.round}" if request else "a message"
        speaker.log.error("refused %s: %s", what, code, exc_info=error)
        if not isinstance(error, Stopped):
            story = error.__cause__ if isinstance(error, DataProblem) else error
            shown = story if isinstance(story, FedwardError) else "see the site's daemon.log"
            log.error("error: site %s refused %s: %s: %s", speaker.name, what, code, shown)
        try:
            if hospital and request:
                hospital.status.refusal = code
                if request.kind in (*CHARGED, "prepare") and not isinstance(error, Stopped):
                    hospital.ledger.refuse(request, code)
        except Exception as second:  # a full disk, say; the refusal itself still goes out
            speaker.log.error("the refusal could not be recorded", exc_info=second)
        answer = Answer(site=hospital.name if hospital else "", request_digest=digest, refusal=code)
        return _sealed(speaker, answer)


def _act(work: Work) -> tuple[dict[str, Any], Arrays]:
    try:
        return work.run()
    except Stopped:
        raise
    except Exception as error:  # whatever it says may be about patients
        raise DataProblem from error


def _code(error: Exception) -> str:
    match error:
        case Refusal() | StudyError() | ModelError() | PrivacyError():
            return error.code
        case FedwardError() | DataProblem():
            return "data-problem"
        case _:
            return "internal"


def _unpack(packed: bytes) -> Envelope:
    try:
        return Envelope.unpack(packed)
    except (ValueError, SafetensorError, KeyError):
        raise Refusal("message-malformed", "the bytes are no envelope") from None


def _study(request: Request) -> Study:
    try:
        study = Study.model_validate_json(request.study or "")
    except ValidationError as error:
        raise Refusal("study-invalid", f"the study does not validate: {error}") from None
    if study.hash != request.study_hash:
        raise Refusal("message-malformed", "the study is not the one that its hash names")
    return study


def _receipts(request: Request) -> list[Receipt]:
    try:
        return [Receipt.model_validate(fields) for fields in request.receipts]
    except ValidationError:
        raise Refusal("message-malformed", "a receipt does not parse") from None


def _reply(hospital: Hospital, request: Request, body: dict[str, Any]) -> Answer:
    return Answer(site=hospital.name, request_digest=request.digest, body=body)


def _sealed(hospital: Hospital, answer: Answer, arrays: Arrays | None = None) -> bytes:
    return hospital.identity.seal(answer, arrays).pack()

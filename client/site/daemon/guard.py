"""The guard: every request passes policy, then budget, and only then acts.

It assumes that relay and coordinator are hostile. What it lets out is a charged release, or a
function of public and ledger state; of an error only a stable code leaves, and the full story goes
to the hospital's own log.

| code | meaning |
|---|---|
| message-malformed, signature-invalid | not a request of a known coordinator |
| site-unknown | no such hospital here, or the study does not name it (with this key) |
| study-invalid, study-unapproved, mode-forbidden, privacy-refused | the policy says no |
| code-mismatch | coordinator and site run different versions |
| patients-too-few | fewer training patients than declared or than the policy asks for |
| validation-fraction-fixed | the site's patients are split by another share, for good |
| not-prepared | send `prepare` first; sent also after a restart of the daemon |
| adapter-invalid | names, shapes, types or values do not fit the study's model |
| budget-exhausted | the study's reserve here is spent |
| request-changed | the round was charged for another request; retry with a higher attempt |
| answer-lost | charged, but the answer is not kept; retry with a higher attempt |
| model-invalid | the study's SLM cannot be loaded here |
| data-problem | anything that went wrong with data, shard, encoders or vault |
| internal | anything else |
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
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
from common.messages import Answer, Arrays, Envelope, Request
from common.privacy.pricing import epsilon_by_population
from common.study import Study

log = logging.getLogger("fedward.daemon")

_ROUNDING = 1.001  # a study's own calibration rounds its noise to 4 digits


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

    def call(self, packed: bytes) -> bytes:
        """A packed, signed answer to a packed request. Never raises."""
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
            return self._answer(hospital, request, envelope.arrays)
        except Exception as error:
            return self._refuse(error, hospital, request, digest)

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
            {"name": name, "public_key": hospital.identity.public}
            for name, hospital in self.hospitals.items()
        ]
        body = {"sites": sites, "version": version("fedward"), "code_hash": self._code_hash}
        return _sealed(self._speaker, Answer(site="", request_digest=digest, body=body))

    # -- what is asked ----------------------------------------------------------------------

    def _answer(self, hospital: Hospital, request: Request, arrays: Arrays) -> bytes:
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
            return hospital.answers.read(request.digest) or self._release(hospital, request, arrays)

    def _prepare(self, hospital: Hospital, request: Request) -> bytes:
        if request.code_hash not in ("", self._code_hash):
            raise Refusal(
                "code-mismatch",
                "the coordinator's package `common` is not the one installed here",
                cure="install the same version of Fedward on both sides",
            )
        study = _study(request)
        self._admit(hospital, study)
        body = hospital.prepare(study)
        hospital.ledger.approve(study, runs=hospital.policy.runs)
        return _sealed(hospital, _reply(hospital, request, body))

    def _release(self, hospital: Hospital, request: Request, arrays: Arrays) -> bytes:
        """Policy, budget, act: the one path on which patients' data leaves, as a charged answer."""
        prepared = hospital.prepared(request.study_hash)
        self._admit(hospital, prepared.study)
        work = ready(hospital, prepared, request, arrays)
        try:
            hospital.check_stopping()
            hospital.ledger.charge(prepared.study, hospital.name, request)
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
        charges = hospital.ledger.released(prepared.study.hash)
        rounds = sum(charge.event.population == "train" for charge in charges)
        body = {**body, "epsilon": epsilon, "rounds_charged": rounds}
        return _sealed(hospital, _reply(hospital, request, body), released)

    def _admit(self, hospital: Hospital, study: Study) -> None:
        """The hospital's policy on a study."""
        policy, name = hospital.policy, hospital.name
        site = study.federation.sites.get(name)
        if site is None or site.public_key not in (None, hospital.identity.public):
            raise Refusal(
                "site-unknown",
                f"study '{study.name}' does not name site '{name}' with "
                f"the key {hospital.identity.public}",
            )
        if not {"*", study.hash} & set(policy.approved):
            raise Refusal(
                "study-unapproved",
                f"study '{study.name}' ({study.hash}) is not approved at site '{name}'",
                cure=f'to approve it, add "{study.hash}" to the site\'s policy.approved',
            )
        if not study.resolved:
            raise Refusal(
                "study-invalid",
                f"study '{study.name}' leaves its noise open",
                cure="send a resolved study",
            )
        if study.privacy.mode == "none":
            if not policy.allow_no_privacy:
                raise Refusal(
                    "mode-forbidden",
                    f"study '{study.name}' has no privacy, which site '{name}' does not allow",
                    cure="policy.allow_no_privacy = true lets everything about the patients leave",
                )
            return
        if study.privacy.batch_slack and not policy.allow_batch_slack:
            raise Refusal(
                "privacy-refused",
                f"study '{study.name}' charges for kernels that mix patients by a measure, not a "
                f"proof, which site '{name}' does not allow",
                cure="privacy.batch_slack = 0: where kernels mix, patients then train one per pass",
            )
        promised = {
            "train": study.privacy.epsilon,
            "validation": study.evaluation.epsilon or study.privacy.epsilon,
        }
        prices = epsilon_by_population(study.reserved_events(name), study.privacy.delta)
        for population, price in prices.items():
            if price > promised[population] * _ROUNDING:
                raise Refusal(
                    "privacy-refused",
                    f"study '{study.name}' promises epsilon {promised[population]:g} to its "
                    f"{population} patients, but its releases price at {price:.3f}",
                    cure="resolve the study again",
                )

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
                if request.kind in ("train", "evaluate"):
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


def _reply(hospital: Hospital, request: Request, body: dict[str, Any]) -> Answer:
    return Answer(site=hospital.name, request_digest=request.digest, body=body)


def _sealed(hospital: Hospital, answer: Answer, arrays: Arrays | None = None) -> bytes:
    return hospital.identity.seal(answer, arrays).pack()

"""The privacy ledger of one site: what was released about whom, written before it happens.

One JSON object per line, each naming the SHA-256 of the line before it, so that a change anywhere
but at the end is evident. Lines describe events, never epsilon: prices are computed from them
(`common.privacy.pricing`) and can be computed again by anyone.

Order of a charge: exclusive file lock; read what others appended; check the reserve; append; fsync;
unlock. Only then may the caller act. Two processes on one file therefore never spend one reserve
twice, and a crash after the charge leaves it spent. Nothing is ever refunded.

One rule for an unfinished last line (power cut, full disk): the release waits for the fsync, so an
unfinished line can only be a charge that nothing followed. If it still reads as a whole line of the
chain it is ended and counts as spent; if not, it is moved to `ledger.torn` beside the ledger and a
`recovered` line records its length and SHA-256.

A valid chain proves a *prefix*: that no later line was cut off is proven only by copies of `head`
held elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import PrivacyError, Refusal
from common.messages import Request
from common.privacy.events import Population, ReleaseEvent, Unprotected
from common.privacy.pricing import epsilon_by_population
from common.study import Study

log = logging.getLogger(__name__)

START = "0" * 64
"""`previous` of the first line."""

Event = Annotated[ReleaseEvent, Field(discriminator="kind")]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    previous: str
    at: str


class Genesis(_Line):
    """First line. `entropy` is `seeded` where tests replaced the operating system's randomness; no
    audit accepts such a ledger as private."""

    line: Literal["genesis"] = "genesis"
    ledger_schema: Literal[1] = 1
    site: str
    entropy: Literal["os", "seeded"]


class Reserve(BaseModel):
    """`count` releases of one kind that an approved study may make."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=1)
    event: Event


class StudyApproved(_Line):
    """The hospital let a study in and set aside all that it may release, spare rounds included."""

    line: Literal["study-approved"] = "study-approved"
    study_hash: str
    name: str
    delta: float
    runs: int = Field(ge=1)
    reserved: tuple[Reserve, ...]


class Released(_Line):
    """A charge: durable before the release, and spent whether or not the release came about."""

    line: Literal["released"] = "released"
    study_hash: str
    run: str
    round: int
    attempt: int
    request_digest: str
    event: Event


class Refused(_Line):
    """A signed request for a release that the site declined."""

    line: Literal["refused"] = "refused"
    study_hash: str
    request_digest: str
    code: str


class Recovered(_Line):
    """An unfinished last line was moved to `ledger.torn`."""

    line: Literal["recovered"] = "recovered"
    torn_bytes: int
    torn_sha256: str


Line = Genesis | StudyApproved | Released | Refused | Recovered
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="line")])


class Ledger:
    """A ledger file, shared safely between threads and processes.

    Attributes:
        path: The JSONL file, mode 0600.
        site: Name in its first line.
        lines: All lines read so far, oldest first.
        head: SHA-256 of the last line: the receipt that others may keep.
    """

    def __init__(self, path: Path) -> None:
        """Use `open`, which creates and checks."""
        self.path = path
        self.site = ""
        self.lines: list[Line] = []
        self.head = START
        self._offset = 0
        self._approved: dict[str, StudyApproved] = {}
        self._released: dict[str, list[Released]] = {}
        self._refused: set[tuple[str, str]] = set()
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, site: str, *, simulated: bool = False) -> Ledger:
        """Reads and verifies the ledger, or begins one.

        Args:
            simulated: Randomness of the releases is seeded (tests). An existing ledger keeps its
                mark; one begun with the operating system's entropy refuses seeded releases.

        Raises:
            PrivacyError: The chain is broken, the ledger is another site's, or it would have to
                record seeded releases as private ones.
        """
        ledger = cls(Path(path))
        ledger.path.parent.mkdir(parents=True, exist_ok=True)
        with ledger._locked() as file:
            if not ledger.lines:
                entropy: Literal["os", "seeded"] = "seeded" if simulated else "os"
                ledger._append(file, Genesis(previous=START, at=_now(), site=site, entropy=entropy))
                _sync_folder(ledger.path.parent)
        if ledger.site != site:
            raise PrivacyError(
                f"{path} is the ledger of site '{ledger.site}', not '{site}'",
                cure="give each site its own state folder",
            )
        if simulated and not ledger.simulated:
            raise PrivacyError(
                f"{path} records releases under real randomness; seeded ones cannot join it",
                cure="run simulations with seeded entropy on a state folder of their own",
            )
        return ledger

    @property
    def simulated(self) -> bool:
        """Whether the first line says that randomness was seeded."""
        first = self.lines[0]
        return isinstance(first, Genesis) and first.entropy == "seeded"

    # -- writing ------------------------------------------------------------------------------

    def approve(self, study: Study, *, runs: int = 1) -> None:
        """Sets aside everything that `study` may release here; does nothing when it already is.

        Args:
            runs: How often the hospital lets the study run. The reserve belongs to the study's
                hash: a run beyond `runs` finds only what earlier ones left of it.
        """
        with self._locked() as file:
            earlier = self._approved.get(study.hash)
            if earlier is not None and earlier.runs >= runs:
                return
            reserved: list[Reserve] = []
            for event in study.reserved_events(self.site):
                if reserved and reserved[-1].event == event:
                    reserved[-1] = Reserve(count=reserved[-1].count + runs, event=event)
                else:
                    reserved.append(Reserve(count=runs, event=event))
            self._append(
                file,
                StudyApproved(
                    previous=self.head,
                    at=_now(),
                    study_hash=study.hash,
                    name=study.name,
                    delta=study.privacy.delta,
                    runs=runs,
                    reserved=tuple(reserved),
                ),
            )

    def charge(self, study: Study, site: str, request: Request) -> Released:
        """Spends one release of the study's reserve; durable when this returns.

        A request is charged once. Whoever holds the stored answer returns that; where it was lost
        (a crash between charge and answer), a retry with a higher `attempt` is another request and
        another charge: the same noise cannot be made again, and fresh noise is not free.

        Raises:
            Refusal: `study-unapproved`; `budget-exhausted`: the reserve of this kind is spent;
                `answer-lost`: this very request was charged before; `request-changed`: the round
                was charged for another request and `attempt` is not higher than then.
        """
        if request.kind not in ("train", "evaluate") or site != self.site:
            raise PrivacyError(f"a '{request.kind}' request to site '{site}' is no release here")
        training = request.kind == "train"
        event = study.round_event(site) if training else study.evaluation_event()
        with self._locked() as file:
            approval = self._approved.get(study.hash)
            if approval is None:
                raise Refusal("study-unapproved", f"study {study.hash} was never approved here")
            spent = [r for r in self._released.get(study.hash, []) if r.event == event]
            for earlier in spent:
                if earlier.request_digest == request.digest:
                    raise Refusal(
                        "answer-lost",
                        f"round {request.round} of run {request.run} was charged, but its answer "
                        "is not kept",
                        cure="retry with a higher attempt: a new charge",
                    )
            for earlier in spent:
                same_round = (earlier.run, earlier.round) == (request.run, request.round)
                if same_round and request.attempt <= earlier.attempt:
                    raise Refusal(
                        "request-changed",
                        f"round {request.round} of run {request.run} was charged for another "
                        f"request (attempt {earlier.attempt})",
                        cure="retry a lost round with a higher attempt",
                    )
            allowed = sum(r.count for r in approval.reserved if r.event == event)
            if len(spent) >= allowed:
                raise Refusal(
                    "budget-exhausted",
                    f"study '{study.name}' has spent all {allowed} releases of kind "
                    f"'{request.kind}' reserved at site '{site}'",
                    cure="a study that needs more is a new study, with its own price",
                )
            line = Released(
                previous=self.head,
                at=_now(),
                study_hash=study.hash,
                run=request.run,
                round=request.round,
                attempt=request.attempt,
                request_digest=request.digest,
                event=event,
            )
            self._append(file, line)
            return line

    def refuse(self, request: Request, code: str) -> None:
        """Records, once, that a signed request for a release was declined."""
        with self._locked() as file:
            if (request.digest, code) in self._refused:
                return
            self._append(
                file,
                Refused(
                    previous=self.head,
                    at=_now(),
                    study_hash=request.study_hash,
                    request_digest=request.digest,
                    code=code,
                ),
            )

    # -- reading ------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Reads what other processes appended."""
        with self._locked():
            pass

    def verify(self) -> int:
        """Checks the file from its first byte; returns the number of lines.

        Raises:
            PrivacyError: Naming the first line that does not follow from the one before it.
        """
        return len(Ledger.open(self.path, self.site).lines)

    def released(self, study_hash: str, run: str | None = None) -> tuple[Released, ...]:
        """Charges of a study, oldest first, of one run or of all."""
        charges = self._released.get(study_hash, [])
        return tuple(c for c in charges if run is None or c.run == run)

    def events(
        self, population: Population | None = None, study_hash: str | None = None
    ) -> tuple[ReleaseEvent, ...]:
        """Released events, oldest first, of one population or study or of all."""
        return tuple(
            charge.event
            for hash_, charges in list(self._released.items())
            if study_hash in (None, hash_)
            for charge in charges
            if population in (None, charge.event.population)
        )

    def unprotected(self) -> set[Population]:
        """Populations of which anything was ever released without privacy."""
        return {e.population for e in self.events() if isinstance(e, Unprotected)}

    def epsilon(self, delta: float, study_hash: str | None = None) -> dict[str, float]:
        """Epsilon at `delta` by population; infinity after an unprotected release.

        Over one study this is its price. Over all studies (`study_hash=None`) it is information
        only where later studies were chosen in the light of earlier answers.
        """
        spent = epsilon_by_population(self.events(study_hash=study_hash), delta)
        return {"train": 0.0, "validation": 0.0, **spent}

    # -- the file -----------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file under its exclusive lock, with everything in it read and checked."""
        with self._mutex:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read(file)
                yield file
            finally:
                os.close(file)  # releases the lock

    def _read(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size < self._offset:
            raise PrivacyError(
                f"{self.path} became shorter while in use: charges are missing",
                cure="restore it from the backup; never edit a ledger",
            )
        fresh = os.pread(file, size - self._offset, self._offset)
        *whole, tail = fresh.split(b"\n")
        for raw in whole:
            self._take(raw, self._parse(raw))
        if tail:
            self._recover(file, tail)

    def _recover(self, file: int, tail: bytes) -> None:
        try:
            line = self._parse(tail)
        except PrivacyError:
            aside = self.path.with_name("ledger.torn")
            with aside.open("ab") as torn:
                os.fchmod(torn.fileno(), 0o600)
                torn.write(tail + b"\n")
                torn.flush()
                os.fsync(torn.fileno())
            _sync_folder(self.path.parent)
            os.ftruncate(file, self._offset)
            log.warning(
                "%s: an unfinished last line of %d bytes, which no release followed, was "
                "moved to %s",
                self.path,
                len(tail),
                aside,
            )
            if self.lines:
                self._append(
                    file,
                    Recovered(
                        previous=self.head,
                        at=_now(),
                        torn_bytes=len(tail),
                        torn_sha256=hashlib.sha256(tail).hexdigest(),
                    ),
                )
        else:
            log.warning("%s: the last line was whole but not ended; it counts as spent", self.path)
            _write_all(file, b"\n")
            os.fsync(file)
            self._take(tail, line)

    def _parse(self, raw: bytes) -> Line:
        number = len(self.lines) + 1
        cure = "restore the ledger from its backup; never edit it"
        try:
            line = _LINE.validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise PrivacyError(
                f"{self.path}, line {number} is no ledger line: {first['msg']}", cure=cure
            ) from None
        if line.previous != self.head:
            raise PrivacyError(
                f"{self.path}, line {number} does not follow from line {number - 1}: a line was "
                "changed, removed or inserted",
                cure=cure,
            )
        if isinstance(line, Genesis) != (number == 1):
            raise PrivacyError(
                f"{self.path}, line {number}: a ledger has one genesis line, the first", cure=cure
            )
        return line

    def _append(self, file: int, line: Line) -> None:
        raw = line.model_dump_json().encode()
        _write_all(file, raw + b"\n")
        os.fsync(file)
        self._take(raw, line)

    def _take(self, raw: bytes, line: Line) -> None:
        self.lines.append(line)
        self.head = hashlib.sha256(raw).hexdigest()
        self._offset += len(raw) + 1
        if isinstance(line, Genesis):
            self.site = line.site
        elif isinstance(line, StudyApproved):
            self._approved[line.study_hash] = line
        elif isinstance(line, Released):
            self._released.setdefault(line.study_hash, []).append(line)
        elif isinstance(line, Refused):
            self._refused.add((line.request_digest, line.code))


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

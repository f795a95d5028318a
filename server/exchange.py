"""One question to many sites: routing, deadlines, retries, and the proof of who answered.

A node is a Flower SuperNode; a site is a hospital of the study. A node may host many sites, and in
a simulation every node reaches all of them, so requests are spread over the nodes that host a site
and move to another one when a node is lost.

A request is a function of (coordinator key, run, kind, round, site, attempt, arrays): its nonce is
derived, not drawn. Sending it again, also after the coordinator restarted, therefore asks for the
same answer, which the site has stored, and charges nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.envelope import error_code, from_record, request_message
from common.errors import FedwardError, Refusal
from common.identity import Identity, open_envelope, verify
from common.messages import Answer, Arrays, Envelope, Kind, Request, roster_proof
from common.privacy.receipts import Receipts
from common.study import Study

log = logging.getLogger("fedward")

RETRY_WITH_NEW_CHARGE = frozenset({"answer-lost", "internal"})
"""Refusals after which a site may be asked anew: it charged, or failed, without releasing."""
LOST_SECONDS = 90.0
"""How long a site may be unreachable, while nobody else is being waited for, until it is lost: a
SuperNode that was killed may not reconnect for 60 s."""


USELESS = frozenset({"answer-invalid", "relay-failed"})
"""Codes for an answer that came and cannot be read or believed."""
_TRIES_PER_NODE = 2  # after a useless answer; each costs the site the transfer of an adapter


class FederationError(FedwardError):
    """The run cannot go on. The text holds public values only."""

    code = "federation-failed"


class Grid(Protocol):
    """The part of Flower's `Grid` that is used."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Received:
    """A verified answer and its size on the wire, in bytes."""

    answer: Answer
    arrays: Arrays
    size: int


@dataclass
class Outcome:
    """What became of one question.

    Attributes:
        answers: By site, verified.
        refused: Code by site; the site answered and declined.
        lost: Code by site; nothing valid came in time.
        sent: Bytes sent, re-sends included.
        slowest: Seconds until the last of the answers.
    """

    answers: dict[str, Received] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    slowest: float = 0.0


@dataclass
class _Flight:
    """A site that has not answered yet, and is waited for until `end`."""

    request: Request
    envelope: Envelope
    size: int
    turn: int
    end: float
    sends: int = 0
    useless: int = 0
    sent_at: float = 0.0
    failing_since: float | None = None
    resend_at: float = 0.0
    code: str = "no-answer"


class Exchange:
    """Asks sites through the nodes that host them.

    Args:
        code_hash: Of the coordinator's code; sites of another one are named in the log.
        receipts: Heads of the sites' ledgers; kept up to date, and shown to sites that prepare.
        poll_seconds: Pause between looks for answers.
    """

    def __init__(
        self,
        grid: Grid,
        identity: Identity,
        study: Study,
        run: str,
        *,
        code_hash: str = "",
        receipts: Receipts | None = None,
        poll_seconds: float = 0.1,
        lost_seconds: float = LOST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.grid, self.identity, self.study, self.run = grid, identity, study, run
        self.code_hash, self.poll_seconds, self.lost_seconds = code_hash, poll_seconds, lost_seconds
        self.receipts = Receipts() if receipts is None else receipts
        self._clock, self._sleep = clock, sleep
        self.hosts: dict[str, list[int]] = {}
        self.keys: dict[str, str] = {
            name: site.public_key
            for name, site in study.federation.sites.items()
            if site.public_key
        }
        self._asked: set[int] = set()

    # -- who is there -----------------------------------------------------------------------

    def discover(self, *, seconds: float) -> None:
        """Asks nodes for their sites until every site of the roster is found, or time is up.

        Raises:
            FederationError: Two nodes show different keys for a site that the study does not pin,
                or the local simulation's daemon could not be started.
        """
        roster = self.study.federation.sites
        start = told = self._clock()
        again: dict[int, float] = {}  # node -> when to ask it
        flying: dict[str, tuple[int, Request]] = {}
        while True:
            now = self._clock()
            aloft = {node for node, _ in flying.values()}
            for node in sorted(set(self.grid.get_node_ids()) - self._asked - aloft):
                if now < again.get(node, 0.0):
                    continue
                again[node] = now + 2.0
                envelope = self.identity.seal(self._request("roster", "", 0, 0))
                left = max(1.0, start + seconds - now)
                identifier = self._push(request_message(envelope, "roster", node, seconds=left))
                if identifier:
                    flying[identifier] = (node, Request.model_validate_json(envelope.header))
            for message in self.grid.pull_messages(list(flying)) if flying else ():
                entry = flying.pop(message.metadata.reply_to_message_id, None)
                if entry is None:
                    continue
                code = error_code(message)
                if code == "daemon-not-started":
                    raise FederationError(
                        "the local simulation's daemon did not start",
                        cure="see daemon.log under FEDWARD_HOME (default ~/.fedward)",
                    )
                if code:
                    log.warning("a node did not answer: %s", code)
                else:
                    self._asked.add(entry[0])
                    self._admit(*entry, message)
            missing = [name for name in roster if name not in self.hosts]
            # With all sites found, nodes that still start are given a moment, to share the load.
            if not missing and (not flying or now - start > 2.0):
                return
            if now - start >= seconds:
                return
            if now - told >= 15:
                told = now
                log.info("waiting for sites: %s", ", ".join(missing))
            self._sleep(self.poll_seconds if flying else max(self.poll_seconds, 0.5))

    def _admit(self, node: int, request: Request, message: Any) -> None:
        """Notes which sites a node hosts; keys are the study's, else trusted on first use."""
        try:
            envelope = from_record(message.content)
            claimed = json.loads(envelope.header)["body"]["sites"]
            proof = roster_proof(request.digest)
            sites = {
                str(entry["name"]): str(entry["public_key"])
                for entry in claimed
                if verify(entry["public_key"], proof, bytes.fromhex(entry["proof"]))
            }
            answer = open_envelope(envelope, Answer, list(sites.values()))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, Refusal):
            log.warning("a node's roster is malformed")
            return
        if answer.request_digest != request.digest or answer.refusal:
            log.warning("a node's roster is not usable: %s", answer.refusal or "wrong request")
            return
        if self.code_hash and answer.body.get("code_hash") not in ("", None, self.code_hash):
            ours = [name for name in sites if name in self.study.federation.sites]
            log.warning("sites %s run other code than the coordinator", ", ".join(ours))
        for name, key in sites.items():
            if name not in self.study.federation.sites:
                continue
            if self.keys.setdefault(name, key) != key:
                if self.study.federation.sites[name].public_key:
                    log.warning("a node shows a key for site %s that the study does not name", name)
                    continue
                raise FederationError(
                    f"two nodes answer for site '{name}' with different keys",
                    cure=f"pin federation.sites.{name}.public_key in the study",
                )
            hosts = self.hosts.setdefault(name, [])
            if node not in hosts:
                hosts.append(node)

    # -- asking -----------------------------------------------------------------------------

    def ask(
        self,
        kind: Kind,
        sites: Iterable[str],
        *,
        seconds: float,
        round: int = 0,
        arrays: Arrays | None = None,
        briefly: Mapping[str, float] | None = None,
        progress: Callable[[Outcome, int], None] | None = None,
    ) -> Outcome:
        """Sends `kind` to `sites` and waits for all of them, at most `seconds`.

        Args:
            briefly: Sites that are waited for less long. Their requests say so, and a site that
                finds itself too late is not charged.
            progress: Called with the outcome so far and the number still awaited, at each look.

        Returns:
            Verified answers; codes for the rest.
        """
        outcome = Outcome()
        began = self._clock()
        order = list(self.study.federation.sites)
        waiting: dict[str, _Flight] = {}
        for site in sites:
            if site in self.hosts:
                end = began + min(seconds, (briefly or {}).get(site, seconds))
                waiting[site] = self._flight(kind, site, round, 0, arrays, order.index(site), end)
            else:
                outcome.lost[site] = "not-connected"
        flying: dict[str, str] = {}  # message id -> site
        while waiting:
            now = self._clock()
            aloft = set(flying.values())
            for site, flight in list(waiting.items()):
                if now >= flight.end:
                    outcome.lost[site] = flight.code
                    del waiting[site]
                elif site not in aloft and now >= flight.resend_at:
                    self._send(kind, site, flight, flying, outcome, flight.end - now)
            landed = False
            for message in self.grid.pull_messages(list(flying)) if flying else ():
                site = flying.pop(message.metadata.reply_to_message_id, "")
                if site not in waiting:
                    continue
                landed |= self._land(kind, site, message, waiting, outcome, arrays)
                if site in outcome.answers:
                    outcome.slowest = self._clock() - began
            if landed:  # a node is free again: whoever had none may try it now
                for flight in waiting.values():
                    flight.resend_at = 0.0
            self._give_up(waiting, flying, outcome)
            if progress:
                progress(outcome, len(waiting))
            if waiting and not landed:
                self._sleep(self.poll_seconds)
        return outcome

    def _request(self, kind: Kind, site: str, round: int, attempt: int) -> Request:
        seed = json.dumps([self.study.hash, self.run, kind, site, round, attempt]).encode()
        nonce = hashlib.sha256(self.identity.sign(b"fedward nonce" + seed)).hexdigest()[:32]
        return Request(
            kind=kind,
            run=self.run,
            site=site,
            round=round,
            attempt=attempt,
            nonce=nonce,
            study_hash=self.study.hash,
            code_hash=self.code_hash,
            study=self.study.canonical().decode() if kind == "prepare" else None,
            receipts=self.receipts.of(self.study.federation.sites) if kind == "prepare" else (),
        )

    def _flight(
        self,
        kind: Kind,
        site: str,
        round: int,
        attempt: int,
        arrays: Arrays | None,
        turn: int,
        end: float,
    ) -> _Flight:
        envelope = self.identity.seal(self._request(kind, site, round, attempt), arrays)
        size = len(envelope.header) + sum(a.nbytes for a in (arrays or {}).values())
        return _Flight(Request.model_validate_json(envelope.header), envelope, size, turn, end)

    def _send(
        self,
        kind: Kind,
        site: str,
        flight: _Flight,
        flying: dict[str, str],
        outcome: Outcome,
        left: float,
    ) -> None:
        hosts = self.hosts[site]
        node = hosts[(flight.turn + flight.sends) % len(hosts)]
        flight.sends += 1
        flight.sent_at = self._clock()
        identifier = self._push(request_message(flight.envelope, kind, node, seconds=left))
        if identifier:
            flying[identifier] = site
            outcome.sent += flight.size
        else:
            self._missed(flight, "node-unavailable")

    def _push(self, message: Any) -> str | None:
        # One at a time: Flower leaves out, or returns None for, a message to a node that is gone.
        return next(iter(self.grid.push_messages([message])), None)

    def _land(
        self,
        kind: Kind,
        site: str,
        message: Any,
        waiting: dict[str, _Flight],
        outcome: Outcome,
        arrays: Arrays | None,
    ) -> bool:
        """Takes in a reply; True when the site itself spoke."""
        flight = waiting[site]
        received = self._opened(site, flight.request, message)
        if isinstance(received, str):
            self._missed(flight, received)
            flight.useless += received in USELESS
            if flight.useless >= _TRIES_PER_NODE * len(self.hosts[site]):
                outcome.lost[site] = received
                del waiting[site]
            return False
        refusal = received.answer.refusal
        if refusal is None:
            outcome.answers[site] = received
            del waiting[site]
        elif (
            refusal in RETRY_WITH_NEW_CHARGE
            and flight.request.attempt < self.study.federation.retries
        ):
            number, attempt = flight.request.round, flight.request.attempt + 1
            waiting[site] = self._flight(
                kind, site, number, attempt, arrays, flight.turn, flight.end
            )
            waiting[site].code = refusal
        else:
            outcome.refused[site] = refusal
            del waiting[site]
        return True

    def _opened(self, site: str, request: Request, message: Any) -> Received | str:
        """The site's own answer to the request, or the code for having none."""
        code = error_code(message)
        if code is not None:
            return code
        try:
            return self._verified(site, request, message)
        except (Refusal, ValueError):
            return "answer-invalid"

    def _verified(self, site: str, request: Request, message: Any) -> Received:
        envelope = from_record(message.content)
        answer = open_envelope(envelope, Answer, [self.keys[site]])
        if answer.request_digest != request.digest or answer.site != site:
            raise ValueError("the answer is to another request")
        self.receipts.take(site, self.keys[site], answer.body.get("receipt"))
        size = len(envelope.header) + sum(a.nbytes for a in envelope.arrays.values())
        return Received(answer, envelope.arrays, size)

    def _missed(self, flight: _Flight, code: str) -> None:
        now = self._clock()
        flight.code = code
        if flight.failing_since is None:
            flight.failing_since = now
        flight.resend_at = now + min(5.0, 0.25 * 2 ** min(flight.sends, 5))

    def _give_up(
        self, waiting: dict[str, _Flight], flying: Mapping[str, str], outcome: Outcome
    ) -> None:
        """Drops sites that stay unreachable, unless somebody else is still at work: in a
        simulation with a dead worker, that one's is the only way left, and busy."""
        now = self._clock()
        aloft = {site for site in flying.values() if site in waiting}
        for site, flight in list(waiting.items()):
            if site in aloft or flight.failing_since is None:
                continue
            if any(
                waiting[other].failing_since is None or now - waiting[other].sent_at > 10
                for other in aloft
            ):
                flight.failing_since = now
            elif now - flight.failing_since >= self.lost_seconds:
                outcome.lost[site] = flight.code
                del waiting[site]

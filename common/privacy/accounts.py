"""What a ledger knows of each study: set aside, spent, left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from common.privacy.events import ReleaseEvent
from common.privacy.lifetime import Commitment
from common.privacy.lines import Decision, Released, Reserve, StudyApproved


@dataclass
class StudyAccount:
    """What the ledger knows of one study.

    Attributes:
        parts: Releases that each approval set aside beyond the earlier ones, by event. PLD prices
            one part, which was fixed beforehand; another may have been chosen after the first.
        allowed: Releases set aside, by event, those that are spent included.
        spent: Releases charged (or assumed, where lines were lost), by event.
        decisions: Of persons, oldest first.
        closed: Why nothing more is released: `revoked`, `reconciled`, or `undecided` (approved
            before lines were signed); empty while open.
    """

    study_hash: str
    name: str
    delta: float
    approvals: list[StudyApproved] = field(default_factory=list)
    parts: list[Counter[ReleaseEvent]] = field(default_factory=list)
    allowed: Counter[ReleaseEvent] = field(default_factory=Counter)
    spent: Counter[ReleaseEvent] = field(default_factory=Counter)
    released: list[Released] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    closed: str = ""

    @property
    def runs(self) -> int:
        """How often the study may spend its reserve."""
        return self.approvals[-1].runs if self.approvals else 0

    @property
    def expires(self) -> datetime | None:
        """From when on nothing more is released."""
        text = self.approvals[-1].expires if self.approvals else None
        return datetime.fromisoformat(text) if text else None

    @property
    def left(self) -> Counter[ReleaseEvent]:
        """What still may be released."""
        return Counter[ReleaseEvent]() if self.closed else self.allowed - self.spent

    @property
    def decided_at(self) -> str:
        """When a person last decided about it; empty before."""
        return max((decision.at for decision in self.decisions), default="")

    @property
    def committed(self) -> Counter[ReleaseEvent]:
        """All that was, or still may be, released."""
        return self.spent + self.left

    @property
    def wholes(self) -> list[Commitment]:
        """All that was ever set aside, revoked or not, part by part; and what was spent beyond."""
        beyond = Counter(self.spent)
        for part in self.parts:
            beyond -= part
        return [Commitment(self.delta, part) for part in (*self.parts, beyond) if part]

    def more(self, reserved: Counter[ReleaseEvent]) -> Counter[ReleaseEvent]:
        """What an approval of `reserved` in total sets aside beyond the earlier ones."""
        return reserved if self.closed else reserved - self.allowed

    def approve(self, approval: StudyApproved) -> Counter[ReleaseEvent]:
        """Takes an approval in; returns what it sets aside beyond the earlier ones."""
        more = self.more(total(approval.reserved))
        self.allowed = (self.spent if self.closed else self.allowed) + more
        self.parts.append(more)
        self.approvals.append(approval)
        self.closed = ""
        return more


def reserves(events: Mapping[ReleaseEvent, int]) -> tuple[Reserve, ...]:
    """Counted events as a line keeps them."""
    return tuple(Reserve(count=count, event=event) for event, count in events.items() if count > 0)


def total(reserved: tuple[Reserve, ...]) -> Counter[ReleaseEvent]:
    """Reserves as counted events; see `reserves`."""
    counted: Counter[ReleaseEvent] = Counter()
    for reserve in reserved:
        counted[reserve.event] += reserve.count
    return counted

"""The printed ledger: one page for people, and a draft for the records of data protection.

The page is one HTML file without network, scripts or other files. It names no patient; the ledger
holds none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.audit import prices, tables
from common.audit.prices import CapRow, EventRow, Row
from common.audit.reading import Reading
from common.audit.report import history
from common.audit.report.history import Decided, Life, Point
from common.audit.report.record import Record, record
from common.audit.report.risk import Risk, risk_at, risk_of
from common.audit.verify import NAMES, Verification, judge
from common.errors import FedwardError
from common.files import write_atomically
from common.privacy.book import POPULATIONS, Book
from common.privacy.events import Population
from common.privacy.lines import PatientErased
from common.privacy.policy import Policy
from common.privacy.receipts import Receipt

__all__ = ["Facts", "collect", "render", "write_page", "write_record"]


@dataclass(frozen=True)
class Facts:
    """All that the page says, of the lines that hold.

    Attributes:
        now, later, capped: What epsilon means: of what was released, of all that is set aside, and
            at the cap; by population.
    """

    verification: Verification
    file_sha256: str
    rows: tuple[Row, ...]
    together: tuple[Row, ...]
    caps: tuple[CapRow, ...]
    events: tuple[EventRow, ...]
    curve: dict[Population, tuple[Point, ...]]
    lives: tuple[Life, ...]
    decided: tuple[Decided, ...]
    erased: tuple[str, ...]
    now: dict[Population, Risk]
    later: dict[Population, Risk]
    capped: dict[Population, Risk]
    record: Record


def collect(
    reading: Reading,
    *,
    public_key: str | None = None,
    receipts: Sequence[Receipt] = (),
    policy: Policy | None = None,
    quick: bool = False,
) -> Facts:
    """Prices and judges a ledger; arguments as in `verify` and `price`."""
    book = reading.book
    found = judge(reading, public_key=public_key, receipts=receipts, policy=policy)
    rows, caps = prices.rows(book, quick=quick), prices.caps(book)
    lives, decided = history.lives(reading), history.decided(book)
    now = _risks(book, spent=True)
    return Facts(
        verification=found,
        file_sha256=reading.file_sha256,
        rows=rows,
        together=prices.together(book, quick=quick),
        caps=caps,
        events=prices.events(book),
        curve=history.curve(reading),
        lives=lives,
        decided=decided,
        erased=tuple(line.at for line in book.lines if isinstance(line, PatientErased)),
        now=now,
        later=_risks(book, spent=False),
        capped={cap.population: risk_at(cap.cap_epsilon, cap.cap_delta) for cap in caps},
        record=record(book, found, rows, caps, now, lives, decided, policy, _today()),
    )


def render(facts: Facts) -> str:
    """The page.

    Raises:
        FedwardError: matplotlib is not installed.
    """
    try:
        from common.audit.report import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise FedwardError(
            "the report's plots need matplotlib, which is not installed here",
            cure="pip install matplotlib, or fedward[site]; `verify` and `price` need neither",
        ) from None
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"eps": tables.eps, "percent": _percent, "day": _day}
    return environment.get_template("page.html.j2").render(
        facts=facts,
        found=facts.verification,
        record=facts.record,
        plots=plots,
        names=NAMES,
        mechanisms=tables.MECHANISMS,
        tolerance=prices.TOLERANCE,
        written=facts.record.written,
        fedward=version("fedward"),
    )


def write_page(facts: Facts, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
        FedwardError: The file cannot be written, or matplotlib is not installed.
    """
    _write(path, render(facts))


def write_record(facts: Facts, path: Path) -> None:
    """Writes the record as JSON. Errors as `write_page`."""
    _write(path, facts.record.model_dump_json(indent=2) + "\n")


def _risks(book: Book, *, spent: bool) -> dict[Population, Risk]:
    delta = prices.largest_delta(book)
    some = book.events() if spent else prices.committed(list(book.studies.values()))
    return {
        population: risk_of(
            Counter({e: n for e, n in some.items() if e.population == population}), delta
        )
        for population in POPULATIONS
    }


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, mode=0o644)
    except OSError as error:
        raise FedwardError(
            f"{path}: cannot write it ({error.strerror})", cure="name another place"
        ) from None


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _percent(share: float) -> str:
    """Rounded up, to one decimal; never 100 for less."""
    if 0.999 < share < 1:
        return ">99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share + 0.049:.1f}\N{NO-BREAK SPACE}%"


def _day(at: datetime | str) -> str:
    return at[:16].replace("T", " ") if isinstance(at, str) else at.strftime("%Y-%m-%d %H:%M")

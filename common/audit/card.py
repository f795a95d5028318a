"""The published model card, read back: what it says of privacy, site by site."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import FedwardError

_HASH = re.compile(r"study `([0-9a-f]{64})`")
_CURE = "give an adapter's folder or its README.md, as a run publishes it"
_ADAPTER = (Path("README.md"), Path("adapter/README.md"))


@dataclass(frozen=True)
class Claim:
    """A site's row of the privacy statement, as printed: epsilon is rounded up to 3 decimals, delta
    to 6 digits, sigma to 3 decimals."""

    site: str
    delta: float
    train: float
    validation: float
    at_most: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    evaluations: int


@dataclass(frozen=True)
class Head:
    """A row of the card's ledger receipts."""

    site: str
    public_key: str
    lines: int
    head: str


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        private: False where it says that there is no privacy; it then has no claims.
        simulated: Whether it says that no patient was protected.
    """

    path: Path
    study_hash: str
    private: bool
    simulated: bool
    claims: tuple[Claim, ...]
    heads: tuple[Head, ...]


def read_card(path: Path) -> Card:
    """Reads a model card: its file, the adapter's folder, or the run's.

    Raises:
        FedwardError: It holds no privacy statement that can be read; nothing is guessed.
    """
    if path.is_dir():
        path = next((path / name for name in _ADAPTER if (path / name).is_file()), path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise FedwardError(f"cannot read the model card {path} ({why})", cure=_CURE) from None
    study, statement = _HASH.search(text), _section(text, "Privacy statement")
    if study is None or not statement:
        raise FedwardError(f"{path} is no model card with a privacy statement", cure=_CURE)
    private = not statement.lstrip().startswith("**None.**")
    try:
        claims = tuple(_claim(row) for row in _table(statement))
        heads = tuple(_head(row) for row in _table(_section(text, "Ledger receipts")))
    except (KeyError, ValueError, OverflowError) as error:
        raise FedwardError(
            f"{path}: a table of the privacy statement cannot be read ({error})", cure=_CURE
        ) from None
    if private and not claims:
        raise FedwardError(f"{path}: the privacy statement names no site", cure=_CURE)
    names = [claim.site for claim in claims]
    if len(set(names)) < len(names):
        raise FedwardError(f"{path}: the privacy statement names a site twice", cure=_CURE)
    return Card(path, study[1], private, "> **Simulated.**" in text, claims, heads)


def _section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    return found[1] if found else ""


def _table(text: str) -> list[dict[str, str]]:
    """The first table: a dict per row, by the names of its columns."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    if len(cells) < 2:
        return []
    names, _, *rest = cells
    return [dict(zip(names, row, strict=True)) for row in rest]


def _claim(row: dict[str, str]) -> Claim:
    return Claim(
        site=row["site"],
        delta=_number(row["δ"]),
        train=_number(row["ε training"]),
        validation=_number(row["ε validation"]),
        at_most=_number(row["ε at most, spare rounds included"]),
        noise_multiplier=_number(row["σ"]),
        sample_rate=_number(row["q"]),
        steps=_count(row["steps"]),
        evaluations=_count(row["evaluations"]),
    )


def _head(row: dict[str, str]) -> Head:
    return Head(row["site"], row["public key"], _count(row["lines"]), row["head"])


def _number(text: str) -> float:
    found = math.inf if text == "∞" else float(text)
    if math.isnan(found) or found < 0:
        raise ValueError(f"'{text}' is no figure")
    return found


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"'{text}' is no count")
    return int(text)

"""A site with a ledger that goes on, for the tests of backups."""

from __future__ import annotations

from pathlib import Path

from common.identity import Identity
from common.privacy.book import Book
from common.privacy.ledger import Ledger
from deploy.site.layout import SiteFolder

WORDS = "correct horse battery staple"


class Life:
    """What a daemon does to a site's ledger."""

    def __init__(self, site: SiteFolder) -> None:
        self.site, self.path = site, site.state / "ledger.jsonl"

    def go_on(self, lines: int = 1) -> None:
        ledger = Ledger.open(self.path, "north", Identity.open(self.site.state / "site.key"))
        for n in range(lines):
            ledger.give_receipt(f"board {n}")

    @property
    def lines(self) -> int:
        return len(Book.read(self.path).lines)


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }

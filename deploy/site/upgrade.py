"""Upgrade of a site: another version is installed, and its relay may run that version's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.site.daemon.config import DaemonConfig
from client.site.daemon.state import LEDGER
from common.privacy.book import Book
from deploy.site.layout import SiteFolder
from simulations import bundle


@dataclass(frozen=True)
class Upgrade:
    """A change of the code that the relay may run: its SHA-256 before and after."""

    before: str
    after: str


def plan_upgrade(root: Path) -> Upgrade:
    """Checks that this version reads the site's files, and says what would change.

    Raises:
        FedwardError: Configuration, policy, roster or ledger do not load.
    """
    folder = SiteFolder(root)
    DaemonConfig.load(folder.config_file)
    if (folder.state / LEDGER).exists():
        Book.read(folder.state / LEDGER)
    return Upgrade(folder.relay.config().bundle, bundle.sha256())


def upgrade(root: Path, change: Upgrade) -> None:
    """Lets the relay run the installed version's code, and no other."""
    relay = SiteFolder(root).relay
    relay.configure(relay.config().model_copy(update={"bundle": change.after}))

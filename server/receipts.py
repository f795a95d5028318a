"""The heads of the sites' ledgers, as their answers state them.

A coordinator that keeps them can tell a hospital whose ledger was cut or restored from a backup,
and an auditor can hold the ledger against them. They outlive a run: the file lies beside the
coordinator's key.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import FedwardError
from common.privacy.receipts import Receipt

log = logging.getLogger("fedward")


class Receipts:
    """The furthest receipt of each site, by site and key.

    Args:
        path: File that keeps them; None keeps them in memory.

    Raises:
        FedwardError: The file holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._kept: dict[tuple[str, str], Receipt] = {}
        if path is not None and path.exists():
            try:
                for fields in json.loads(path.read_text()):
                    receipt = Receipt.model_validate(fields)
                    self._kept[receipt.site, receipt.public_key] = receipt
            except (ValidationError, ValueError, TypeError):
                raise FedwardError(
                    f"{path} holds no receipts", cure="restore it from the backup, or remove it"
                ) from None

    def take(self, site: str, public_key: str, fields: Any) -> None:
        """Keeps the receipt of a verified answer, if it is genuine and further than the last."""
        try:
            receipt = Receipt.model_validate(fields)
        except ValidationError:
            return
        if (receipt.site, receipt.public_key) != (site, public_key) or not receipt.genuine:
            log.warning("site %s gave a receipt that is not its own", site)
            return
        before = self._kept.get((site, public_key))
        if before is not None and before.lines >= receipt.lines:
            return
        self._kept[site, public_key] = receipt
        self._save()

    def latest(self, site: str) -> Receipt | None:
        """The furthest receipt of a site."""
        found = [r for (name, _), r in self._kept.items() if name == site]
        return max(found, key=lambda r: r.lines, default=None)

    def of(self, sites: Iterable[str]) -> tuple[dict[str, Any], ...]:
        """The receipts of these sites, as a request carries them."""
        names = set(sites)
        return tuple(r.model_dump(mode="json") for r in self._kept.values() if r.site in names)

    def _save(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        kept = [receipt.model_dump(mode="json") for receipt in self._kept.values()]
        partial.write_text(json.dumps(kept, indent=1))
        os.replace(partial, self._path)

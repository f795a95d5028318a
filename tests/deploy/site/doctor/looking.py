"""Looks at single checks of the doctor."""

from __future__ import annotations

from typing import Any

import pytest

from common.study import Study
from deploy.site.doctor import checks
from deploy.site.doctor.checks import CHECKS, examine
from deploy.site.doctor.visit import Finding
from deploy.site.layout import SiteFolder


def look(site: SiteFolder, *names: str, study: Study | None = None, **options: Any) -> Any:
    """Findings of some checks and of all that they wait for, by name."""
    wanted = set(names)
    for check in reversed(CHECKS):
        if check.name in wanted:
            wanted |= set(check.after)
    kept = tuple(check for check in CHECKS if check.name in wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "CHECKS", kept)
        found = examine(site.root, study, **options)
    return {finding.check: finding for finding in found}


def one(site: SiteFolder, name: str, **options: Any) -> Finding:
    finding: Finding = look(site, name, **options)[name]
    return finding


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items()}

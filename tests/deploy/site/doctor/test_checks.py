"""The examination as a whole: order, what is skipped, nothing is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import FedwardError
from common.identity import Identity
from common.privacy.ledger import Ledger
from deploy.site.doctor.checks import CHECKS, examine
from deploy.site.layout import SiteFolder
from tests.deploy.site.doctor.looking import one


def test_a_site_that_is_well_fails_nothing(
    make_site: Callable[..., SiteFolder], coordinator: Any
) -> None:
    with coordinator.server() as server:
        site = make_site(port=server.port)
        found = examine(site.root)
    assert [f.check for f in found] == [check.name for check in CHECKS]
    assert [f for f in found if f.verdict in ("fail", "skip")] == []
    # What a new site has still to see to.
    warned = {f.check for f in found if f.verdict == "warn"}
    assert warned >= {"policy", "roster", "daemon"}
    assert warned <= {"policy", "roster", "daemon", "disk", "GPU", "permissions"}
    assert all(f.cure for f in found if f.verdict == "warn")


def test_only_a_sites_folder_is_examined(tmp_path: Path) -> None:
    with pytest.raises(FedwardError, match="no site's folder"):
        examine(tmp_path)


def test_every_check_waits_for_earlier_ones_only() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert set(check.after) <= seen
        seen.add(check.name)
    assert len(seen) == len(CHECKS)


def test_looking_changes_nothing(site: SiteFolder) -> None:
    Ledger.open(site.state / "ledger.jsonl", "north", Identity.open(site.state / "site.key"))
    before = {p: p.read_bytes() for p in site.root.rglob("*") if p.is_file()}
    examine(site.root, timeout=0.2)
    kept = {p: p.read_bytes() for p in site.root.rglob("*") if p.is_file()}
    assert {p: d for p, d in kept.items() if "vault" not in p.parts} == {
        p: d for p, d in before.items() if "vault" not in p.parts
    }
    (site.state / "site.key").unlink()
    assert one(site, "ledger").verdict == "fail"
    assert not (site.state / "site.key").exists()


def test_what_may_not_be_read_is_skipped_not_failed(site: SiteFolder) -> None:
    """The relay's user examines what it may."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from deploy.site.doctor.checks import CHECKS\n"
        "from deploy.site.doctor.visit import Visit\n"
        "from deploy.site.layout import SiteFolder\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "keep = ('configuration', 'policy', 'vault', 'ledger', 'shard')\n"
        "visit, found = Visit(SiteFolder(Path(sys.argv[1]))), {}\n"
        "for c in CHECKS:\n"
        "    if c.name in keep: found[c.name] = c.run(visit, found)\n"
        "print(sorted({f.verdict for f in found.values()}))"
    )
    for parent in (site.root, *site.root.parents[:3]):
        parent.chmod(0o711)
    done = subprocess.run(
        [sys.executable, "-c", code, str(site.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['skip']"

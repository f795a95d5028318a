"""`fedward site doctor`: what keeps a site from taking part, and the cure.

Checks run in order; one that waits for another one is skipped when that one failed. Nothing is
changed anywhere. What a check says may name files, tables and columns of the hospital: it is for
the people there.
"""

from __future__ import annotations

from pathlib import Path

from common.study import Study
from deploy.site.doctor import coordinator, hospital, machine
from deploy.site.doctor.visit import NETWORK_SECONDS, Check, Finding, Visit
from deploy.site.layout import LayoutError, SiteFolder

CHECKS = (
    Check("versions", machine.versions),
    Check("configuration", hospital.configuration),
    Check("policy", hospital.policy),
    Check("permissions", hospital.permissions),
    Check("disk", machine.disk),
    Check("GPU", machine.gpu),
    Check("shard", hospital.shard, ("configuration",)),
    Check("vault", hospital.vault),
    Check("ledger", hospital.ledger),
    Check("roster", hospital.roster),
    Check("daemon", hospital.daemon, ("configuration",)),
    Check("relay", coordinator.relay_config),
    Check("bundle", machine.pinned_bundle, ("relay",)),
    Check("certificate", coordinator.certificate, ("relay",)),
    Check("DNS", coordinator.dns, ("relay",)),
    Check("TCP", coordinator.tcp, ("DNS",)),
    Check("proxy", coordinator.proxy, ("TCP",)),
    Check("TLS", coordinator.server_tls, ("proxy",)),
    Check("mutual TLS", coordinator.client_tls, ("certificate", "TLS")),
    Check("clock", coordinator.clock, ("mutual TLS",)),
)


def examine(
    root: Path, study: Study | None = None, *, timeout: float = NETWORK_SECONDS
) -> list[Finding]:
    """Runs every check.

    Args:
        study: Whose SLM shall fit this machine.
        timeout: Of each step over the network, seconds.

    Raises:
        LayoutError: `root` is no site's folder.
    """
    visit = Visit(SiteFolder(root.absolute()), study, timeout)
    if not visit.folder.state.is_dir() or not visit.folder.request.exists():
        raise LayoutError(
            f"{root} is no site's folder", cure="make one with `fedward site init`, or restore it"
        )
    found: dict[str, Finding] = {}
    for check in CHECKS:
        found[check.name] = check.run(visit, found)
    return list(found.values())

"""One examination of a site: checks, what they find, and what they tell each other."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.site.daemon.config import DaemonConfig
from common.errors import FedwardError
from common.study import Study
from deploy.enrolment import EnrolmentRequest, Invite
from deploy.site.layout import RelayConfig, SiteFolder
from deploy.site.setup import invite_path

Verdict = Literal["pass", "warn", "fail", "skip"]

NETWORK_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """What one check found. `cure` is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    text: str
    cure: str = ""


class CheckFailed(FedwardError):
    """The site cannot take part like this."""


class CheckWarning(FedwardError):
    """The site can take part; somebody should look."""


@dataclass
class Visit:
    """One examination: what earlier checks found out for later ones.

    Attributes:
        timeout: Of each step over the network, seconds.
        config: Of the daemon; None until it was read.
        clock_offset: By which this clock is ahead of the coordinator's, seconds; None if unknown.
    """

    folder: SiteFolder
    study: Study | None = None
    timeout: float = NETWORK_SECONDS
    config: DaemonConfig | None = None
    _relay: RelayConfig | None = field(default=None, repr=False)
    clock_offset: float | None = None

    @property
    def relay(self) -> RelayConfig:
        if self._relay is None:
            insist_readable(self.folder.relay.config_file)
            self._relay = self.folder.relay.config()
        return self._relay

    @property
    def invite(self) -> Invite:
        return Invite.read(invite_path(self.folder))

    @property
    def site(self) -> str:
        return EnrolmentRequest.read(self.folder.request).site

    @property
    def proxy(self) -> str | None:
        """As the relay uses it: relay.toml's, or the environment's."""
        if self.relay.proxy is not None:
            return self.relay.proxy
        if urllib.request.proxy_bypass(self.relay.host):
            return None
        proxies = urllib.request.getproxies()
        found = proxies.get("https") or proxies.get("all")
        return f"http://{found}" if found and "://" not in found else found


@dataclass(frozen=True)
class Check:
    """`act` returns what is well, or raises; `after` names checks that must not have failed."""

    name: str
    act: Callable[[Visit], str]
    after: tuple[str, ...] = ()

    def run(self, visit: Visit, before: dict[str, Finding]) -> Finding:
        """Makes a finding of whatever `act` does. `before`: what earlier checks found, by name."""
        for name in self.after:
            if before[name].verdict in ("fail", "skip"):
                return Finding(self.name, "skip", f"waits for '{name}'")
        try:
            return Finding(self.name, "pass", self.act(visit))
        except PermissionError as error:
            text = f"this user may not read {error.filename}"
            return Finding(self.name, "skip", text, "run it as root, or as the file's owner")
        except FedwardError as error:
            text = str(error).removesuffix(f"\n  cure: {error.cure}")
            verdict: Verdict = "warn" if isinstance(error, CheckWarning) else "fail"
            return Finding(self.name, verdict, text, error.cure)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            return Finding(self.name, "fail", f"{place}{error.strerror or error}")


def insist_readable(path: Path) -> None:
    """Modules of the house turn a missing permission into their own error; here it is a skip."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(13, "Permission denied", str(path))

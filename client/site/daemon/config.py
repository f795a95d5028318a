"""What a hospital tells its daemon: which shards it hosts, where their state lies, and the policy.

The file is the hospital's own; nothing in it comes from a coordinator. A site's `policy` is the
path of its policy file, or the policy itself as a table.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import FedwardError, explain
from common.privacy.policy import Policy
from common.study import Name

_SOCKET_BYTES = 100  # of a Unix socket's path; Linux admits 107


class ConfigError(FedwardError):
    """A daemon's configuration that cannot be used as written."""

    code = "config-invalid"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteConfig(_Part):
    """One hosted hospital.

    Attributes:
        name: As the studies' roster names it.
        shard: Folder of its data, read only.
        state: Folder of its ledger, keys, vault, answers and logs. Losing it loses the count of
            what was released: back it up, and give no two sites the same one.
        roster: File of the roster that all its hospitals signed; studies with anybody else are
            refused. None leaves the coordinator to say who takes part.
    """

    name: Name
    shard: Path
    state: Path
    policy: Policy = Policy()
    roster: Path | None = None


class DaemonConfig(_Part):
    """A daemon: its socket and the hospitals it hosts.

    Attributes:
        socket: Unix socket, made with mode 0600: whoever runs the relay must be its owner.
        socket_group: Group of the operating system that may use the socket too (mode 0660): the
            relay's, when it is another user, as it should be.
        idle_exit_seconds: Ends the daemon after so long without a request; None never does.
        threads: Of torch on the CPU; None leaves torch's default.
        device: `cpu`, `cuda`, `cuda:1` …; None takes the GPU where there is one.
        simulated: Virtual hospitals. They approve every study that their policy allows, and need no
            lifetime cap. The split of patients into training and validation follows from the
            study's seed, so that simulations can be compared; in a real hospital it is random and
            secret. Sampling and noise are the operating system's in both.
    """

    socket: Path
    socket_group: str | None = None
    sites: tuple[SiteConfig, ...] = Field(min_length=1)
    idle_exit_seconds: float | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, ge=1)
    device: str | None = None
    simulated: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> DaemonConfig:
        for what in ("name", "state"):
            values = [getattr(site, what) for site in self.sites]
            doubled = sorted({str(v) for v in values if values.count(v) > 1})
            if doubled:
                raise ValueError(f"two sites have the {what} '{doubled[0]}'")
        for site in self.sites:
            if site.policy.lifetime is None and not self.simulated:
                raise ValueError(
                    f"the policy of site '{site.name}' has no lifetime, which puts no end to what "
                    "its patients spend: add [lifetime.train] and [lifetime.validation] with "
                    "epsilon and delta"
                )
        return self

    @classmethod
    def load(cls, path: str | Path) -> DaemonConfig:
        """Reads a TOML file; relative paths in it start at its folder.

        Raises:
            ConfigError: One message naming every wrong key.
        """
        path = Path(path)
        base = path.absolute().parent

        def placed(value: str | Path) -> Path:
            try:
                return base / Path(value).expanduser()
            except RuntimeError:  # ~nobody
                raise ConfigError(f"{path}: there is no home folder for '{value}'") from None

        try:
            raw = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path} ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        sites = raw.get("sites")
        for site in sites if isinstance(sites, list) else ():
            if isinstance(site, dict) and isinstance(site.get("policy"), str):
                site["policy"] = Policy.load(placed(site["policy"]))
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"{path}: {explain(error)}", cure="see docs/policy.md") from None
        there = tuple(
            site.model_copy(
                update={
                    "shard": placed(site.shard),
                    "state": placed(site.state),
                    "roster": placed(site.roster) if site.roster else None,
                }
            )
            for site in config.sites
        )
        socket = placed(config.socket)
        if len(str(socket).encode()) > _SOCKET_BYTES:
            raise ConfigError(
                f"{path}: the socket's path is longer than {_SOCKET_BYTES} bytes, which Unix does "
                f"not admit: {socket}",
                cure="give socket an absolute path below /run",
            )
        return config.model_copy(update={"socket": socket, "sites": there})

    def to_toml(self) -> str:
        """The file that `load` reads back."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value

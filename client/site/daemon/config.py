"""What a hospital tells its daemon: which shards it hosts, where their state lies, and the policy.

The file is the hospital's own; nothing in it comes from a coordinator.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import FedwardError
from common.study import Name

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Approval = Annotated[str, Field(pattern=r"^(\*|[0-9a-f]{64})$")]
_SOCKET_BYTES = 100  # of a Unix socket's path; Linux admits 107


class ConfigError(FedwardError):
    """A daemon's configuration that cannot be used as written."""

    code = "config-invalid"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(_Part):
    """What the hospital allows. The defaults allow nothing.

    Attributes:
        coordinators: Public keys whose requests are heard, hex.
        approved: Hashes of the studies that may run. `*` is for virtual hospitals: every study has
            a budget of its own, and refusals for too few patients would tell how many there are.
        allow_no_privacy: Lets studies of mode `none` run: their releases have no privacy at all,
            and the ledger prices the patients at infinity for ever.
        allow_batch_slack: Lets studies run on kernels that round a patient by the others in the
            pass (`privacy.batch_slack` above 0). What that adds to the sensitivity is measured, and
            a coordinator who makes adapters for it can exceed the measure.
        min_patients: Training patients without whom no study runs, whatever it declares.
        runs: How often one study may spend its reserve. Two runs cost twice.
    """

    coordinators: tuple[PublicKey, ...] = ()
    approved: tuple[Approval, ...] = ()
    allow_no_privacy: bool = False
    allow_batch_slack: bool = False
    min_patients: int = Field(default=1, ge=1)
    runs: int = Field(default=1, ge=1)


class SiteConfig(_Part):
    """One hosted hospital.

    Attributes:
        name: As the studies' roster names it.
        shard: Folder of its data, read only.
        state: Folder of its ledger, keys, vault, answers and logs. Losing it loses the count of
            what was released: back it up, and give no two sites the same one.
    """

    name: Name
    shard: Path
    state: Path
    policy: Policy = Policy()


class DaemonConfig(_Part):
    """A daemon: its socket and the hospitals it hosts.

    Attributes:
        socket: Unix socket, made with mode 0600: whoever runs the relay must be its owner.
        idle_exit_seconds: Ends the daemon after so long without a request; None never does.
        threads: Of torch on the CPU; None leaves torch's default.
        device: `cpu`, `cuda`, `cuda:1` …; None takes the GPU where there is one.
        simulated: Virtual hospitals. The split of patients into training and validation then
            follows from the study's seed, so that simulations can be compared; in a real hospital
            it is random and secret. Sampling and noise are the operating system's in both.
    """

    socket: Path
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
            if "*" in site.policy.approved and not self.simulated:
                raise ValueError(
                    f"site '{site.name}' approves every study ('*'), which puts no end to what its "
                    "patients spend: list the hashes of the studies that may run"
                )
        if len(str(self.socket).encode()) > _SOCKET_BYTES:
            raise ValueError(
                f"the socket's path is longer than {_SOCKET_BYTES} bytes, which Unix does not "
                f"admit: {self.socket}"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> DaemonConfig:
        """Reads a TOML file; relative paths in it start at its folder.

        Raises:
            ConfigError: One message naming every wrong key.
        """
        path = Path(path)
        try:
            raw = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path} ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            problems = [
                f"{'.'.join(str(part) for part in item['loc']) or 'file'}: "
                + ("unknown key" if item["type"] == "extra_forbidden" else item["msg"])
                for item in error.errors(include_url=False)
            ]
            raise ConfigError(
                f"{path}: {'; '.join(problems)}", cure="see client/site/daemon/config.py"
            ) from None
        base = path.absolute().parent

        def placed(value: Path) -> Path:
            return base / value.expanduser()

        sites = tuple(
            site.model_copy(update={"shard": placed(site.shard), "state": placed(site.state)})
            for site in config.sites
        )
        return config.model_copy(update={"socket": placed(config.socket), "sites": sites})

    def to_toml(self) -> str:
        """The file that `load` reads back."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value

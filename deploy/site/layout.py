"""Where a site's files lie, and what its relay is told.

```
site.toml  policy.toml   the daemon's configuration and the hospital's policy
request.json             the enrolment request, public
state/                   the daemon's: ledger, keys, vault; nobody else reads it
run/                     the daemon's socket, open to the daemon's group
relay/                   the relay's: relay.toml, keys, certificates, log, flower/
```
Daemon and relay are different users of the operating system; the relay reads nothing outside
`relay/` and `run/`.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedwardError, explain
from common.files import atomic_file
from common.privacy.fields import Hash
from common.study import Name


class LayoutError(FedwardError):
    """A folder that is no site's, or a file of it that cannot be used."""

    code = "site-folder-invalid"


class RelayConfig(BaseModel):
    """`relay/relay.toml`.

    Attributes:
        host, port: The coordinator's public address.
        bundle: SHA-256 of the only code that the relay may run.
        proxy: URL of the HTTP proxy to the outside; None takes HTTPS_PROXY, if it is set.
        socket: The daemon's.
        max_message_bytes: Of one answer from the coordinator; a larger one is cut off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: Name
    host: str
    port: int = Field(ge=1, le=65535)
    bundle: Hash
    socket: Path
    proxy: str | None = None
    max_message_bytes: int = Field(default=2**30, ge=2**20)


@dataclass(frozen=True)
class RelayFolder:
    """The relay's folder."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "relay.toml"

    @property
    def key(self) -> Path:
        """TLS key, mode 0600."""
        return self.root / "relay.key"

    @property
    def certificate(self) -> Path:
        """Client certificate; absent until the coordinator has admitted the site."""
        return self.root / "relay.crt"

    @property
    def authority(self) -> Path:
        """Certificate of the coordinator's authority."""
        return self.root / "ca.crt"

    @property
    def node_key(self) -> Path:
        """Key by which the SuperNode authenticates, mode 0600."""
        return self.root / "node.key"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of the SuperNode."""
        return self.root / "flower"

    @property
    def log(self) -> Path:
        return self.root / "relay.log"

    def config(self) -> RelayConfig:
        """Raises `LayoutError` where relay.toml is absent or wrong."""
        path = self.config_file
        try:
            return RelayConfig.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise LayoutError(
                f"cannot read {path} ({error.strerror})", cure="make the site with `site init`"
            ) from None
        except ValidationError as error:
            raise LayoutError(f"{path}: {explain(error)}") from None
        except ValueError as error:
            raise LayoutError(f"{path} is not valid TOML: {error}") from None

    def configure(self, config: RelayConfig) -> None:
        """Replaces relay.toml in one step."""
        fields = config.model_dump(mode="json", exclude_none=True)
        install(self.config_file, tomli_w.dumps(fields), like=self.root)


@dataclass(frozen=True)
class SiteFolder:
    """All of a site."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "site.toml"

    @property
    def policy_file(self) -> Path:
        return self.root / "policy.toml"

    @property
    def request(self) -> Path:
        return self.root / "request.json"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def socket(self) -> Path:
        return self.root / "run" / "daemon.sock"

    @property
    def relay(self) -> RelayFolder:
        return RelayFolder(self.root / "relay")


def pem(path: Path) -> str:
    """A key or certificate; what is no text is read as an invalid one."""
    return path.read_text(errors="replace")


def install(path: Path, text: str, *, like: Path) -> None:
    """Replaces a file in one step; it keeps its mode, a new one has 0600, and it then belongs to
    the owner of `like`.

    Root writes into folders of daemon and relay, whose users may lay links there: none is followed.
    """
    with atomic_file(path) as file:
        file.write(text.encode())
        if path.exists() and not path.is_symlink():
            os.fchmod(file.fileno(), stat.S_IMODE(path.lstat().st_mode) & 0o666)
        if os.geteuid() == 0:
            there = like.lstat()
            os.fchown(file.fileno(), there.st_uid, there.st_gid)

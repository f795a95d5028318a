"""Where a coordinator's files lie.

```
coordinator.toml          name, host names, ports
ca.key ca.crt ca.crl      the federation's certificate authority and what it has revoked
server.key server.crt     TLS of the public port and of the SuperLink behind it
coordinator.key           Ed25519: signs invites, admissions, studies and every request
coordinator.receipts.json heads of the hospitals' ledgers, as they signed them
sites.json roster.json    who is enrolled; the roster that the hospitals sign
superexec.secret          admits the process that runs the ServerApp
superlink.sqlite          the SuperLink's state
nginx/ flower/ logs/      generated; may be removed while nothing runs
runs/RUN/                 study, checkpoint and results of each run
```
"""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedwardError, explain
from common.files import write_atomically
from common.identity import Identity
from common.roster import FederationName
from deploy.enrolment import Host


class CoordinatorError(FedwardError):
    """A coordinator's folder, or a command on it, that cannot be used as given."""

    code = "coordinator-invalid"


class Config(BaseModel):
    """`coordinator.toml`.

    Attributes:
        name: Of the federation.
        hosts: Public names or addresses; invites carry the first, the certificate all.
        port: Public TLS port.
        listen: Address on which the front takes connections.
        superlink_port: Of the SuperLink, on the loopback interface only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FederationName
    hosts: tuple[Host, ...] = Field(min_length=1)
    port: int = Field(default=8443, ge=1, le=65535)
    listen: Host = "0.0.0.0"
    superlink_port: int = Field(default=9443, ge=1, le=65535)

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, origin: str = "configuration") -> Config:
        """Raises `CoordinatorError` with every mistake by its key."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise CoordinatorError(f"{origin}: {explain(error)}") from None

    @property
    def names(self) -> list[str]:
        """What the server's certificate answers to; the SuperLink is asked by its loopback name."""
        return list(dict.fromkeys([*self.hosts, "localhost", "127.0.0.1"]))


@dataclass(frozen=True)
class CoordinatorFolder:
    """The coordinator's folder; an absolute path."""

    root: Path

    @classmethod
    def at(cls, path: Path) -> CoordinatorFolder:
        """Raises `CoordinatorError` where `path` is no coordinator's folder."""
        folder = cls(path.expanduser().absolute())
        if not folder.config_file.is_file():
            raise CoordinatorError(
                f"{path} is no coordinator's folder (no coordinator.toml)",
                cure="make one with `fedward coordinator init`, or name it with --folder",
            )
        return folder

    @property
    def config_file(self) -> Path:
        return self.root / "coordinator.toml"

    @property
    def authority(self) -> Path:
        return self.root / "ca.crt"

    @property
    def revocations(self) -> Path:
        return self.root / "ca.crl"

    @property
    def server_key(self) -> Path:
        return self.root / "server.key"

    @property
    def server_certificate(self) -> Path:
        return self.root / "server.crt"

    @property
    def key(self) -> Path:
        return self.root / "coordinator.key"

    @property
    def superexec_secret(self) -> Path:
        return self.root / "superexec.secret"

    @property
    def database(self) -> Path:
        return self.root / "superlink.sqlite"

    @property
    def sites(self) -> Path:
        return self.root / "sites.json"

    @property
    def roster(self) -> Path:
        return self.root / "roster.json"

    @property
    def nginx(self) -> Path:
        """Prefix of the front: `nginx.conf`, and while it runs its pid and temporary files."""
        return self.root / "nginx"

    @property
    def flower(self) -> Path:
        """FLWR_HOME."""
        return self.root / "flower"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def kept(self) -> list[str]:
        """Names of the files without which `serve` does not start from a backup."""
        keys = [self.authority.with_suffix(".key"), self.authority, self.key, self.config_file]
        kept = [self.sites, self.server_key, self.server_certificate, self.superexec_secret]
        return [path.name for path in (*keys, *kept)]

    def config(self) -> Config:
        """Raises `CoordinatorError` where coordinator.toml is wrong."""
        path = self.config_file
        try:
            fields = tomllib.loads(path.read_text())
        except OSError as error:
            raise CoordinatorError(f"cannot read {path} ({error.strerror})") from None
        except ValueError as error:
            raise CoordinatorError(f"{path} is not valid TOML: {error}") from None
        return Config.of(fields, origin=str(path))

    def configure(self, config: Config) -> None:
        write_atomically(self.config_file, tomli_w.dumps(config.model_dump(mode="json")))

    def identity(self) -> Identity:
        """The coordinator's key, which is never made anew here: another one has no partners."""
        if not self.key.is_file():
            raise CoordinatorError(f"{self.key} is missing", cure="restore it from the backup")
        return Identity.open(self.key)

    # -- who holds what ----------------------------------------------------------------------

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Held by `serve` as long as it lives; the system lets go of it however that ends.

        Raises:
            CoordinatorError: Another one holds it.
        """
        with (self.root / "serve.pid").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CoordinatorError(
                    f"{self.root} is being served already, by process {file.read().strip()}"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
            file.truncate(0)

    @property
    def served(self) -> bool:
        """Whether `serve` runs on this folder now."""
        try:
            with (self.root / "serve.pid").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One command at a time changes who is enrolled."""
        with (self.root / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

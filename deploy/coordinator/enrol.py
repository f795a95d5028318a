"""Who is enrolled: making a federation, inviting, admitting, renewing and revoking sites.

`sites.json` holds only what cannot be derived: the open invites, each site's request and the
certificates that it was given, and the serials that were revoked. Revocation list, front and
SuperLink follow from it (`Register.publish`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from common.errors import explain
from common.files import write_atomically
from common.identity import Identity
from common.roster import Roster
from common.study import Name, unknown
from deploy import pki
from deploy.coordinator import front
from deploy.coordinator.layout import Config, CoordinatorError, CoordinatorFolder
from deploy.enrolment import Admission, EnrolmentError, EnrolmentRequest, Invite, Nonce
from simulations import bundle


class Open(BaseModel):
    """An invite that nobody has answered yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nonce: Nonce
    expires: AwareDatetime


class Enrolled(BaseModel):
    """A site.

    Attributes:
        certificates: For the key of the request, PEM; the last one is the newest, earlier ones are
            good until they expire.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    request: EnrolmentRequest
    certificates: tuple[str, ...]

    @property
    def facts(self) -> pki.Facts:
        """Of the newest certificate."""
        return pki.Facts.of(self.certificates[-1])

    @property
    def serials(self) -> list[str]:
        return [pki.Facts.of(certificate).serial for certificate in self.certificates]


class Register(BaseModel):
    """`sites.json`.

    Attributes:
        revoked: Serials.
        given_up: Node keys that were a site's, as in `front.Entry`: Flower never takes one again.
    """

    model_config = ConfigDict(extra="forbid")
    invites: dict[Name, Open] = {}
    sites: dict[Name, Enrolled] = {}
    revoked: set[str] = set()
    given_up: set[str] = set()

    @classmethod
    def read(cls, folder: CoordinatorFolder) -> Register:
        """Raises `CoordinatorError` where sites.json cannot be read."""
        try:
            return cls.model_validate_json(folder.sites.read_text())
        except OSError as error:
            raise CoordinatorError(
                f"cannot read {folder.sites} ({error.strerror})", cure="restore it from the backup"
            ) from None
        except ValidationError as error:
            raise CoordinatorError(
                f"{folder.sites}: {explain(error)}", cure="restore it from the backup"
            ) from None

    def site(self, name: str) -> Enrolled:
        """Raises `StudyError` for a site that is not enrolled."""
        if name not in self.sites:
            raise unknown("site", name, self.sites, cure="`invite` it, and `enrol` its request")
        return self.sites[name]

    def drop(self, name: str) -> None:
        """Ends the site's certificates and its node key for good."""
        site = self.sites.pop(name)
        self.revoked |= set(site.serials)
        self.given_up.add(front.node_header(site.request.node_key))

    def node_keys(self) -> dict[str, bytes]:
        """Of each enrolled site's SuperNode, PEM."""
        return {name: front.node_public(s.request.node_key) for name, s in self.sites.items()}

    def publish(self, folder: CoordinatorFolder) -> None:
        """Writes what follows from the register: revocation list and front."""
        crl = pki.Authority.open(folder.root).revocations(self.revoked)
        write_atomically(folder.revocations, crl)
        front.write(
            folder,
            [
                front.Entry(serial, name, front.node_header(site.request.node_key))
                for name, site in self.sites.items()
                for serial in site.serials
            ],
        )


@contextmanager
def changed(folder: CoordinatorFolder) -> Iterator[Register]:
    """The register for a change: published and saved when the block ends without an error.

    In this order, so that what is cut short can be given again: a certificate that was published
    and not saved is nobody's, but a site that the register has forgotten could not be revoked.
    """
    with folder.changing():
        register = Register.read(folder)
        yield register
        register.publish(folder)
        write_atomically(folder.sites, register.model_dump_json(indent=1))


# -- the federation ------------------------------------------------------------------------------


def init(root: Path, config: Config) -> CoordinatorFolder:
    """Makes a coordinator's folder: authority, server certificate, keys, secret.

    Raises:
        CoordinatorError: There is something at `root` already.
    """
    folder = CoordinatorFolder(root.expanduser().absolute())
    if folder.root.exists() and (not folder.root.is_dir() or any(folder.root.iterdir())):
        raise CoordinatorError(
            f"{root} exists already and is not empty",
            cure="choose a new folder; keys and certificates are renewed with `renew`",
        )
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.root.chmod(0o700)
    for part in (folder.logs, folder.runs, folder.flower):
        part.mkdir(mode=0o700)
    authority = pki.Authority.create(folder.root, f"{config.name} authority")
    _certify_server(folder, authority, config, new_key=True)
    Identity.open(folder.key)
    pki.write_secret(folder.superexec_secret, secrets.token_hex(32))
    register = Register()
    write_atomically(folder.sites, register.model_dump_json(indent=1))
    folder.configure(config)
    register.publish(folder)
    return folder


def renew_server(
    folder: CoordinatorFolder, *, hosts: Sequence[str] = (), new_key: bool = False
) -> pki.Facts:
    """A new server certificate, for other host names where given.

    The front takes it when it reloads; the SuperLink, which only this machine asks, when it next
    starts.

    Args:
        new_key: Makes a new private key too.
    """
    with folder.changing():
        config = folder.config()
        if hosts:
            config = Config.of({**config.model_dump(), "hosts": tuple(hosts)})
        authority = pki.Authority.open(folder.root)
        fresh = new_key or not folder.server_key.exists()
        _certify_server(folder, authority, config, new_key=fresh)
        if hosts:
            folder.configure(config)
    return pki.Facts.of(folder.server_certificate.read_text())


def _certify_server(
    folder: CoordinatorFolder, authority: pki.Authority, config: Config, *, new_key: bool
) -> None:
    key = pki.new_key() if new_key else folder.server_key.read_text()
    certificate = authority.issue_server(key, config.names)
    # Nothing is given up before there is something in its place.
    write_atomically(folder.server_key, key)
    write_atomically(folder.server_certificate, certificate)


# -- sites ---------------------------------------------------------------------------------------


def invite(folder: CoordinatorFolder, site: str, out: Path, *, days: int = 14) -> Invite:
    """Writes an invite for a site; an earlier one for it is void.

    Raises:
        CoordinatorError: `site` is no name for one.
    """
    config, identity = folder.config(), folder.identity()
    try:
        TypeAdapter(Name).validate_python(site)
    except ValidationError:
        raise CoordinatorError(
            f"'{site}' is no name for a site", cure="use letters, digits, dots, hyphens"
        ) from None
    made = Invite(
        site=site,
        host=config.hosts[0],
        port=config.port,
        authority=folder.authority.read_text(),
        coordinator=identity.public,
        version=version("fedward"),
        bundle=bundle.sha256(),
        nonce=secrets.token_hex(16),
        expires=datetime.now(UTC) + timedelta(days=days),
    )
    with changed(folder) as register:
        register.invites[site] = Open(nonce=made.nonce, expires=made.expires)
        made.write(out, identity)
    return made


def examine(register: Register, request: EnrolmentRequest) -> None:
    """Whether a request may be admitted; one that was admitted already may.

    Raises:
        EnrolmentError: Its invite is void, it shares a key with another site, or its node key is
            one that was given up.
        CoordinatorError: Its node key is none.
    """
    name = request.site
    there = register.sites.get(name)
    if there is not None and there.request == request:
        return
    again = f"send a new invite: `fedward coordinator invite {name}`"
    opened = register.invites.get(name)
    if opened is None:
        raise EnrolmentError(f"no invite for site '{name}' is open", cure=again)
    if not secrets.compare_digest(opened.nonce, request.nonce):
        raise EnrolmentError(
            f"the request of site '{name}' answers another invite than the latest", cure=again
        )
    if opened.expires < datetime.now(UTC):
        raise EnrolmentError(
            f"the invite of site '{name}' expired on {opened.expires:%Y-%m-%d}", cure=again
        )
    key = front.node_public(request.node_key)
    if front.node_header(request.node_key) in register.given_up:
        raise EnrolmentError(
            f"the node key of site '{name}' was in use once and given up; Flower takes none twice",
            cure=f"the hospital makes new keys, in a new folder; {again}",
        )
    for other, site in register.sites.items():
        if other == name:
            continue
        if site.request.identity == request.identity:
            raise EnrolmentError(f"site '{name}' has the identity key of site '{other}'")
        if front.node_public(site.request.node_key) == key:
            raise EnrolmentError(f"site '{name}' has the node key of site '{other}'")


def enrol(folder: CoordinatorFolder, request: EnrolmentRequest, out: Path) -> Enrolled:
    """Admits a site and writes its admission; the same request again gives the same one.

    A site that was enrolled with other keys keeps its name and loses its old certificates.

    Raises:
        FedwardError: As `examine`, or its signing request is unsound; nothing was changed.
    """
    name = request.site
    with changed(folder) as register:
        examine(register, request)
        there = register.sites.get(name)
        if there is None or there.request != request:
            authority = pki.Authority.open(folder.root)
            certificate = authority.issue_site(request.signing_request, name)
            if there is not None:
                register.drop(name)
                register.given_up.discard(front.node_header(request.node_key))  # it kept its own
            register.sites[name] = Enrolled(request=request, certificates=(certificate,))
            del register.invites[name]
        enrolled = register.sites[name]
    _admit(folder, enrolled, out)
    return enrolled


def renew_site(folder: CoordinatorFolder, name: str, out: Path) -> Enrolled:
    """A new certificate for the key that the site has, and an admission that carries it."""
    with changed(folder) as register:
        site = register.site(name)
        certificate = pki.Authority.open(folder.root).issue_site(site.request.signing_request, name)
        now = datetime.now(UTC)
        good = [c for c in site.certificates if pki.Facts.of(c).not_after > now]
        enrolled = Enrolled(request=site.request, certificates=(*good, certificate))
        register.sites[name] = enrolled
    _admit(folder, enrolled, out)
    return enrolled


def revoke(folder: CoordinatorFolder, name: str) -> None:
    """Ends a site's admission: its certificates, its node key, and its open invite."""
    with changed(folder) as register:
        if name in register.sites:
            register.drop(name)
        elif name not in register.invites:
            register.site(name)
        register.invites.pop(name, None)


def roster(folder: CoordinatorFolder, signed: Sequence[Path] = ()) -> Roster:
    """Writes `roster.json` of the enrolled sites, with every valid signature that is known.

    Args:
        signed: Rosters that hospitals have signed and sent back.

    Raises:
        RosterError: One of them is of other sites, or is none.
    """
    with folder.changing():
        sites = {n: s.request.identity for n, s in sorted(Register.read(folder).sites.items())}
        if not sites:
            raise CoordinatorError("no site is enrolled", cure="`invite` and `enrol` some first")
        made = Roster(name=folder.config().name, sites=sites)
        if folder.roster.exists() and (before := Roster.load(folder.roster)).digest == made.digest:
            made = before
        for path in signed:
            made = made.merged(Roster.load(path))
        made.write(folder.roster)
        os.chmod(folder.roster, 0o600)
    return made


def _admit(folder: CoordinatorFolder, enrolled: Enrolled, out: Path) -> None:
    identity = folder.identity()
    Admission(
        site=enrolled.request.site,
        request=enrolled.request.digest,
        certificate=enrolled.certificates[-1],
        coordinator=identity.public,
    ).write(out, identity)

"""Certificates of a federation: the coordinator's own authority, its server, its sites.

TLS keys are P-384. The authority signs one server certificate and one client certificate per site;
nobody else's is accepted, and no public authority is trusted. A site's private key is made at the
site and never travels: what travels is its signing request.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeGuard

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import FedwardError

_BACKDATED = timedelta(hours=1)  # admits clocks that are a little behind
_ENCODING = serialization.Encoding.PEM


class CertificateError(FedwardError):
    """A key, certificate or signing request that cannot be used."""

    code = "certificate-invalid"


@dataclass(frozen=True)
class Facts:
    """What a certificate says.

    Attributes:
        serial: Hex digits, upper case, as nginx and openssl write them.
        names: DNS names and addresses of a server, or the site's name.
        fingerprint: SHA-256 of the certificate, hex.
    """

    serial: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    fingerprint: str

    @classmethod
    def of(cls, pem: str) -> Facts:
        """Raises `CertificateError` where `pem` is no certificate."""
        certificate = _certificate(pem)
        try:
            alternative = certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            ).value
            names = tuple(str(name.value) for name in alternative)
        except x509.ExtensionNotFound:
            names = (_common_name(certificate.subject),)
        return cls(
            serial=_hex(certificate.serial_number),
            names=names,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        )


class Authority:
    """The certificate authority of one coordinator: `ca.key` (mode 0600) and `ca.crt`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self._certificate = key, certificate

    @classmethod
    def create(cls, folder: Path, name: str, *, days: int = 3650) -> Authority:
        """Makes a new one.

        Raises:
            CertificateError: There is one in `folder` already.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        subject = _subject(name)
        certificate = (
            _builder(subject, subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA384())
        )
        write_secret(folder / "ca.key", _private_pem(key))
        (folder / "ca.crt").write_text(_pem(certificate))
        return cls(key, certificate)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Raises `CertificateError` where `folder` holds none, or halves of two."""
        try:
            key = private_key((folder / "ca.key").read_text())
            certificate = _certificate((folder / "ca.crt").read_text())
        except OSError as error:
            raise CertificateError(
                f"{folder} holds no certificate authority ({error.strerror})",
                cure="restore ca.key and ca.crt from the backup",
            ) from None
        if certificate.public_key() != key.public_key():
            raise CertificateError(
                f"ca.key and ca.crt in {folder} do not belong together",
                cure="restore both from the same backup",
            )
        return cls(key, certificate)

    @property
    def pem(self) -> str:
        """The authority's certificate."""
        return _pem(self._certificate)

    def issue_server(self, key_pem: str, names: Sequence[str], *, days: int = 397) -> str:
        """A certificate for a server that answers to `names` (DNS names or IP addresses)."""
        alternative = x509.SubjectAlternativeName([_general_name(name) for name in names])
        return self._issue(
            private_key(key_pem).public_key(),
            names[0],
            ExtendedKeyUsageOID.SERVER_AUTH,
            days,
            alternative,
        )

    def issue_site(self, request_pem: str, site: str, *, days: int = 397) -> str:
        """A client certificate for the key of a signing request. What the request calls itself is
        ignored: the certificate's common name is `site`.

        Raises:
            CertificateError: No signing request, not signed by its own key, or not on P-384.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem.encode())
            public = request.public_key()
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise CertificateError("the enrolment request holds no signing request") from None
        if not request.is_signature_valid:
            raise CertificateError("the signing request is not signed by its own key")
        if not _is_p384(public):
            raise CertificateError("the signing request's key is not on the curve P-384")
        return self._issue(public, site, ExtendedKeyUsageOID.CLIENT_AUTH, days, None)

    def revocations(self, serials: Iterable[str], *, days: int = 3650) -> str:
        """The list of revoked certificates, PEM."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + timedelta(days=days))
        )
        for serial in sorted(serials):
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(int(serial, 16))
                .revocation_date(now - _BACKDATED)
                .build()
            )
        return builder.sign(self._key, hashes.SHA384()).public_bytes(_ENCODING).decode()

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey,
        name: str,
        purpose: x509.ObjectIdentifier,
        days: int,
        alternative: x509.SubjectAlternativeName | None,
    ) -> str:
        issuer = self._key.public_key()
        builder = (
            _builder(_subject(name), self._certificate.subject, public, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), False)
        )
        if alternative is not None:
            builder = builder.add_extension(alternative, critical=False)
        return _pem(builder.sign(self._key, hashes.SHA384()))


def new_key() -> str:
    """A fresh P-384 private key, PEM."""
    return _private_pem(ec.generate_private_key(ec.SECP384R1()))


def private_key(pem: str) -> ec.EllipticCurvePrivateKey:
    """Raises `CertificateError` where `pem` is no P-384 key."""
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError):
        raise CertificateError(
            "a private key does not parse", cure="restore it from the backup"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p384(key.public_key()):
        raise CertificateError("a private key is not on the curve P-384")
    return key


def openssh_public(pem: str) -> str:
    """Public half of a private key in OpenSSH's form, which `flwr supernode register` reads."""
    public = private_key(pem).public_key()
    return public.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def signing_request(key_pem: str, site: str) -> str:
    """What a site sends to have its key certified, PEM."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(site))
    return builder.sign(private_key(key_pem), hashes.SHA384()).public_bytes(_ENCODING).decode()


def self_signed(key_pem: str, names: Sequence[str], *, days: int = 30) -> str:
    """A server certificate that vouches for itself: for a listener on this machine."""
    key = private_key(key_pem)
    subject = _subject(names[0])
    alternative = x509.SubjectAlternativeName([_general_name(name) for name in names])
    builder = _builder(subject, subject, key.public_key(), days)
    return _pem(builder.add_extension(alternative, critical=False).sign(key, hashes.SHA384()))


def belongs(certificate_pem: str, key_pem: str) -> bool:
    """Whether the certificate is for this private key."""
    return _certificate(certificate_pem).public_key() == private_key(key_pem).public_key()


def issued_by(certificate_pem: str, authority_pem: str) -> bool:
    """Whether the authority signed the certificate; says nothing about dates or revocation."""
    try:
        _certificate(certificate_pem).verify_directly_issued_by(_certificate(authority_pem))
    except Exception:  # the library raises ValueError, TypeError or InvalidSignature
        return False
    return True


def write_secret(path: Path, text: str) -> None:
    """A new file that only its owner may read, durable.

    Raises:
        CertificateError: It exists already: keys are never overwritten.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CertificateError(
            f"{path} exists already", cure="choose another folder, or move the old one away"
        ) from None
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_p384(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    """Not merely 384 bits: there are other curves of that size."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def _subject(name: str) -> x509.Name:
    """The name as common name, for people to read: X.509 holds 64 bytes of it, the rest is cut."""
    cut = name.encode()[:64].decode(errors="ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cut)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise CertificateError(
            "a certificate does not parse", cure="ask the coordinator for it again"
        ) from None


def _common_name(subject: x509.Name) -> str:
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _hex(serial: int) -> str:
    digits = f"{serial:X}"
    return digits if len(digits) % 2 == 0 else f"0{digits}"


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(_ENCODING).decode()


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        _ENCODING, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()

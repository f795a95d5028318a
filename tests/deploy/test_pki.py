"""The certificate authority, judged by openssl as well as by itself."""

from __future__ import annotations

import subprocess
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from deploy import pki
from deploy.pki import Authority, CertificateError, Facts


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path, "ward authority")


def openssl(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(["openssl", *(str(a) for a in arguments)], capture_output=True, text=True)
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done.stdout + done.stderr


def signing_request(key: object, name: str = "a") -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = builder.sign(key, hashes.SHA384())  # type: ignore[arg-type]
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def test_openssl_accepts_each_certificate_for_its_purpose_only(
    authority: Authority, tmp_path: Path
) -> None:
    key = pki.new_key()
    server = tmp_path / "server.crt"
    site = tmp_path / "site.crt"
    server.write_text(authority.issue_server(key, ["coordinator.example", "127.0.0.1"]))
    site.write_text(authority.issue_site(pki.signing_request(key, "a"), "a"))
    verify = ["verify", "-x509_strict", "-CAfile", tmp_path / "ca.crt", "-purpose"]
    openssl(*verify, "sslserver", server)
    openssl(*verify, "sslclient", site)
    openssl(*verify, "sslclient", server, code=2)
    openssl(*verify, "sslserver", site, code=2)
    openssl(*verify, "sslserver", "-verify_hostname", "coordinator.example", server)
    openssl(*verify, "sslserver", "-verify_ip", "127.0.0.1", server)
    openssl(*verify, "sslserver", "-verify_hostname", "other.example", server, code=2)


def test_a_site_cannot_certify_others(authority: Authority, tmp_path: Path) -> None:
    """Its certificate is no authority's: what its key signs leads nowhere."""
    key = pki.new_key()
    site = authority.issue_site(pki.signing_request(key, "a"), "a")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "ca.key").write_text(key)
    (tmp_path / "fake" / "ca.crt").write_text(site)
    forged = Authority.open(tmp_path / "fake").issue_site(pki.signing_request(key, "b"), "b")
    (tmp_path / "forged.crt").write_text(forged)
    verify = ["verify", "-CAfile", tmp_path / "ca.crt", "-untrusted", tmp_path / "fake" / "ca.crt"]
    assert "invalid CA" in openssl(*verify, tmp_path / "forged.crt", code=2)
    assert not pki.issued_by(forged, authority.pem)


def test_the_requests_own_name_counts_for_nothing(authority: Authority) -> None:
    certificate = authority.issue_site(pki.signing_request(pki.new_key(), "b"), "a")
    assert Facts.of(certificate).names == ("a",)


def test_serials_are_as_openssl_writes_them(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "site.crt"
    seen = set()
    for _ in range(20):  # some serials begin with a zero digit
        path.write_text(authority.issue_site(pki.signing_request(pki.new_key(), "a"), "a"))
        facts = Facts.of(path.read_text())
        said = openssl("x509", "-in", path, "-noout", "-serial", "-fingerprint", "-sha256")
        assert f"serial={facts.serial}\n" in said
        assert facts.fingerprint.upper() in said.replace(":", "")
        seen.add(facts.serial)
    assert len(seen) == 20
    assert pki._hex(0xABC) == "0ABC"


def test_a_clock_that_is_behind_is_forgiven_and_dates_are_kept(authority: Authority) -> None:
    facts = Facts.of(authority.issue_site(pki.signing_request(pki.new_key(), "a"), "a", days=2))
    now = datetime.now(UTC)
    assert now - timedelta(hours=2) < facts.not_before < now - timedelta(minutes=50)
    assert abs(facts.not_after - now - timedelta(days=2)) < timedelta(minutes=1)


def test_revoked_is_revoked(authority: Authority, tmp_path: Path) -> None:
    good, bad = (
        authority.issue_site(pki.signing_request(pki.new_key(), name), name) for name in "ab"
    )
    (tmp_path / "good.crt").write_text(good)
    (tmp_path / "bad.crt").write_text(bad)
    (tmp_path / "ca.crl").write_text(authority.revocations([Facts.of(bad).serial]))
    verify = ["verify", "-CAfile", tmp_path / "ca.crt", "-CRLfile", tmp_path / "ca.crl"]
    openssl(*verify, "-crl_check", tmp_path / "good.crt")
    assert "revoked" in openssl(*verify, "-crl_check", tmp_path / "bad.crt", code=2)
    (tmp_path / "ca.crl").write_text(authority.revocations([]))
    openssl(*verify, "-crl_check", tmp_path / "bad.crt")


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.BrainpoolP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-521", "brainpool", "RSA"],
)
def test_other_curves_are_refused(authority: Authority, key: object) -> None:
    with pytest.raises(CertificateError, match="P-384"):
        authority.issue_site(signing_request(key), "a")
    pem = key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    with pytest.raises(CertificateError, match="P-384"):
        pki.private_key(pem)


def test_a_tampered_signing_request_is_refused(authority: Authority) -> None:
    """The subject changed after signing: a request for somebody else's key."""
    sound = signing_request(ec.generate_private_key(ec.SECP384R1()), name="aaaa")
    der = x509.load_pem_x509_csr(sound.encode()).public_bytes(serialization.Encoding.DER)
    changed = der.replace(b"aaaa", b"aaab")
    assert changed != der
    pem = x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(CertificateError, match="not signed by its own key"):
        authority.issue_site(pem, "a")
    for text in ("", "nonsense", sound[:200], pki.new_key()):
        with pytest.raises(CertificateError, match="holds no signing request"):
            authority.issue_site(text, "a")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("06072a8648ce3d0201", "06072a8648ce3d027f"),  # a key of no known kind
        ("06052b81040022", "06052b8104007f"),  # on no known curve
        ("06052b81040022", "06052b81040023"),  # on a curve that it does not lie on
        ("020100", "020109"),  # of no known version
    ],
)
def test_a_signing_request_that_the_library_does_not_know_is_refused(
    authority: Authority, old: str, new: str
) -> None:
    sound = x509.load_pem_x509_csr(pki.signing_request(pki.new_key(), "a").encode())
    der = sound.public_bytes(serialization.Encoding.DER)
    changed = der.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    assert changed != der
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{b64encode(changed).decode()}\n"
    with pytest.raises(CertificateError, match="holds no signing request"):
        authority.issue_site(f"{pem}-----END CERTIFICATE REQUEST-----\n", "a")


@pytest.mark.parametrize("name", ["x" * 65, "é" * 40])
def test_a_long_name_is_cut_where_x509_ends_and_whole_where_it_counts(
    name: str, tmp_path: Path
) -> None:
    authority = Authority.create(tmp_path, name)
    host = "a" * 40 + "." + "b" * 40 + ".example"
    server = authority.issue_server(pki.new_key(), [host])
    assert pki.issued_by(server, authority.pem)
    assert Facts.of(server).names == (host,)
    assert Facts.of(authority.pem).names == (name.encode()[:64].decode(),)


def test_belonging_and_descent(authority: Authority, tmp_path: Path) -> None:
    key, other = pki.new_key(), pki.new_key()
    certificate = authority.issue_site(pki.signing_request(key, "a"), "a")
    assert pki.belongs(certificate, key)
    assert not pki.belongs(certificate, other)
    assert pki.issued_by(certificate, authority.pem)
    (tmp_path / "other").mkdir()
    namesake = Authority.create(tmp_path / "other", "ward authority")
    assert not pki.issued_by(certificate, namesake.pem)
    assert not pki.issued_by(pki.self_signed(key, ["localhost"]), authority.pem)


def test_an_authority_is_made_once_and_found_again(authority: Authority, tmp_path: Path) -> None:
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(CertificateError, match="exists already"):
        Authority.create(tmp_path, "another")
    again = Authority.open(tmp_path)
    assert again.pem == authority.pem
    assert pki.issued_by(again.issue_server(pki.new_key(), ["x"]), authority.pem)
    with pytest.raises(CertificateError, match="no certificate authority"):
        Authority.open(tmp_path / "nowhere")
    (tmp_path / "ca.key").write_text("torn")
    with pytest.raises(CertificateError, match="does not parse"):
        Authority.open(tmp_path)


def test_a_folder_whose_key_and_certificate_do_not_belong_together(
    authority: Authority, tmp_path: Path
) -> None:
    """Restored from two backups: what it issued would be trusted by nobody."""
    (tmp_path / "ca.key").write_text(pki.new_key())
    with pytest.raises(CertificateError, match="do not belong together"):
        Authority.open(tmp_path)


def test_openssh_form_is_what_openssh_reads(tmp_path: Path) -> None:
    text = pki.openssh_public(pki.new_key())
    key = serialization.load_ssh_public_key(text.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert text.startswith("ecdsa-sha2-nistp384 ")

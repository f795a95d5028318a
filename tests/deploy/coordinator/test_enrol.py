"""Who gets in, and how they get out again."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import FedwardError, StudyError
from common.roster import Roster, RosterError
from deploy import pki
from deploy.coordinator import enrol, front
from deploy.coordinator.cli import app
from deploy.coordinator.enrol import Register
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.superlink import SuperLink
from deploy.enrolment import Admission, EnrolmentError, EnrolmentRequest, Invite, fingerprint
from deploy.pki import CertificateError, Facts
from simulations import bundle
from tests.deploy.coordinator.ward import Joining

SECRET = ("ca.key", "server.key", "coordinator.key", "superexec.secret", "sites.json")


def admitted(folder: CoordinatorFolder) -> dict[str, set[str]]:
    """Serials that the front admits, by site."""
    text = (folder.nginx / "nginx.conf").read_text()
    block = text.partition("$fedward_site {")[2].partition("}")[0]
    found: dict[str, set[str]] = {}
    for serial, site in re.findall(r'"([0-9A-F]+)" "([^"]+)";', block):
        found.setdefault(site, set()).add(serial)
    return found


# -- init ----------------------------------------------------------------------------------------


def test_a_new_folder_is_private_and_whole(folder: CoordinatorFolder) -> None:
    assert folder.root.stat().st_mode & 0o777 == 0o700
    for name in SECRET:
        assert (folder.root / name).stat().st_mode & 0o077 == 0, name
    server = folder.server_certificate.read_text()
    assert pki.belongs(server, folder.server_key.read_text())
    assert pki.issued_by(server, folder.authority.read_text())
    names = " ".join(Facts.of(server).names)
    assert all(name in names for name in ("coordinator.example", "localhost", "127.0.0.1"))
    assert len(folder.superexec_secret.read_text()) == 64
    assert Register.read(folder) == Register()
    assert admitted(folder) == {}


def test_a_folder_is_never_made_over(folder: CoordinatorFolder, tmp_path: Path) -> None:
    before = folder.key.read_bytes()
    for there in (folder.root, folder.root / "ca.crt"):
        with pytest.raises(CoordinatorError, match="exists already"):
            enrol.init(there, folder.config())
    assert folder.key.read_bytes() == before
    with pytest.raises(CoordinatorError, match="no coordinator's folder"):
        CoordinatorFolder.at(tmp_path)


def test_a_lost_key_is_not_made_anew(folder: CoordinatorFolder, tmp_path: Path) -> None:
    folder.key.unlink()
    with pytest.raises(CoordinatorError, match="is missing"):
        enrol.invite(folder, "a", tmp_path / "invite.json")
    assert not folder.key.exists()


@pytest.mark.parametrize("text", ["name =", 'name = "x"', 'name = "x"\nhosts = ["h"]\nextra = 1'])
def test_a_wrong_configuration_is_told(folder: CoordinatorFolder, text: str) -> None:
    folder.config_file.write_text(text)
    with pytest.raises(CoordinatorError, match=r"coordinator\.toml"):
        folder.config()


# -- invite and enrol ----------------------------------------------------------------------------


def test_an_invite_carries_what_a_site_must_know(folder: CoordinatorFolder, tmp_path: Path) -> None:
    enrol.invite(folder, "a", tmp_path / "invite.json", days=3)
    invite = Invite.read(tmp_path / "invite.json", signer=folder.identity().public)
    assert (invite.site, invite.host) == ("a", "coordinator.example")
    assert invite.port == folder.config().port
    assert invite.bundle == bundle.sha256()
    assert invite.authority == folder.authority.read_text()
    assert timedelta(days=2, hours=23) < invite.expires - datetime.now(UTC) < timedelta(days=3)


def test_a_site_is_admitted(folder: CoordinatorFolder, hospital: Joining) -> None:
    site = hospital("a").admitted(folder)
    admission = Admission.read(site.folder / "admission.json", signer=folder.identity().public)
    assert pki.belongs(admission.certificate, site.tls)
    assert pki.issued_by(admission.certificate, folder.authority.read_text())
    assert Facts.of(admission.certificate).names == ("a",)
    assert admission.request == EnrolmentRequest.read(site.folder / "request.json").digest
    assert admitted(folder) == {"a": {Facts.of(admission.certificate).serial}}
    assert site.node_header in (folder.nginx / "nginx.conf").read_text()


def test_the_same_request_again_gives_the_same_admission(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    site = hospital("a").admitted(folder)
    request = EnrolmentRequest.read(site.folder / "request.json")
    before = folder.sites.read_text()
    enrol.enrol(folder, request, tmp_path / "again.json")
    again = Admission.read(tmp_path / "again.json")
    assert again == Admission.read(site.folder / "admission.json")
    assert folder.sites.read_text() == before


def test_an_invite_is_good_for_one_request(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    """A second one with the same nonce, as from somebody who read the mail, is refused."""
    site, thief = hospital("a"), hospital("thief")
    invite = enrol.invite(folder, "a", tmp_path / "invite.json")
    enrol.enrol(folder, site.request(invite), tmp_path / "out.json")
    with pytest.raises(EnrolmentError, match="no invite for site 'a' is open"):
        enrol.enrol(folder, thief.request(invite), tmp_path / "thief.json")
    assert not (tmp_path / "thief.json").exists()


def test_only_the_latest_invite_counts(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    first = enrol.invite(folder, "a", tmp_path / "1.json")
    second = enrol.invite(folder, "a", tmp_path / "2.json")
    other = enrol.invite(folder, "b", tmp_path / "3.json")
    site = hospital("a")
    for invite in (first, other.model_copy(update={"site": "a"})):
        with pytest.raises(EnrolmentError, match="another invite than the latest"):
            enrol.enrol(folder, site.request(invite), tmp_path / "out.json")
    enrol.enrol(folder, site.request(second), tmp_path / "out.json")
    assert set(admitted(folder)) == {"a"}


def test_an_expired_invite_is_void(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    invite = enrol.invite(folder, "a", tmp_path / "invite.json", days=-1)
    with pytest.raises(EnrolmentError, match="expired on"):
        enrol.enrol(folder, hospital("a").request(invite), tmp_path / "out.json")


def test_keys_of_another_site_are_refused(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    a = hospital("a").admitted(folder)
    invite = enrol.invite(folder, "b", tmp_path / "invite.json")
    b = hospital("b")
    with pytest.raises(EnrolmentError, match="has the node key of site 'a'"):
        enrol.enrol(
            folder, b.request(invite, node_key=pki.openssh_public(a.node)), tmp_path / "out.json"
        )
    with pytest.raises(EnrolmentError, match="has the identity key of site 'a'"):
        enrol.enrol(folder, b.request(invite, identity=a.identity.public), tmp_path / "out.json")
    with pytest.raises(CoordinatorError, match="node key of the request does not parse"):
        enrol.enrol(
            folder,
            b.request(invite, node_key="ecdsa-sha2-nistp384 AAAA"),
            tmp_path / "out.json",
        )
    raw = bytearray(b64decode(pki.openssh_public(b.node).split()[1]))
    raw[-97] = 2  # what follows is said to be a compressed point
    pressed = f"ecdsa-sha2-nistp384 {b64encode(raw).decode()}"
    with pytest.raises(CoordinatorError, match="node key of the request does not parse"):
        enrol.enrol(folder, b.request(invite, node_key=pressed), tmp_path / "out.json")
    with pytest.raises(CertificateError, match="no signing request"):
        enrol.enrol(folder, b.request(invite, signing_request="x"), tmp_path / "out.json")
    assert set(admitted(folder)) == {"a"}
    enrol.enrol(folder, b.request(invite), tmp_path / "out.json")  # the invite was not used up


def test_new_keys_replace_old_ones(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    old = hospital("a").admitted(folder)
    before = Register.read(folder).sites["a"].serials
    new = hospital("new")
    invite = enrol.invite(folder, "a", tmp_path / "invite.json")
    assert set(admitted(folder)["a"]) == set(before), "an invite alone changes nothing"
    enrol.enrol(folder, new.request(invite), tmp_path / "out.json")
    register = Register.read(folder)
    assert register.revoked == set(before)
    assert admitted(folder) == {"a": set(register.sites["a"].serials)}
    assert register.node_keys() == {"a": front.node_public(pki.openssh_public(new.node))}
    assert old.node_header not in (folder.nginx / "nginx.conf").read_text()


def test_a_node_key_that_was_given_up_is_refused(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    """Flower takes none again that it has unregistered: who brought one would spoil the rest."""
    old, out = hospital("a").admitted(folder), tmp_path / "out.json"
    node = pki.openssh_public(old.node)
    kept = hospital("kept").request(enrol.invite(folder, "a", out), node_key=node)
    enrol.enrol(folder, kept, out)  # new keys but this one, which never stopped
    new = hospital("new")
    enrol.enrol(folder, new.request(enrol.invite(folder, "a", out)), out)
    enrol.revoke(folder, "a")
    for name, key in (("a", node), ("b", node), ("b", pki.openssh_public(new.node))):
        invite = enrol.invite(folder, name, out)
        with pytest.raises(EnrolmentError, match="was in use once and given up"):
            enrol.enrol(folder, hospital(f"{name}{key[-9:-4]}").request(invite, node_key=key), out)
    assert Register.read(folder).sites == {}


# -- renewal and revocation ----------------------------------------------------------------------


def test_a_revocation_that_was_cut_short_is_given_again(
    folder: CoordinatorFolder, hospital: Joining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the register has forgotten a site that the front still admits."""
    hospital("a").admitted(folder)
    with monkeypatch.context() as patched:
        patched.setattr(front, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            enrol.revoke(folder, "a")
    assert set(admitted(folder)) == {"a"}
    enrol.revoke(folder, "a")
    assert admitted(folder) == {}


def test_a_front_that_fails_leaves_the_superlink_told(
    folder: CoordinatorFolder, hospital: Joining, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital("a").admitted(folder)
    told = []

    class Told:
        def reconcile(self, keys: dict[str, bytes]) -> None:
            told.append(keys)

    def stuck(_: CoordinatorFolder) -> bool:
        raise CoordinatorError("the front has not taken its new configuration")

    monkeypatch.setattr(front, "reload", stuck)
    monkeypatch.setattr(SuperLink, "connected", lambda _: nullcontext(Told()))
    with folder.serving(), pytest.raises(CoordinatorError, match="has not taken"):
        run("revoke", "a", "-C", folder.root)
    assert told == [{}]


def test_a_renewed_certificate_stands_beside_the_old_one(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    site = hospital("a").admitted(folder)
    old = Admission.read(site.folder / "admission.json")
    enrol.renew_site(folder, "a", tmp_path / "renewed.json")
    new = Admission.read(tmp_path / "renewed.json")
    assert new.certificate != old.certificate
    assert new.request == old.request
    assert pki.belongs(new.certificate, site.tls)
    serials = {Facts.of(a.certificate).serial for a in (old, new)}
    assert admitted(folder) == {"a": serials}
    enrol.revoke(folder, "a")
    assert Register.read(folder).revoked == serials, "revoking forgets neither"
    assert admitted(folder) == {}
    with pytest.raises(StudyError, match="unknown site 'a'"):
        enrol.renew_site(folder, "a", tmp_path / "x.json")


def test_revocation_voids_open_invites_too(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    invite = enrol.invite(folder, "a", tmp_path / "invite.json")
    enrol.revoke(folder, "a")
    with pytest.raises(EnrolmentError, match="no invite"):
        enrol.enrol(folder, hospital("a").request(invite), tmp_path / "out.json")
    with pytest.raises(StudyError, match="unknown site 'b'"):
        enrol.revoke(folder, "b")


def test_a_revoked_sites_old_request_does_not_let_it_back(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    site = hospital("a").admitted(folder)
    enrol.revoke(folder, "a")
    request = EnrolmentRequest.read(site.folder / "request.json")
    with pytest.raises(EnrolmentError, match="no invite"):
        enrol.enrol(folder, request, tmp_path / "out.json")


def test_the_servers_certificate_is_renewed(folder: CoordinatorFolder) -> None:
    before, key = folder.server_certificate.read_text(), folder.server_key.read_text()
    enrol.renew_server(folder)
    assert folder.server_certificate.read_text() != before
    assert folder.server_key.read_text() == key
    facts = enrol.renew_server(folder, hosts=["new.example"], new_key=True)
    assert "new.example" in " ".join(facts.names)
    assert folder.config().hosts == ("new.example",)
    assert folder.server_key.read_text() != key
    assert pki.belongs(folder.server_certificate.read_text(), folder.server_key.read_text())
    assert folder.server_key.stat().st_mode & 0o077 == 0


def test_a_server_that_cannot_be_certified_keeps_what_it_has(folder: CoordinatorFolder) -> None:
    files = (folder.server_key, folder.server_certificate, folder.config_file)
    before = [path.read_text() for path in files]
    (folder.root / "ca.key").rename(folder.root / "away")
    with pytest.raises(CertificateError, match="no certificate authority"):
        enrol.renew_server(folder, hosts=["new.example"], new_key=True)
    assert [path.read_text() for path in files] == before
    (folder.root / "away").rename(folder.root / "ca.key")
    folder.server_key.unlink()
    enrol.renew_server(folder)
    assert pki.belongs(folder.server_certificate.read_text(), folder.server_key.read_text())


def test_a_damaged_register_changes_nothing(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    hospital("a").admitted(folder)
    before = (folder.nginx / "nginx.conf").read_text()
    folder.sites.write_text(folder.sites.read_text()[:-20])
    with pytest.raises(CoordinatorError, match="restore it from the backup"):
        enrol.revoke(folder, "a")
    assert (folder.nginx / "nginx.conf").read_text() == before


# -- roster --------------------------------------------------------------------------------------


def test_hospitals_sign_the_roster(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    with pytest.raises(CoordinatorError, match="no site is enrolled"):
        enrol.roster(folder)
    sites = {name: hospital(name).admitted(folder) for name in "ab"}
    made = enrol.roster(folder)
    assert made.unsigned() == ["a", "b"]
    files = []
    for name, site in sites.items():
        files.append(tmp_path / f"{name}.json")
        made.signed(name, site.identity).write(files[-1])
    assert enrol.roster(folder, files[:1]).unsigned() == ["b"]
    assert enrol.roster(folder, files[1:]).unsigned() == []
    assert enrol.roster(folder).unsigned() == [], "signatures are kept"
    hospital("c").admitted(folder)
    with pytest.raises(RosterError, match="another roster"):
        enrol.roster(folder, files)
    assert enrol.roster(folder).unsigned() == ["a", "b", "c"], "another roster: all sign anew"
    assert set(Roster.load(folder.roster).sites) == {"a", "b", "c"}


# -- commands ------------------------------------------------------------------------------------


def run(*arguments: object, typed: str = "", code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=typed)
    if isinstance(result.exception, FedwardError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_the_way_from_nothing_to_an_admitted_site(hospital: Joining, tmp_path: Path) -> None:
    root = tmp_path / "c"
    said = run("init", root, "--host", "c.example", "--host", "192.0.2.7", "--port", 9001)
    folder = CoordinatorFolder.at(root)
    assert fingerprint(folder.identity().public) in said
    assert said.partition("encrypted: ")[2].splitlines()[0].split() == sorted(
        (p.name for p in root.iterdir() if p.is_file() and p.name != "ca.crl"),
        key=folder.kept.index,
    )
    where = ("-C", root)
    said = run("invite", "a", "--out", tmp_path / "a.json", *where)
    assert fingerprint(folder.identity().public) in said
    site = hospital("a")
    request = tmp_path / "request.json"
    site.request(Invite.read(tmp_path / "a.json")).write(request, site.identity)
    out = tmp_path / "admission.json"
    said = run("enrol", request, "--out", out, *where, typed="n\n", code=1)
    assert fingerprint(site.identity.public) in said
    assert not out.exists()
    assert Register.read(folder).sites == {}
    run("enrol", request, "--out", out, *where, typed="y\n")
    assert Admission.read(out).site == "a"
    run("enrol", request, "--out", out, "--yes", *where)
    said = run("status", *where)
    assert "not serving" in said
    assert "unknown" in said
    said = run("roster", *where)
    assert "not signed by a" in said
    assert fingerprint(site.identity.public) in said
    said = run("renew", "a", "--out", out, *where)
    assert "until" in said
    with pytest.raises(CoordinatorError, match="are the server's"):
        run("renew", "a", "--new-key", *where)
    run("renew", *where)
    run("revoke", "a", *where)
    assert admitted(folder) == {}


def test_a_changed_request_is_refused(
    folder: CoordinatorFolder, hospital: Joining, tmp_path: Path
) -> None:
    invite = enrol.invite(folder, "a", tmp_path / "invite.json")
    site = hospital("a")
    path = tmp_path / "request.json"
    site.request(invite).write(path, site.identity)
    raw = json.loads(path.read_text())
    raw["content"]["node_key"] = pki.openssh_public(pki.new_key())
    path.write_text(json.dumps(raw))
    with pytest.raises(EnrolmentError, match="was changed"):
        run("enrol", path, "--yes", "-C", folder.root)


@pytest.mark.parametrize("host", ["bad host", "a;b", "*.example", "c.example:8443"])
def test_a_host_that_is_none_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="hosts"):
        run("init", tmp_path / "c", "--host", host)
    assert not (tmp_path / "c").exists()


def test_a_site_name_that_is_none_is_refused(folder: CoordinatorFolder, tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="no name for a site"):
        run("invite", "../a", "--out", tmp_path / "x.json", "-C", folder.root)
    assert not (tmp_path / "x.json").exists()

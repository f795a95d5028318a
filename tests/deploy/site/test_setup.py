"""From invite to admission: what is made, what is refused, and that no key is ever written over."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.site.daemon.config import DaemonConfig
from client.site.encoders.vault import Vault
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.policy import Policy
from common.roster import Roster, RosterError
from deploy import pki
from deploy.enrolment import EnrolmentRequest
from deploy.site import setup
from deploy.site.layout import SiteFolder
from deploy.site.setup import Owners

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else b""
        for p in sorted(root.rglob("*"))
    }


def test_a_site_has_all_that_daemon_and_relay_need(site: SiteFolder, shard: Path) -> None:
    config = DaemonConfig.load(site.config_file)
    (hosted,) = config.sites
    assert (hosted.name, hosted.shard, hosted.state) == ("north", shard, site.state)
    assert config.socket == site.socket
    assert not config.simulated
    Vault.open(hosted.state / "vault").close()

    relay = site.relay.config()
    assert (relay.host, relay.port, relay.site) == ("localhost", 8443, "north")
    assert relay.socket == site.socket
    node = load_ssh_private_key(site.relay.node_key.read_bytes(), None)  # as flower-supernode does
    request = EnrolmentRequest.read(site.request)
    assert request.node_key.split()[1] in pki.openssh_public(_pem(node))
    assert request.identity == Identity.open(site.state / "site.key").public
    assert pki.belongs(site.relay.certificate.read_text(), site.relay.key.read_text())


def _pem(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def test_the_policy_of_a_new_site_allows_nothing(site: SiteFolder, coordinator: Any) -> None:
    policy = Policy.load(site.policy_file)
    assert policy.coordinators == (coordinator.identity.public,)
    assert policy.approvers == {}
    assert policy.lifetime is not None
    assert policy.lifetime.train.epsilon <= 1
    assert not policy.allows("none")


def test_secrets_are_their_owners_alone_and_nothing_else_holds_them(site: SiteFolder) -> None:
    secrets = [
        site.state / "site.key",
        site.state / "vault" / "vault.key",
        site.relay.key,
        site.relay.node_key,
    ]
    for path in (*secrets, site.state, site.relay.root, site.config_file, site.policy_file):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    public = [site.request, site.policy_file, site.config_file, site.relay.config_file]
    for secret in secrets:
        raw = secret.read_bytes()
        lines = [raw] if len(raw) == 32 else [x for x in raw.splitlines() if b"-----" not in x]
        assert lines
        for path in public:
            assert not any(line in path.read_bytes() for line in lines), (secret, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expires": datetime.now(UTC) - timedelta(seconds=1)}, "expired on"),
        ({"version": "9.9.9"}, "runs Fedward 9.9.9"),
        ({"bundle": "0" * 64}, "one of the two was changed"),
    ],
)
def test_an_invite_for_another_installation_makes_nothing(
    make_site: Callable[..., SiteFolder], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedwardError, match=message):
        make_site(**changes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coordinator"]


def test_a_changed_invite_makes_nothing(tmp_path: Path, coordinator: Any, shard: Path) -> None:
    path = coordinator.invite()
    raw = json.loads(path.read_text())
    raw["content"]["host"] = "evil.example"
    path.write_text(json.dumps(raw))
    with pytest.raises(FedwardError, match="was changed"):
        setup.init(tmp_path / "site", path, shard)
    assert not (tmp_path / "site").exists()


def test_an_existing_folder_is_not_touched(
    site: SiteFolder, coordinator: Any, shard: Path, tmp_path: Path
) -> None:
    before = everything(site.root)
    with pytest.raises(FedwardError, match="never written over"):
        setup.init(site.root, coordinator.invite(), shard)
    assert everything(site.root) == before
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FedwardError, match="exists already"):
        setup.init(tmp_path / "dangling", coordinator.invite(), shard)


def test_a_set_up_that_fails_halfway_leaves_nothing(
    make_site: Callable[..., SiteFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "signing_request", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_site()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coordinator"]
    monkeypatch.undo()
    assert make_site().relay.certificate.exists()


@pytest.mark.parametrize("url", ["proxy:3128", "socks5://proxy:1", "http://proxy", "http://p:x"])
def test_a_proxy_is_an_http_url_with_a_port(
    url: str, tmp_path: Path, coordinator: Any, shard: Path
) -> None:
    with pytest.raises(FedwardError, match="no HTTP proxy"):
        setup.init(tmp_path / "site", coordinator.invite(), shard, proxy=url)
    assert setup.check_proxy("http://user:word@proxy.example:3128") == ("proxy.example", 3128)


def test_a_path_too_long_for_a_socket_is_refused_at_once(
    tmp_path: Path, coordinator: Any, shard: Path
) -> None:
    with pytest.raises(FedwardError, match="does not admit"):
        setup.init(tmp_path / ("x" * 100), coordinator.invite(), shard)


# -- admission ------------------------------------------------------------------------------------


def test_a_renewed_certificate_replaces_the_old_one(site: SiteFolder, coordinator: Any) -> None:
    before = pki.Facts.of(site.relay.certificate.read_text())
    setup.accept(site.root, coordinator.admit(site, days=500))
    after = pki.Facts.of(site.relay.certificate.read_text())
    assert after.serial != before.serial
    assert after.not_after > before.not_after
    with pytest.raises(FedwardError, match="ends before the one in use"):
        setup.accept(site.root, coordinator.admit(site, days=30))
    assert pki.Facts.of(site.relay.certificate.read_text()) == after


def test_an_admission_must_fit_in_every_way(
    make_site: Callable[..., SiteFolder], coordinator: Any, stranger: Any
) -> None:
    site, other = make_site(admitted=False), make_site("other", admitted=False)
    ours, theirs = EnrolmentRequest.read(site.request), EnrolmentRequest.read(other.request)
    csr = ours.signing_request

    def refused(admission: Path, message: str) -> None:
        with pytest.raises(FedwardError, match=message):
            setup.accept(site.root, admission)
        assert not site.relay.certificate.exists()

    refused(stranger.admit(site), "somebody else signed it")
    refused(coordinator.admit(site, request=theirs.digest), "answers another request")
    refused(coordinator.admit(site, site="south"), "answers another request")
    issue = coordinator.authority.issue_site
    refused(
        coordinator.admit(site, certificate=issue(theirs.signing_request, "north")),
        "does not belong to",
    )
    refused(coordinator.admit(site, certificate=issue(csr, "south")), "is for south")
    refused(coordinator.admit(site, certificate=issue(csr, "north", days=0)), "valid from")
    foreign = stranger.authority.issue_site(csr, "north")
    refused(coordinator.admit(site, certificate=foreign), "not issued by the coordinator")
    setup.accept(site.root, coordinator.admit(site))
    assert site.relay.certificate.exists()


def test_a_site_that_rejoins_has_new_relay_keys_and_is_the_same_site(
    site: SiteFolder, coordinator: Any
) -> None:
    """After its keys were revoked: identity, ledger, vault and policy are kept."""
    old, before = EnrolmentRequest.read(site.request), everything(site.root)
    site.relay.configure(
        site.relay.config().model_copy(update={"proxy": "http://proxy.example:3128"})
    )
    with pytest.raises(FedwardError, match="is for site 'south'"):
        setup.rejoin(site.root, coordinator.invite(site="south"))
    with pytest.raises(FedwardError, match="expired"):
        setup.rejoin(site.root, coordinator.invite(expires=datetime.now(UTC)))
    assert EnrolmentRequest.read(site.request) == old

    setup.rejoin(site.root, coordinator.invite(nonce="1" * 32, port=9999))
    new, after = EnrolmentRequest.read(site.request), everything(site.root)
    assert (new.identity, new.nonce) == (old.identity, "1" * 32)
    assert new.node_key != old.node_key
    assert new.signing_request != old.signing_request
    for name in before:
        if name.startswith(("state/", "policy", "site.toml")):
            assert after[name] == before[name], name
    config = site.relay.config()
    assert (config.port, config.proxy) == (9999, "http://proxy.example:3128")
    assert not site.relay.certificate.exists()
    (aside,) = site.root.glob("relay.replaced-*")
    assert (aside / "relay.key").read_bytes() == before["relay/relay.key"]
    setup.accept(site.root, coordinator.admit(site))
    assert stat.S_IMODE(site.relay.root.stat().st_mode) == 0o700
    assert not [p for p in site.root.iterdir() if p.name.startswith(".")]


# -- users ----------------------------------------------------------------------------------------


@needs_root
def test_daemon_and_relay_are_different_users(
    tmp_path: Path, coordinator: Any, shard: Path
) -> None:
    owners = Owners.named(daemon="daemon", relay="nobody", group="users")
    folder = SiteFolder(tmp_path / "site")
    setup.init(folder.root, coordinator.invite(), shard, owners=owners)
    setup.accept(folder.root, coordinator.admit(folder))
    daemon, relay = Owners.named(daemon="daemon").daemon, Owners.named(relay="nobody").relay
    assert daemon
    assert relay
    for path in (folder.state, folder.state / "site.key", folder.policy_file):
        assert path.stat().st_uid == daemon[0]
    for path in folder.relay.root.rglob("*"):
        assert path.stat().st_uid == relay[0], path
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o750
    assert Owners.of(folder) == owners
    assert DaemonConfig.load(folder.config_file).socket_group == "users"

    os.chmod(tmp_path, 0o711)
    for parent in tmp_path.parents[:2]:
        os.chmod(parent, 0o711)

    def relay_may(*command: str | Path) -> bool:
        """Whether a command succeeds as the relay's user, in the socket's group."""
        done = subprocess.run(
            command, user="nobody", group="users", extra_groups=["users"], capture_output=True
        )
        return done.returncode == 0

    assert relay_may("cat", folder.relay.key)
    assert relay_may("ls", folder.socket.parent)
    assert not relay_may("touch", folder.socket.parent / "x")
    assert not relay_may("ls", folder.state)
    for closed in (folder.state / "site.key", folder.policy_file, folder.config_file):
        assert not relay_may("cat", closed)


def test_users_and_groups_must_exist() -> None:
    with pytest.raises(FedwardError, match="no group 'no-such-group'"):
        Owners.named(group="no-such-group")
    with pytest.raises(FedwardError, match=r"only root|no user"):
        Owners.named(daemon="no-such-user")


# -- roster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_name", ["s", "s" * 120])
def test_a_roster_is_in_force_once_all_have_signed(
    coordinator: Any, tmp_path: Path, shard_name: str
) -> None:
    site = SiteFolder(tmp_path / "site")
    (tmp_path / shard_name).mkdir()
    setup.init(site.root, coordinator.invite(), tmp_path / shard_name)
    north, south = Identity.open(site.state / "site.key"), Identity.open(tmp_path / "south.key")
    roster = Roster(name="test", sites={"north": north.public, "south": south.public})
    out = tmp_path / "out.json"
    setup.sign_roster(site.root, roster, out)
    assert Roster.load(out).unsigned() == ["south"]
    assert not setup.roster_path(site).exists()
    assert DaemonConfig.load(site.config_file).sites[0].roster is None

    setup.sign_roster(site.root, roster.signed("south", south), out)
    assert Roster.load(setup.roster_path(site)).unsigned() == []
    config = DaemonConfig.load(site.config_file)
    assert config.sites[0].roster == setup.roster_path(site)
    assert stat.S_IMODE(site.config_file.stat().st_mode) == 0o600

    changed = Roster(
        name="test", sites={"north": north.public, "east": "1" * 64, "south": "2" * 64}
    )
    changed.write(out)
    assert setup.RosterView.open(out, site).changed == ("east joins", "south has another key")


def test_a_roster_without_this_site_is_not_signed(site: SiteFolder, tmp_path: Path) -> None:
    stolen = Roster(name="test", sites={"north": "1" * 64})
    with pytest.raises(RosterError, match="does not list site 'north' with its key"):
        setup.sign_roster(site.root, stolen, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    (site.state / "site.key").unlink()
    with pytest.raises(FedwardError, match="no key"):
        setup.sign_roster(site.root, stolen, tmp_path / "out.json")
    assert not (site.state / "site.key").exists()


def test_a_pause_is_a_file_of_the_state(site: SiteFolder, tmp_path: Path) -> None:
    setup.pause(site.root, "driver update")
    note = json.loads((site.state / "paused").read_text())
    assert note["reason"] == "driver update"
    assert datetime.fromisoformat(note["since"]).tzinfo is not None
    assert setup.unpause(site.root)
    assert not setup.unpause(site.root)
    with pytest.raises(FedwardError, match="no site's folder"):
        setup.pause(tmp_path, "")


def test_a_pause_that_the_daemon_would_not_see_is_refused(site: SiteFolder) -> None:
    usual = site.config_file.read_text()
    site.config_file.write_text(usual.replace('state = "state"', 'state = "elsewhere"'))
    with pytest.raises(FedwardError, match="keeps its state outside"):
        setup.pause(site.root, "")
    assert not (site.state / "paused").exists()
    site.config_file.write_text("a mistake")  # the daemon that runs has read the one before
    setup.pause(site.root, "")
    assert (site.state / "paused").exists()


def test_no_link_of_the_relays_user_is_followed(
    site: SiteFolder, coordinator: Any, tmp_path: Path
) -> None:
    """Root writes into `relay/`: what a link there names is neither written nor given away."""
    victim = tmp_path / "victim"
    victim.write_text("of root")
    victim.chmod(0o600)

    config, admission = site.relay.config(), coordinator.admit(site)
    if os.geteuid() == 0:
        os.chown(site.relay.root, 65534, 65534)
    site.relay.certificate.unlink()
    site.relay.config_file.unlink()
    for name in (f".relay.crt.{os.getpid()}", f".relay.toml.{os.getpid()}", "relay.toml"):
        (site.relay.root / name).symlink_to(victim)
    setup.accept(site.root, admission)
    assert site.relay.certificate.read_text().startswith("-----BEGIN CERTIFICATE")
    site.relay.configure(config)
    assert site.relay.config() == config
    assert not site.relay.config_file.is_symlink()
    assert stat.S_IMODE(site.relay.config_file.stat().st_mode) == 0o600
    assert victim.read_text() == "of root"
    assert (victim.stat().st_uid, stat.S_IMODE(victim.stat().st_mode)) == (os.getuid(), 0o600)
    if os.geteuid() == 0:
        assert site.relay.config_file.stat().st_uid == 65534


def test_setting_up_needs_no_torch() -> None:
    code = (
        "import sys, deploy.site.cli, deploy.site.setup, deploy.site.backup, deploy.site.restore,"
        "deploy.site.upgrade, deploy.site.doctor.checks;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

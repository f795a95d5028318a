"""The front, with the real nginx before the real SuperLink."""

from __future__ import annotations

import ssl
import subprocess
from base64 import b64encode
from http.client import HTTPException
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy import pki
from deploy.coordinator import enrol, front
from deploy.coordinator.cli import app
from deploy.coordinator.layout import CoordinatorError, CoordinatorFolder
from deploy.coordinator.superlink import SuperLink
from tests.deploy.coordinator.ward import Hospital, Served, hello

REFUSED = (403, 429)  # many refusals from one address become 429
KNOWN = (200, 412)  # the SuperLink's answer to a node: welcome, or welcomed already


def test_an_enrolled_site_reaches_the_fleet_with_its_node_key(served: Served) -> None:
    site = served.hospitals["a"]
    assert served.ask(site, headers=site.signed_headers(), body=hello(site)) in KNOWN
    with SuperLink.connected(served.folder) as superlink:
        online = {node.public_key for node in superlink.nodes() if node.online}
    assert online == {front.node_public(pki.openssh_public(site.node))}
    said = CliRunner().invoke(app, ["status", "-C", str(served.folder.root)]).output
    rows = [line.split()[:2] for line in said.splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert rows == [["a", "yes"], ["b", "no"]]


def test_the_superlink_still_asks_for_the_signature(served: Served) -> None:
    site = served.hospitals["a"]
    headers = {**site.signed_headers(), "flwr-signature": b64encode(b"0" * 96).decode()}
    assert served.ask(site, headers=headers, body=hello(site)) == 401


def test_no_certificate_is_refused(served: Served) -> None:
    headers = served.hospitals["a"].signed_headers()
    assert served.ask(None, headers=headers, body=hello(served.hospitals["a"])) in REFUSED


def test_a_certificate_of_another_authority_is_refused(served: Served, tmp_path: Path) -> None:
    site = served.hospitals["a"]
    authority = pki.Authority.create(tmp_path, "ward authority")
    before = (site.folder / "relay.crt").read_text()
    site.install(authority.issue_site(pki.signing_request(site.tls, "a"), "a"))
    try:
        assert rejected(served, site)
    finally:
        site.install(before)


def test_a_certificate_that_the_register_does_not_know_is_refused(served: Served) -> None:
    """Signed by the right authority, but not by `enrol`."""
    site = served.hospitals["a"]
    authority = pki.Authority.open(served.folder.root)
    before = (site.folder / "relay.crt").read_text()
    for days in (30, 0):  # the second has expired
        site.install(authority.issue_site(pki.signing_request(site.tls, "a"), "a", days=days))
        try:
            assert rejected(served, site)
        finally:
            site.install(before)


def test_the_servers_own_certificate_is_no_sites(served: Served, tmp_path: Path) -> None:
    site = served.hospitals["a"]
    (tmp_path / "relay.crt").write_text(served.folder.server_certificate.read_text())
    (tmp_path / "relay.key").write_text(served.folder.server_key.read_text())
    thief = type("Thief", (), {"folder": tmp_path})()
    assert served.ask(thief, headers=site.signed_headers(), body=hello(site)) in REFUSED


def test_a_revoked_certificate_is_refused(served: Served) -> None:
    assert rejected(served, served.hospitals["c"])


def test_a_certificate_does_not_carry_another_sites_node_key(served: Served) -> None:
    a, b = served.hospitals["a"], served.hospitals["b"]
    assert served.ask(b, headers=a.signed_headers(), body=hello(a)) in REFUSED
    assert served.ask(b, headers={}, body=hello(b)) in REFUSED
    assert served.ask(b, headers=b.signed_headers(), body=hello(b)) in KNOWN


def test_a_second_key_header_does_not_get_by(served: Served) -> None:
    a, b = served.hospitals["a"], served.hospitals["b"]
    for first, second in ((a, b), (b, a)):
        connection = served.connect(b)
        connection.putrequest("POST", "/v1/fleet/activate-node")
        signed = a.signed_headers()
        connection.putheader("flwr-public-key", first.node_header)
        connection.putheader("flwr-public-key", second.node_header)
        for name in ("Content-Type", "flwr-timestamp", "flwr-signature"):
            connection.putheader(name, signed[name])
        connection.putheader("flwr_public_key", a.node_header)
        connection.putheader("Content-Length", str(len(hello(a))))
        connection.endheaders(hello(a))
        assert connection.getresponse().status in (*REFUSED, 401)
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/v1/control/list-runs",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "/v1/control/list-runs/../../fleet/get-fab",
        "//v1/control/list-runs",
        "/v1/fleet/get-fab?/../../control/list-runs",
        "/v1/fleet/",
    ],
)
def test_nothing_but_the_fleet_is_there(served: Served, path: str) -> None:
    site = served.hospitals["a"]
    assert served.ask(site, path, headers=site.signed_headers()) == 404


def test_the_fleet_is_asked_by_post_and_in_pieces(served: Served) -> None:
    site = served.hospitals["a"]
    assert served.ask(site, method="GET", headers=site.signed_headers()) == 405
    headers = {**site.signed_headers(), "Content-Length": str(33 * 2**20)}
    assert served.ask(site, "/v1/fleet/push-messages", headers=headers) == 413


def test_old_tls_is_refused(served: Served) -> None:
    site = served.hospitals["a"]
    port = served.folder.config().port
    tls = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-brief"]
    tls += ["-cert", str(site.folder / "relay.crt"), "-key", str(site.folder / "relay.key")]
    shaken = {
        version: subprocess.run(
            [*tls, version, "-cipher", "ALL:@SECLEVEL=0"], input=b"", capture_output=True
        ).returncode
        == 0
        for version in ("-tls1", "-tls1_1", "-tls1_2")
    }
    assert shaken == {"-tls1": False, "-tls1_1": False, "-tls1_2": True}


def test_the_log_names_sites_and_holds_no_bodies(served: Served) -> None:
    site = served.hospitals["a"]
    served.ask(site, headers=site.signed_headers(), body=b"canary-in-the-body")
    logs = [p.read_text(errors="replace") for p in served.folder.logs.glob("nginx*.log")]
    assert any('site="a"' in text for text in logs)
    assert not any("canary" in text for text in logs)


def test_revocation_counts_at_once_on_open_connections_too(served: Served) -> None:
    site = served.hospitals["b"]
    connection = served.connect(site)
    connection.request("POST", "/v1/fleet/activate-node", hello(site), site.signed_headers())
    answer = connection.getresponse()
    assert answer.status in KNOWN
    answer.read()
    result = CliRunner().invoke(app, ["revoke", "b", "-C", str(served.folder.root)])
    assert result.exit_code == 0, result.output
    assert "the front has reloaded" in result.output
    for _ in range(20):
        assert served.ask(site, headers=site.signed_headers(), body=hello(site)) in REFUSED
    try:
        connection.request("POST", "/v1/fleet/activate-node", hello(site), site.signed_headers())
        assert connection.getresponse().status in REFUSED
    except (ConnectionError, ssl.SSLError, HTTPException):
        pass  # closed, which is as good
    with SuperLink.connected(served.folder) as superlink:
        keys = {node.public_key for node in superlink.nodes()}
    assert keys == {front.node_public(pki.openssh_public(served.hospitals["a"].node))}


def test_strangers_who_insist_are_put_off(served: Served) -> None:
    statuses = [served.ask(None) for _ in range(40)]
    assert statuses[-1] == 429
    site = served.hospitals["a"]
    assert served.ask(site, headers=site.signed_headers(), body=hello(site)) in KNOWN


def test_a_configuration_that_nginx_refuses_is_told(folder: CoordinatorFolder) -> None:
    program = front.binary()
    if program is None:
        pytest.skip("nginx is not installed")
    front.check(folder, program)
    folder.configure(folder.config().model_copy(update={"listen": "no.such.name.invalid"}))
    enrol.Register.read(folder).publish(folder)
    with pytest.raises(CoordinatorError, match="nginx refuses"):
        front.check(folder, program)


def test_a_front_of_others_is_not_signalled(folder: CoordinatorFolder) -> None:
    bystander = subprocess.Popen(["sleep", "30"])
    try:
        (folder.nginx / "nginx.pid").write_text(f"{bystander.pid}\n")
        assert not front.reload(folder)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def rejected(served: Served, site: Hospital) -> bool:
    """By TLS or by the front."""
    try:
        return served.ask(site, headers=site.signed_headers(), body=hello(site)) in REFUSED
    except (ssl.SSLError, ConnectionError):
        return True

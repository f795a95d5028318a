"""Checks of the way to the coordinator: the relay's configuration, certificates, network, TLS."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urlsplit

from deploy import pki
from deploy.site.doctor.visit import CheckFailed, CheckWarning, Visit
from deploy.site.gate import mutual_tls
from deploy.site.layout import pem
from deploy.site.setup import certificate_problem, check_proxy

RENEW_DAYS = 30
# Flower refuses a node whose clock is further ahead or behind (SYSTEM_TIME_TOLERANCE and
# TIMESTAMP_TOLERANCE of flwr.common.constant).
_AHEAD_SECONDS, _BEHIND_SECONDS = 5.0, 300.0


def relay_config(visit: Visit) -> str:
    relay = visit.relay
    if relay.site != visit.site:
        raise CheckFailed(f"relay.toml is of site '{relay.site}'", cure=f"write {visit.site}")
    if visit.config and relay.socket != visit.config.socket:
        raise CheckFailed(
            f"relay.toml looks for the daemon at {relay.socket}, site.toml puts it at "
            f"{visit.config.socket}",
            cure="write the same socket in both, and restart both",
        )
    return f"coordinator {relay.host}:{relay.port}"


def certificate(visit: Visit) -> str:
    relay = visit.folder.relay
    if not relay.certificate.exists():
        raise CheckFailed(
            "the coordinator has not admitted this site yet",
            cure="send request.json to the coordinator; then `fedward site accept`",
        )
    certificate = pem(relay.certificate)
    facts = pki.Facts.of(certificate)
    if problem := certificate_problem(certificate, facts, visit.folder, visit.invite):
        raise CheckFailed(f"{relay.certificate} {problem}", cure="ask the coordinator to renew it")
    authority = pki.Facts.of(pem(relay.authority))
    for what, until in (("certificate", facts.not_after), ("authority", authority.not_after)):
        days = (until - datetime.now(UTC)).days
        if days < RENEW_DAYS:
            raise CheckWarning(
                f"the {what} ends in {days} days, on {until:%Y-%m-%d}",
                cure="ask the coordinator to renew it",
            )
    return f"good until {facts.not_after:%Y-%m-%d}"


def dns(visit: Visit) -> str:
    host = check_proxy(visit.proxy)[0] if visit.proxy else visit.relay.host
    addresses = _resolved(host, visit.timeout)
    return f"{'proxy ' if visit.proxy else ''}{host} is {', '.join(addresses)}"


def _resolved(host: str, timeout: float) -> list[str]:
    """Addresses of a name. The resolver takes no time limit, hence the thread."""
    found: list[str] = []
    trouble: list[str] = []

    def ask() -> None:
        try:
            found.extend(dict.fromkeys(str(i[4][0]) for i in socket.getaddrinfo(host, None)))
        except OSError as error:
            trouble.append(error.strerror or str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        why = trouble[0] if trouble else f"no answer within {timeout:g} s"
        raise CheckFailed(
            f"the name {host} does not resolve ({why})",
            cure="ask for its entry in the hospital's DNS, or add it to /etc/hosts",
        )
    return found


def tcp(visit: Visit) -> str:
    host, port = check_proxy(visit.proxy) if visit.proxy else (visit.relay.host, visit.relay.port)
    try:
        socket.create_connection((host, port), timeout=visit.timeout).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise CheckFailed(
            f"{host}:{port} cannot be reached ({why})",
            cure="let the firewall pass outgoing TCP to it; ask whether it is running",
        ) from None
    return f"{host}:{port} answers"


def proxy(visit: Visit) -> str:
    if visit.proxy is None:
        return "none is set"
    try:
        _dial(visit).close()
    except OSError as error:
        raise CheckFailed(
            f"the proxy does not connect to {visit.relay.host}:{visit.relay.port} ({error})",
            cure="have it allow CONNECT to that host and port",
        ) from None
    return f"connects to {visit.relay.host}:{visit.relay.port}"


def server_tls(visit: Visit) -> str:
    _greet(visit, certificate=False).close()
    return "the server's certificate is by the coordinator's authority, for this name"


def client_tls(visit: Visit) -> str:
    relay = visit.relay
    connection = http.client.HTTPConnection(relay.host, relay.port, timeout=visit.timeout)
    try:
        connection.sock = _greet(visit, certificate=True)
        connection.request("GET", "/v1/fleet/")
        response = connection.getresponse()
        now = time.time()
        response.read()
    except (ssl.SSLError, ConnectionError, http.client.HTTPException) as error:
        raise CheckFailed(
            f"the coordinator closes the connection ({error})",
            cure="it may have revoked this site: ask; otherwise ask for a new certificate",
        ) from None
    finally:
        connection.close()
    # 400, 403 and 429 are how the coordinator's front turns away whom it does not know.
    if response.status in (400, 403, 429):
        raise CheckFailed(
            f"the coordinator refuses this site's certificate (HTTP {response.status})",
            cure="it was revoked, or another one is enrolled: ask the coordinator",
        )
    # Its date is cut to whole seconds, so that on average it is half a second old.
    if sent := response.headers.get("Date"):
        visit.clock_offset = now - parsedate_to_datetime(sent).timestamp() - 0.5
    if response.status >= 500:
        raise CheckWarning(
            f"the coordinator's front answers, the SuperLink behind it does not "
            f"(HTTP {response.status})",
            cure="nothing to do here: tell the coordinator",
        )
    return f"the coordinator takes this site's certificate (HTTP {response.status})"


def clock(visit: Visit) -> str:
    offset = visit.clock_offset
    if offset is None:
        raise CheckWarning("the coordinator does not tell its time", cure="look at this clock")
    text = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the coordinator's"
    if offset > _AHEAD_SECONDS or offset < -_BEHIND_SECONDS:
        raise CheckFailed(
            f"this clock is {text}: the coordinator refuses that",
            cure="synchronise the clock (chrony, systemd-timesyncd)",
        )
    if abs(offset) > _AHEAD_SECONDS / 2:
        raise CheckWarning(f"this clock is {text}", cure="synchronise the clock (chrony)")
    return f"this clock is {text}"


def _dial(visit: Visit) -> socket.socket:
    """A connection to the coordinator's port, through the proxy if there is one."""
    host, port = visit.relay.host, visit.relay.port
    if visit.proxy is None:
        return socket.create_connection((host, port), timeout=visit.timeout)
    connection = http.client.HTTPConnection(*check_proxy(visit.proxy), timeout=visit.timeout)
    parts = urlsplit(visit.proxy)
    headers = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    connection.connect()
    return connection.sock


def _greet(visit: Visit, *, certificate: bool) -> ssl.SSLSocket:
    """A TLS connection to the coordinator, of whom only its own authority vouches."""
    relay = visit.folder.relay
    if certificate:
        context = mutual_tls(relay.authority, relay.certificate, relay.key)
    else:
        context = ssl.create_default_context(cafile=str(relay.authority))
    connection = _dial(visit)
    try:
        return context.wrap_socket(connection, server_hostname=visit.relay.host)
    except ssl.SSLCertVerificationError as error:
        raise CheckFailed(
            f"the server's certificate does not hold: {error.verify_message}",
            cure="a date: set this clock, or the coordinator renews; a name: the invite's host is "
            "not the certificate's; an authority: somebody opens TLS on the way: have the "
            "firewall pass this connection untouched",
        ) from None
    except OSError as error:
        raise CheckFailed(
            f"no TLS with {visit.relay.host}:{visit.relay.port} ({error})",
            cure="ask whether the coordinator's front is running, and whether a firewall cuts it",
        ) from None

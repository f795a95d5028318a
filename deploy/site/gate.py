"""The gate: the only way from a site's relay to its coordinator.

Flower's SuperNode shows no client certificate, follows redirects, and runs whatever code it is
sent. The gate listens on this machine only and forwards the SuperNode's requests over mutual TLS,
through the hospital's HTTP proxy where there is one. It lets through nothing but Flower's fleet
API, no redirect, no answer beyond a size, and no other code than the bundle whose whole SHA-256 is
pinned.
"""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from flwr.proto.fab_pb2 import GetFabResponse
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deploy.site.layout import RelayConfig, RelayFolder

log = logging.getLogger("fedward.relay")

FLEET = "/v1/fleet/"
BUNDLE = FLEET + "get-fab"
_CALL = re.compile("[a-z-]+")
_BUNDLE_BYTES = 32 * 2**20
# Of one connection to the other: the body's length is the transport's affair, not the message's.
_HOP_BY_HOP = frozenset(
    {"connection", "host", "keep-alive", "proxy-authorization", "te", "transfer-encoding"}
    | {"upgrade", "content-length", "accept-encoding"}
)
_SECONDS = httpx.Timeout(60.0, connect=10.0)


class Upstream:
    """Connections to the coordinator; new ones when the site's certificate was renewed."""

    def __init__(self, folder: RelayFolder, config: RelayConfig) -> None:
        self._folder, self._proxy = folder, config.proxy
        self.base = f"https://{config.host}:{config.port}"
        self._client: httpx.AsyncClient | None = None
        self._since = 0

    async def client(self) -> httpx.AsyncClient:
        """A client that shows the certificate which is now in the folder."""
        since = self._folder.certificate.stat().st_mtime_ns
        if self._client is None or since != self._since:
            if self._client is not None:
                log.info("the certificate was renewed")
                await self._client.aclose()
            self._client, self._since = self._connected(), since
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _connected(self) -> httpx.AsyncClient:
        context = mutual_tls(self._folder.authority, self._folder.certificate, self._folder.key)
        return httpx.AsyncClient(
            verify=context,
            proxy=self._proxy,
            timeout=_SECONDS,
            follow_redirects=False,
        )


def mutual_tls(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Trusts this authority and no other, and shows the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)
    return context


def application(folder: RelayFolder, config: RelayConfig, upstream: Upstream) -> Starlette:
    """The ASGI application that the SuperNode talks to."""

    async def forward(request: Request) -> Response:
        call = request.path_params["call"]
        if not _CALL.fullmatch(call):
            return Response(status_code=404)
        path = FLEET + call
        try:
            client = await upstream.client()
            outgoing = client.build_request(
                "POST",
                upstream.base + path,
                # Compressed, a few bytes could unfold to more than this machine holds.
                headers={**_kept(request.headers.items()), "accept-encoding": "identity"},
                content=request.stream(),
            )
            answer = await client.send(outgoing, stream=True)
        except (httpx.HTTPError, OSError, ssl.SSLError) as error:
            log.warning("%s: the coordinator cannot be reached: %s", path, error)
            return Response(status_code=503)
        if answer.is_redirect:
            await answer.aclose()
            log.error("%s: the coordinator answered with a redirect, which is refused", path)
            return Response(status_code=403)
        if _by_the_front(answer):
            await answer.aclose()
            log.error(
                "%s: the coordinator does not admit this site's certificate with this node key "
                "(%d): revoked, or not its own; ask its administrator",
                path,
                answer.status_code,
            )
            return Response(status_code=401)
        if answer.headers.get("content-encoding", "identity") != "identity":
            await answer.aclose()
            log.error("%s: the coordinator's answer is compressed, which is refused", path)
            return Response(status_code=502)
        if path == BUNDLE and answer.is_success:
            return await _bundle(answer, config.bundle)
        return StreamingResponse(
            _bounded(answer, config.max_message_bytes, path),
            status_code=answer.status_code,
            headers=_kept(answer.headers.items()),
        )

    gate = Starlette(routes=[Route(FLEET + "{call:str}", forward, methods=["POST"])])
    gate.router.redirect_slashes = False
    return gate


def _by_the_front(answer: httpx.Response) -> bool:
    """Whether nginx refused, which does so by a page, where the SuperLink answers in JSON.

    The SuperNode takes any 403 for the end of a run, and then hangs without ending; on 401 it ends,
    and is started again until it is admitted.
    """
    page = answer.headers.get("content-type", "").startswith("text/html")
    return page and answer.status_code in (403, 429)


async def _bundle(answer: httpx.Response, pinned: str) -> Response:
    content = bytearray()
    async for chunk in _bounded(answer, _BUNDLE_BYTES, BUNDLE):
        content += chunk
    try:
        found = hashlib.sha256(GetFabResponse.FromString(bytes(content)).fab.content).hexdigest()
    except DecodeError:
        found = "unreadable"
    if found != pinned:
        log.error(
            "the coordinator sent other code (%s) than the hospital's bundle (%s): refused; both "
            "sides must run one version of Fedward, see `fedward site upgrade`",
            found,
            pinned,
        )
        return Response(status_code=403)
    return Response(bytes(content), headers=_kept(answer.headers.items()))


async def _bounded(answer: httpx.Response, most: int, path: str) -> AsyncIterator[bytes]:
    """The answer's bytes; an answer that is too long is cut off, which its reader notices."""
    left = most
    try:
        async for chunk in answer.aiter_bytes():
            left -= len(chunk)
            if left < 0:
                log.error("%s: an answer of more than %d bytes was cut off", path, most)
                raise ConnectionAbortedError("answer too long")
            yield chunk
    finally:
        await answer.aclose()


def _kept(headers: object) -> dict[str, str]:
    return {
        name: value
        for name, value in headers  # type: ignore[attr-defined]
        if name.lower() not in _HOP_BY_HOP | {"content-encoding"}
    }

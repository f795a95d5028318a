"""`fedward site join` whose gate keeps every byte that the relay sends and receives.

    python recording.py SITE/relay

Exchange number N of the gate is three files of `SITE/relay/recorded`: `N.json` (path, headers,
status), `N.request` and `N.answer` (bodies).
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.site import gate, join
from deploy.site.layout import RelayConfig, RelayFolder


class Recorder:
    """An ASGI application around another one, of which nothing changes."""

    def __init__(self, inner: ASGIApp, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        folder.mkdir()
        self._numbers = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stem = self.folder / f"{next(self._numbers):05}"
        request, answer = bytearray(), bytearray()
        head: dict[str, Any] = {
            "path": scope["raw_path"].decode(),
            "query": scope["query_string"].decode(),
            "headers": _text(scope["headers"]),
        }

        async def received() -> Message:
            message = await receive()
            request.extend(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.update(status=message["status"], answered=_text(message["headers"]))
            answer.extend(message.get("body", b""))
            await send(message)

        try:
            await self.inner(scope, received, sent)
        finally:
            stem.with_suffix(".request").write_bytes(request)
            stem.with_suffix(".answer").write_bytes(answer)
            partial = stem.with_suffix(".part")  # a reader sees whole exchanges only
            partial.write_text(json.dumps(head))
            partial.rename(stem.with_suffix(".json"))


def _text(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _recorded(folder: RelayFolder, config: RelayConfig, upstream: gate.Upstream) -> Recorder:
    return Recorder(gate.application(folder, config, upstream), folder.root / "recorded")


if __name__ == "__main__":
    join.application = _recorded  # type: ignore[assignment]
    join.run(Path(sys.argv[1]))

"""A hash of the code that both sides must share, to catch mixed versions by accident.

It is no defence: who wants to lie about it can.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def code_hash() -> str:
    """SHA-256 over names and bytes of the Python sources of package `common`, 64 hex digits."""
    return _hash(Path(__file__).resolve().parent)


def software_hash() -> str:
    """The same over all that a hospital runs: `common` and `client`, whatever of it is there."""
    here = Path(__file__).resolve().parent
    return _hash(here, here.parent / "client")


def _hash(*roots: Path) -> str:
    sha = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
            content = path.read_bytes()
            name = path.relative_to(root).as_posix()
            sha.update(f"{name}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()

"""A hash of the code that both sides must share, to catch mixed versions by accident.

It is no defence: who wants to lie about it can.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def code_hash() -> str:
    """SHA-256 over names and bytes of the Python sources of package `common`, 64 hex digits."""
    root = Path(__file__).resolve().parent
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()

"""Why a virtual hospital declined: what its operator would read in its own logs.

From a real hospital nothing but a code comes out. In a simulation the hospitals are the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d \S+ [A-Z]+ ", re.MULTILINE)
_REFUSED = re.compile(r"error: site (\S+) refused [^:]+: [\w-]+: (.*)", re.DOTALL)
_ELSEWHERE = "see the site's daemon.log"


def stories(out: Path) -> dict[str, str]:
    """The last story of each site of the run in `out` that refused something."""
    found: dict[str, str] = {}
    for entry in _entries(out / "logs" / "daemon.log"):
        if match := _REFUSED.match(entry):
            site, story = match[1], match[2].strip()
            if story == _ELSEWHERE:
                told = _entries(out / "sites" / site / "daemon.log")
                story = told[-1].strip().splitlines()[-1] if told else story
            found[site] = story
    return found


def told(stories: Mapping[str, str]) -> str:
    """As an indented list; hospitals with the same story share a line."""
    sites: dict[str, list[str]] = {}
    for site, story in stories.items():
        sites.setdefault(story, []).append(site)
    return "".join(
        f"\n  {', '.join(names)}: " + story.replace("\n", "\n  ") for story, names in sites.items()
    )


def _entries(path: Path) -> list[str]:
    """A log's messages, each with the lines that belong to it."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return _ENTRY.split(text)[1:]

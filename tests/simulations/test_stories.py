"""In a simulation the user reads what a hospital's operator would."""

from __future__ import annotations

from pathlib import Path

from simulations.stories import stories, told

DAEMON = """\
2026-11-22 04:06:20,001 INFO ready: 2 sites on site.sock
2026-11-22 04:06:21,357 ERROR error: site north refused prepare 0: data-problem: i.parquet, row 2: \
unreadable image
  cure: give a readable file
2026-11-22 04:06:21,400 ERROR error: site south refused train 1: internal: see the site's daemon.log
2026-11-22 04:06:22,000 INFO ending on signal 15
"""
SITE = """\
2026-11-22 04:06:21,400 ERROR refused train 1: internal
Traceback (most recent call last):
  File "x.py", line 1, in f
KeyError: 'lab'
"""


def test_the_story_behind_a_code(tmp_path: Path) -> None:
    assert stories(tmp_path) == {}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "daemon.log").write_text(DAEMON)
    (tmp_path / "sites" / "south").mkdir(parents=True)
    (tmp_path / "sites" / "south" / "daemon.log").write_text(SITE)
    found = stories(tmp_path)
    assert found == {
        "north": "i.parquet, row 2: unreadable image\n  cure: give a readable file",
        "south": "KeyError: 'lab'",
    }
    assert told(found | {"west": "KeyError: 'lab'"}).splitlines()[-1] == (
        "  south, west: KeyError: 'lab'"
    )

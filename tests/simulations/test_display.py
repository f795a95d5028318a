"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from simulations.display import Display


def site(name: str, **more: Any) -> dict[str, Any]:
    return {"site": name, "phase": "idle", "done": 0, "total": 0, "epsilon": {}, **more}


def shown(status: list[dict[str, Any]], *, height: int = 40) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=height)
    with Display(console, rounds=3) as display:
        display.heading("training")
        display.sites(status)
        with console.capture() as capture:
            console.print(display._picture())
    return capture.get()


def test_every_hospital_has_its_row() -> None:
    text = shown(
        [
            site("north", phase="encoding", done=41, total=100),
            site(
                "south",
                phase="training",
                round=2,
                step=3,
                steps=10,
                epsilon={"train": 1.234, "validation": 0.0},
            ),
            site("west", epsilon={"train": None, "validation": 0.0}),
        ]
    )
    north, south, west = (
        next(line for line in text.splitlines() if name in line)
        for name in ("north", "south", "west")
    )
    assert "encoding" in north
    assert "41 %" in north
    assert "step 3/10" in south
    assert "1.23" in south
    assert "∞" in west
    assert "training" in text
    assert "s so far" in text


def test_many_hospitals_fit_and_those_at_work_are_seen() -> None:
    status = [site(f"hospital-{n:02d}") for n in range(50)]
    status[40]["phase"] = "training"
    text = shown(status, height=24)
    assert len(text.splitlines()) < 24
    assert "hospital-40" in text
    assert "and 36 more" in text


def test_a_log_gets_lines_and_rounds_say_who_is_missing() -> None:
    console = Console(file=io.StringIO(), width=200)
    with Display(console, rounds=3) as display:
        display.heading("training")
        display.heading("training")
        display.sites([site("north", phase="training", step=1, steps=9), site("south")])
        display.sites([site("north", phase="training", step=2, steps=9)])  # too soon again
        display.line(
            {
                "kind": "train",
                "round": 2,
                "completed": 1,
                "seconds": 2.0,
                "sites": ["north"],
                "refused": {"south": "data-problem"},
                "lost": {},
                "epsilon": {"north": {"train": 0.5}},
            }
        )
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "training",
        "  north training step 1/9",
        "round 1/3: 1 sites, 2.0 s, ε 0.50; without south (data-problem)",
    ]

"""Reading a large chartevents: rows per second beside pandas, and peak memory at two sizes.

Writes MIMIC-IV trees with made-up chartevents (about a quarter of the rows canonical, 4,000 rows
per stay, gzip level 6 like the published files), imports them in fresh processes, and reads the
same file with `pandas.read_csv` in another. Every figure is of one process from start to end; ours
includes parsing times and numbers, units, staging, removing duplicates and writing the shard;
pandas only reads. Peak memory is the resident set that the kernel reports.

    python -m simulations.benchmarks.importing            # 5 and 20 million rows, about 4 minutes
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_ROWS_PER_STAY = 4000
_CANONICAL = (220045, 220179, 220180, 220181, 220210, 220277, 223900, 220739, 223901, 223761)
_OTHER = tuple(range(224700, 224730))
_CHUNK = 500_000

_IMPORT = """
import json, resource, sys, time
from pathlib import Path
from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options
began = time.perf_counter()
_, tally = import_mimic_iv(MimicSource(Path(sys.argv[1])), Path(sys.argv[2]), Options("bench"),
                           overwrite=True)
"""
_SCAN = """
import json, resource, sys, time
from pathlib import Path
from client.site.shard.importers.mimic import _values
from client.site.shard.importers.tally import Tally
import polars as pl
patients = pl.Series(range(10_000_000, 10_100_000), dtype=pl.Int64)
began = time.perf_counter()
file = Path(sys.argv[1]) / "icu" / "chartevents.csv.gz"
rows = sum(f.height for f in _values(file, "chart", patients, Tally(), lambda *_: None))
"""
_PANDAS = """
import json, resource, sys, time
from pathlib import Path
import pandas as pd
began = time.perf_counter()
frame = pd.read_csv(Path(sys.argv[1]) / "icu" / "chartevents.csv.gz")
"""
_END = """
print(json.dumps([time.perf_counter() - began,
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Sizes, in rows.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measures and prints a table; the last size is read with pandas too."""
    console = Console()
    sizes = sorted(rows or [5_000_000, 20_000_000])
    table = Table(title=f"chartevents, median of {repeats}", box=SIMPLE, title_justify="left")
    for name in ("rows", "what", "seconds", "rows/s", "peak MB", "× pandas"):
        table.add_column(name, justify="left" if name == "what" else "right")
    with tempfile.TemporaryDirectory() as base:
        for size in sizes:
            tree = Path(base) / str(size)
            with console.status(f"writing {size:,} rows"):
                write_tree(tree, size)
            programs = {"read, convert": _SCAN, "whole import": _IMPORT, "pandas.read_csv": _PANDAS}
            with console.status(f"reading {size:,} rows"):
                found: dict[str, list[list[float]]] = {name: [] for name in programs}
                for _ in range(repeats):  # in turn, so that a busy machine is fair to all
                    for name, program in programs.items():
                        found[name].append(_run(program, tree, Path(base) / "shard"))
            medians = {n: np.median(np.array(f), axis=0) for n, f in found.items()}
            pandas = medians["pandas.read_csv"][0]
            for name, (seconds, peak) in medians.items():
                ratio = f"{pandas / seconds:.1f}"
                table.add_row(
                    *(f"{size:,}", name, f"{seconds:.1f}", f"{size / seconds:,.0f}"),
                    *(f"{peak:,.0f}", ratio),
                )
    console.print(table)


def write_tree(root: Path, rows: int, seed: int = 0) -> None:
    """A MIMIC-IV tree whose chartevents has so many rows."""
    rng = np.random.default_rng(seed)
    stays = max(1, rows // _ROWS_PER_STAY)
    (root / "hosp").mkdir(parents=True)
    (root / "icu").mkdir()
    number = np.arange(stays)
    _write(
        root / "hosp" / "patients.csv.gz",
        "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
        (f"{10_000_000 + n},F,60,2180,2014 - 2016," for n in number),
    )
    _write(
        root / "hosp" / "admissions.csv.gz",
        "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,hospital_expire_flag",
        (
            f"{10_000_000 + n},{20_000_000 + n},2180-01-01 00:00:00,2180-01-09 00:00:00,,URGENT,0"
            for n in number
        ),
    )
    _write(
        root / "icu" / "icustays.csv.gz",
        "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
        (
            f"{10_000_000 + n},{20_000_000 + n},{30_000_000 + n},Unit (MICU),Unit (MICU),"
            "2180-01-01 00:00:00,2180-01-09 00:00:00,8"
            for n in number
        ),
    )
    header = (
        "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,"
        "valueuom,warning"
    )
    _write(root / "icu" / "chartevents.csv.gz", header, _chart_rows(rng, rows, stays))


def _chart_rows(rng: np.random.Generator, rows: int, stays: int) -> Any:
    """Rows stay after stay, as published; an eighth of them within the first day."""
    items = np.array([*_CANONICAL, *_OTHER])
    begin = np.datetime64("2180-01-01T00:00:00")
    for start in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - start)
        stay = np.minimum((start + np.arange(count)) // _ROWS_PER_STAY, stays - 1)
        minute = rng.integers(0, 8 * 1440, count) * 60
        later = minute + rng.integers(60, 3600, count)
        taken, stored = (
            np.datetime_as_string(begin + seconds.astype("timedelta64[s]"), unit="s")
            for seconds in (minute, later)
        )
        for n, t, s, item, value in zip(
            stay.tolist(),
            np.char.replace(taken, "T", " ").tolist(),
            np.char.replace(stored, "T", " ").tolist(),
            rng.choice(items, count).tolist(),
            rng.integers(30, 200, count).tolist(),
            strict=True,
        ):
            unit = "°F" if item == 223761 else ""
            yield (
                f"{10_000_000 + n},{20_000_000 + n},{30_000_000 + n},4711,{t},{s},{item},"
                f"{value},{value},{unit},0"
            )


def _write(path: Path, header: str, lines: Any) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        file.write(header + "\n")
        file.writelines(f"{line}\n" for line in lines)


def _run(program: str, tree: Path, dest: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", program + _END, str(tree), str(dest)],
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    typer.run(main)

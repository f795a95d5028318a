"""How a shard was made: the `import.json` that an importer leaves beside shard.toml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "import.json"


@dataclass(frozen=True)
class ImportedTable:
    """A table that an importer read; None where the file does not say."""

    table: str
    file: str
    rows: int | None
    kept: int | None
    skipped: Mapping[str, int]
    noted: Mapping[str, int]


@dataclass(frozen=True)
class History:
    """What the importer says of its work.

    Attributes:
        broken: Why the file could not be read; everything else is empty then.
    """

    source: str = ""
    created: str = ""
    software: str = ""
    options: Mapping[str, str] | None = None
    tables: tuple[ImportedTable, ...] = ()
    remarks: tuple[str, ...] = ()
    broken: str = ""


def history(folder: Path) -> History | None:
    """None where there is no such file. A broken file is told, not raised: it is only a remark."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return History(broken=f"{FILE} cannot be read ({type(error).__name__})")
    if not isinstance(content, dict):
        return History(broken=f"{FILE} is not an object")
    return History(
        source=str(content.get("source", "")),
        created=str(content.get("created", "")),
        software=str(content.get("software", "")),
        options={str(k): _words(v) for k, v in _object(content.get("options")).items()},
        tables=tuple(_table(t) for t in _list(content.get("tables")) if isinstance(t, dict)),
        remarks=tuple(str(remark) for remark in _list(content.get("remarks"))),
    )


def _table(entry: Mapping[str, Any]) -> ImportedTable:
    return ImportedTable(
        table=str(entry.get("table", "")),
        file=Path(str(entry.get("file", ""))).name,
        rows=_count(entry.get("rows")),
        kept=_count(entry.get("kept")),
        skipped=_counts(entry.get("skipped")),
        noted=_counts(entry.get("noted")),
    )


def _counts(value: Any) -> Mapping[str, int]:
    return {str(what): n for what, v in _object(value).items() if (n := _count(v)) is not None}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

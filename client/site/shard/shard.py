"""Opening, checking and writing a shard."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import polars as pl
import tomli_w

from client.site.shard import contract
from client.site.shard.images import decode_image
from common.errors import ShardError

META = "shard.toml"
HOSPITAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What may name a site."""


@dataclass(frozen=True)
class Shard:
    """One hospital's data, as the contract wants it.

    Attributes:
        path: The folder.
        hospital: Name of the site in a study.
        meta: Everything in shard.toml.
        records, events, images, notes, embeddings: The tables with the contract's columns and
            types, rows as on disk; None where the shard has no such table.
        tasks: Names of the labels (`y_<task>`), in the table's order.
    """

    path: Path
    hospital: str
    meta: Mapping[str, Any] = field(repr=False)
    records: pl.DataFrame = field(repr=False)
    events: pl.DataFrame | None = field(repr=False)
    images: pl.DataFrame | None = field(repr=False)
    notes: pl.DataFrame | None = field(repr=False)
    embeddings: pl.DataFrame | None = field(repr=False)
    tasks: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        """Reads a shard and checks all of it but the image files (see `check_images`).

        Raises:
            ShardError: The first break of the contract, with file, row and cure.
        """
        shard, problems = _read(Path(path))
        if problems:
            raise problems[0]
        assert shard is not None
        return shard

    @property
    def n_patients(self) -> int:
        return self.records["patient_id"].n_unique()

    def image_bytes(self, row: int) -> bytes:
        """Content of the image file of a row of `images`.

        Raises:
            ShardError: The file is missing or cannot be read.
        """
        assert self.images is not None
        name = self.images["path"][row]
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ShardError(
                f"{self.image_place(row)}: cannot read the file ({error.strerror})",
                cure="restore the file, or remove the row",
            ) from None

    def image_place(self, row: int) -> str:
        """How errors name an image: table, row and file."""
        assert self.images is not None
        return f"{self.path / 'images.parquet'}, row {row}, file '{self.images['path'][row]}'"

    def check_images(self) -> list[ShardError]:
        """Decodes every image file in full; returns one error per bad row."""
        if self.images is None:
            return []

        def problem(row: int) -> ShardError | None:
            try:
                decode_image(self.image_bytes(row), self.image_place(row))
            except ShardError as error:
                return error
            return None

        with ThreadPoolExecutor() as pool:
            return [p for p in pool.map(problem, range(self.images.height)) if p is not None]


def inspect(path: str | Path, *, images: bool = True) -> tuple[Shard | None, list[ShardError]]:
    """Every break of the contract in a shard, and the shard where it can be read at all.

    Args:
        images: Also decode all image files.
    """
    shard, problems = _read(Path(path))
    # A path that leads out of the shard is not followed.
    paths_hold = not any(str(Path(path) / "images.parquet") in str(p) for p in problems)
    if shard is not None and images and paths_hold:
        problems += shard.check_images()
    return shard, problems


def discover(folder: str | Path) -> list[Path]:
    """The shards of a folder: the folder itself if it is one, else its sub-folders, by name.

    Raises:
        ShardError: There is none.
    """
    folder = Path(folder)
    if (folder / META).is_file():
        return [folder]
    found = sorted(p.parent for p in folder.glob(f"*/{META}") if not p.parent.name.startswith("."))
    if not found:
        what = "no shard in it" if folder.is_dir() else "no such folder"
        raise ShardError(
            f"{folder}: {what}", cure=f"give a folder with {META}, or a folder of such folders"
        )
    return found


def write_shard(
    path: str | Path,
    *,
    meta: Mapping[str, Any],
    records: pl.DataFrame,
    events: pl.DataFrame | None = None,
    images: pl.DataFrame | None = None,
    notes: pl.DataFrame | None = None,
    embeddings: pl.DataFrame | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Shard:
    """Writes a shard at once: it is complete and valid under its name, or not there.

    Args:
        meta: Content of shard.toml; `name` and `hospital` at least.
        files: Image files by their path in the shard.
        overwrite: Replace a shard that already lies there.

    Raises:
        ShardError: The tables break the contract, or something lies at `path` already.
    """
    path = Path(path)
    bring_back(path)
    if path.exists() and not overwrite:
        raise ShardError(f"{path} exists already", cure="choose another folder, or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    making = place / path.name
    try:
        making.mkdir()
        (making / META).write_text(tomli_w.dumps(dict(meta)))
        tables = {
            "records": records,
            "events": events,
            "images": images,
            "notes": notes,
            "embeddings": embeddings,
        }
        for name, frame in tables.items():
            if frame is not None:
                frame.write_parquet(making / f"{name}.parquet")
        for name, data in (files or {}).items():
            (making / name).parent.mkdir(parents=True, exist_ok=True)
            (making / name).write_bytes(data)
        try:
            Shard.open(making)
        except ShardError as error:
            message = str(error).partition("\n  cure: ")[0].replace(str(making), str(path))
            raise ShardError(message, cure=error.cure) from None
        replace_folder(making, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Shard.open(path)


def replace_folder(made: Path, path: Path) -> None:
    """Moves a finished folder to its place. What lies there waits beside it, hidden, until the new
    one has arrived, and returns if it does not."""
    bring_back(path)
    try:
        if path.exists():
            path.rename(_aside(path))
        made.rename(path)
    finally:
        bring_back(path)


def bring_back(path: Path) -> None:
    """Ends a `replace_folder` that was cut off: the old folder returns, or goes if the new one has
    arrived."""
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.replaced"


def _read(path: Path) -> tuple[Shard | None, list[ShardError]]:
    meta, problems = _read_meta(path)
    tables: dict[str, pl.DataFrame | None] = {}
    stays: pl.Series | None = None
    for table in contract.TABLES:
        frame, found = _read_table(path, table, stays)
        tables[table] = frame
        problems += found
        if table == "records" and frame is not None and not frame.is_empty():
            stays = frame["stay_id"]
    records = tables.pop("records")
    if meta is None or records is None:
        return None, problems
    prefix = contract.LABEL_PREFIX
    tasks = tuple(c.removeprefix(prefix) for c in records.columns if c.startswith(prefix))
    shard = Shard(
        path=path, hospital=meta["hospital"], meta=meta, records=records, tasks=tasks, **tables
    )
    return shard, problems


def _read_meta(path: Path) -> tuple[dict[str, Any] | None, list[ShardError]]:
    file = path / META
    try:
        meta = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError:
        cure = "write name and hospital into it; see docs/shard.md"
        return None, [ShardError(f"{file} is missing", cure=cure)]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return None, [ShardError(f"{file} is not valid TOML: {error}", cure="mend the line")]
    for key in ("name", "hospital"):
        if not isinstance(meta.get(key), str) or not meta[key]:
            return None, [ShardError(f"{file}: no '{key}'", cure=f'add {key} = "…"')]
    if not HOSPITAL.fullmatch(meta["hospital"]):
        return None, [
            ShardError(
                f"{file}: hospital '{meta['hospital']}' cannot name a site",
                cure="use up to 64 letters, digits and _ . - and begin with a letter or digit",
            )
        ]
    return meta, []


def _read_table(
    path: Path, table: str, stays: pl.Series | None
) -> tuple[pl.DataFrame | None, list[ShardError]]:
    """A normalised table and what is wrong with it; without `stays`, inputs are not checked."""
    file = path / f"{table}.parquet"
    if not file.is_file():
        if table != "records":
            return None, []
        return None, [ShardError(f"{file} is missing", cure="a shard has at least this table")]
    try:
        # Only the contract's columns are read: a shard may carry others, however large.
        names = pl.read_parquet_schema(file)
        wanted = {c.name for c in contract.TABLES[table]} | {"population"}
        frame = pl.read_parquet(
            file,
            columns=[n for n in names if n in wanted or n.startswith(contract.LABEL_PREFIX)],
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        message = f"{file} is not a readable parquet table ({str(error).splitlines()[0]})"
        return None, [ShardError(message, cure="export it again")]
    problems = list(contract.check_form(table, frame, str(file)))
    if problems:
        return None, problems
    frame = contract.normalise(table, frame)
    return frame, list(_check(table, frame, stays, str(file)))


def _check(
    table: str, frame: pl.DataFrame, stays: pl.Series | None, file: str
) -> Iterator[ShardError]:
    if table == "records":
        yield from contract.check_records(frame, file)
    elif stays is not None:
        yield from contract.check_inputs(table, frame, stays, file)

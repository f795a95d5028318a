"""Reading a hospital's CSV exports block by block: bounded memory, every row accounted for.

A reader thread unpacks (isal: about a gigabyte per second) while polars parses the block before,
only the columns asked for, and with the filter pushed into the parser. Blocks are cut at the end of
a row, which is a line break outside quotes. The parser would pad rows that are too short and shift
cells of those that are too long; so each block's commas and line breaks are compared with the
header's first, and only a block of another shape is read row by row.
"""

from __future__ import annotations

import contextlib
import csv
import io
import queue
import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from gzip import BadGzipFile
from pathlib import Path
from typing import IO, Any

import polars as pl
from isal import igzip, isal_zlib

from client.site.shard.importers.tally import Tally
from common.errors import ShardError

Progress = Callable[[str, int, int], None]
"""Told the name of a table, and how many bytes of its file of how many are read."""

_BLOCK_BYTES = 1 << 24
_LONGEST_ROW_BYTES = 1 << 26
_BLOCKS_AHEAD = 1
_TIME, _DATE = "%Y-%m-%d %H:%M:%S", "%Y-%m-%d"
_TO_LAST_SECOND = timedelta(days=1, seconds=-1)
_BOM = b"\xef\xbb\xbf"
_CONTENT = bytes(set(range(256)) - set(b',"\n'))
_QUOTED = re.compile(rb'"[^"]*"')


def find_table(folder: Path, name: str) -> Path | None:
    """File of a table: `<name>.csv.gz`, else `<name>.csv`; None where neither is there."""
    files = (folder / f"{name}{suffix}" for suffix in (".csv.gz", ".csv"))
    return next((file for file in files if file.is_file()), None)


def require_table(folder: Path, name: str) -> Path:
    """The same for a table without which there is no import.

    Raises:
        ShardError: It is not there.
    """
    if file := find_table(folder, name):
        return file
    raise ShardError(
        f"{folder / name}.csv.gz is missing", cure="download the table, or mend the path"
    )


def read_whole(file: Path, table: str, columns: Sequence[str], tally: Tally) -> pl.DataFrame:
    """All rows of a small table; every column as text, empty cells null."""
    frames = list(scan(file, table, columns, tally))
    return pl.concat(frames) if frames else pl.DataFrame(schema=dict.fromkeys(columns, pl.String))


def scan(
    file: Path,
    table: str,
    columns: Sequence[str],
    tally: Tally,
    *,
    only: tuple[str, pl.Expr] | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[pl.DataFrame]:
    """Blocks of a table: the columns asked for as text, empty cells null.

    Args:
        table: Under which rows are counted in `tally`.
        columns: Must be in the header, in whatever order.
        only: Reason under which other rows are counted, and which rows are wanted. It is applied
            while parsing, so that unwanted rows cost almost nothing.

    Raises:
        ShardError: The file is cut off or damaged, is not UTF-8, has another delimiter, lacks a
            column, or opens a quote that it never closes.
    """
    counts = tally[table]
    counts.file = file.name
    progress(table, 0, file.stat().st_size)
    with _Blocks(file, columns) as blocks:
        for block, read in blocks:
            reason, wanted = only or ("", pl.lit(True))
            frame, rows, ragged = _parse(block, file, columns, wanted)
            counts.rows += rows
            tally.skip(table, "another number of cells than the header", ragged)
            tally.skip(table, reason, rows - ragged - frame.height)
            progress(table, read, file.stat().st_size)
            if frame.height:
                yield frame
    progress(table, file.stat().st_size, file.stat().st_size)


def parse_times(
    frame: pl.DataFrame, *columns: str, available: Collection[str] = ()
) -> pl.DataFrame:
    """Text columns as times: `2180-05-06 22:23:00`, with fractions, or a date alone; else null.

    A date alone is its midnight, but in those of the columns that say when something was
    `available` the last second of the day: at midnight it would be seen before it was there.

    The new column `garbled` says where a cell holds something that is none of these, and `dated`
    where one of `available` holds a date alone.
    """
    garbled = dated = pl.repeat(False, frame.height, dtype=pl.Boolean, eager=True)
    for name in columns:
        text = frame[name]
        times = text.str.to_datetime(_TIME, time_unit="us", strict=False)
        if times.null_count() > text.null_count():  # the other forms are rare, and slow to parse
            clean = text.str.strip_chars()
            for form in (f"{_TIME}%.f", _DATE):
                other = clean.str.to_datetime(form, time_unit="us", strict=False)
                if form == _DATE and name in available:
                    other += _TO_LAST_SECOND
                    dated = dated | other.is_not_null()
                times = times.zip_with(times.is_not_null(), other)
            garbled = garbled | (times.is_null() & (clean != "").fill_null(False))
        frame = frame.with_columns(times.alias(name))
    return frame.with_columns(garbled=garbled, dated=dated)


def parse_id(column: str) -> pl.Expr:
    """A whole number, also one that was written as a float; else null."""
    text = pl.col(column).str.strip_chars().str.strip_suffix(".0")
    return text.cast(pl.Int64, strict=False)


def parse_number(column: str) -> pl.Expr:
    """A finite number; else null."""
    number = pl.col(column).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


class _Blocks:
    """Header and whole rows of a file, with the bytes of the file read so far."""

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self._file, self._columns = file, columns
        self._queue: queue.Queue[Any] = queue.Queue(_BLOCKS_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[tuple[bytes, int]]:
        self._thread.start()
        return self._blocks()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _blocks(self) -> Iterator[tuple[bytes, int]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            with self._file.open("rb") as raw:
                for block in self._read(raw):
                    self._put((block, raw.tell()))
            self._put(None)
        except (EOFError, BadGzipFile, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]
            self._put(
                ShardError(
                    f"{self._file} is cut off or damaged ({error})",
                    cure="copy or download it again, and compare its checksum",
                )
            )
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.05)
                return

    def _read(self, raw: IO[bytes]) -> Iterator[bytes]:
        stream: Any = igzip.IGzipFile(fileobj=raw) if self._file.suffix == ".gz" else raw
        header = stream.readline().removeprefix(_BOM)
        self._check_header(header)
        if not header.endswith(b"\n"):
            header += b"\n"
        rest = b""
        while piece := stream.read(_BLOCK_BYTES):
            end = _end_of_rows(piece, rest.count(b'"'))
            if end:
                view = memoryview(piece)
                yield b"".join((header, rest, view[:end]))
                rest = bytes(view[end:])
                continue
            rest += piece
            if len(rest) > _LONGEST_ROW_BYTES:
                raise ShardError(
                    f"{self._file}: a quote is opened and not closed within "
                    f"{_LONGEST_ROW_BYTES >> 20} MB",
                    cure="mend the quoting: a quote inside a quoted cell is written twice",
                )
        if rest:
            if rest.count(b'"') % 2:
                raise ShardError(
                    f"{self._file} ends inside a quoted cell", cure="copy or download it again"
                )
            yield header + rest + (b"" if rest.endswith(b"\n") else b"\n")

    def _check_header(self, header: bytes) -> None:
        try:
            names = next(csv.reader([header.decode().strip()]), [])
        except (UnicodeDecodeError, csv.Error):
            names = []
        missing = [name for name in self._columns if name not in names]
        if not missing:
            return
        if not header:
            raise ShardError(f"{self._file} is empty", cure="download or export it again")
        other = next((d for d in (";", "\t", "|") if len(names) < 2 and d in "".join(names)), None)
        if other:
            raise ShardError(
                f"{self._file}: cells are separated by {other!r}", cure="export it with commas"
            )
        raise ShardError(
            f"{self._file}: no column {', '.join(repr(m) for m in missing)}; the header is "
            f"{', '.join(names)[:300] or 'not readable'}",
            cure="give the table as it is published, with its header",
        )


def _end_of_rows(text: bytes, quotes_before: int) -> int:
    """Where the last whole row ends: after the last line break with closed quotes before it."""
    end = text.rfind(b"\n") + 1
    quotes = quotes_before + (text.count(b'"', 0, end) if b'"' in text else 0)
    while end and quotes % 2:
        before = text.rfind(b"\n", 0, end - 1) + 1
        quotes -= text.count(b'"', before, end)
        end = before
    return end


def _parse(
    block: bytes, file: Path, columns: Sequence[str], wanted: pl.Expr
) -> tuple[pl.DataFrame, int, int]:
    """Wanted rows, the number of all rows, and of those that are left out as ragged."""
    rows = _rows_of_table(block)
    if rows is not None:
        table = pl.scan_csv(io.BytesIO(block), infer_schema=False, null_values="")
        with contextlib.suppress(pl.exceptions.PolarsError):  # a stray quote, or not UTF-8
            return table.select(columns).filter(wanted).collect(), rows, 0
    whole, ragged = _read_by_row(block, file, columns)
    return whole.filter(wanted), whole.height + ragged, ragged


def _rows_of_table(block: bytes) -> int | None:
    """Rows below the header; None if one has another number of cells, or is blank."""
    shape = block.translate(None, _CONTENT)
    if b'"' in shape:
        shape = _QUOTED.sub(b"", shape)
    line = shape[: shape.index(b"\n") + 1]
    rows = len(shape) // len(line)
    return rows - 1 if shape == line * rows else None


def _read_by_row(block: bytes, file: Path, columns: Sequence[str]) -> tuple[pl.DataFrame, int]:
    """Rows with as many cells as the header, and the number of others; blank lines are no rows."""
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{file} is not UTF-8 (byte 0x{block[error.start]:02x})",
            cure="convert it, for example with iconv -f latin1 -t utf-8",
        ) from None
    csv.field_size_limit(2 * _LONGEST_ROW_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader)
    rows = [row for row in reader if row]
    good = [row for row in rows if len(row) == len(header)]
    cells = {name: [row[header.index(name)] or None for row in good] for name in columns}
    return pl.DataFrame(cells, schema=dict.fromkeys(columns, pl.String)), len(rows) - len(good)

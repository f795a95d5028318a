"""The map: which codes of a MEDS data set are stays, patients, records and canonical series.

MEDS fixes the columns of a data set and leaves its codes to whoever made it. The map is a TOML file
that names them by **patterns**. A pattern is a whole code in which ``*`` stands for any text, also
none; every other character stands for itself. Where a value's unit or a care unit is part of the
code, ``{unit}`` stands for it and captures it::

    [stays]
    begin = "HOSPITAL_ADMISSION//*"
    end = "HOSPITAL_DISCHARGE//*"
    died = "HOSPITAL_DISCHARGE//DIED"
    unit = "ICU_ADMISSION//{unit}"

    [series.lab]
    glucose = ["LAB//50931//{unit}", {code = "LAB//GLU", unit = "mmol/L"}]

Wherever patterns stand, one may stand alone or several in a list.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import meds
import polars as pl
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from client.site.shard.clinical import SERIES, Source
from client.site.shard.importers.tally import Tally
from client.site.shard.importers.timeline import DEFAULT_HOUR, OUTCOME_TASKS
from client.site.shard.importers.units import canonical_unit, conversion
from common.errors import ShardError
from common.study import Key, unknown

CAPTURE = "{unit}"
_KINDS_SHOWN = 30
AMONG = {"stays.died": "stays.end", "stays.planned": "stays.begin"}
"""Keys that single out some of another key's codes."""
_NONE = pl.DataFrame(schema={"key": pl.String, "code": pl.String, "unit": pl.String})
_SPECIAL = re.compile(r"(\*|\{unit\})")


def matches(pattern: str, codes: pl.Series) -> pl.DataFrame:
    """Columns code and unit: the codes that a pattern matches, and what `{unit}` stands for in them
    (null without)."""
    parts = _SPECIAL.split(pattern)
    special = {"*": ".*", CAPTURE: "(.*)"}
    regex = "(?s)^" + "".join(special.get(part) or pl.escape_regex(part) for part in parts) + "$"
    found = pl.DataFrame({"code": codes}).filter(pl.col("code").str.contains(regex))
    unit = pl.col("code").str.extract(regex) if CAPTURE in pattern else pl.lit(None, pl.String)
    return found.with_columns(unit=unit)


def _one_capture(pattern: str) -> str:
    if not pattern:
        raise ValueError("an empty pattern matches nothing")
    if pattern.count(CAPTURE) > 1:
        raise ValueError(f"'{pattern}' captures {CAPTURE} more than once")
    return pattern


def _no_capture(pattern: str) -> str:
    if CAPTURE in pattern:
        raise ValueError(f"'{pattern}': {CAPTURE} means nothing here; write * for any text")
    return _one_capture(pattern)


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str | dict) else given


class Part(BaseModel):
    """A section of the map; an unknown key is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(str(unknown("key", key, cls.model_fields)))
        return given


class SeriesPattern(Part):
    """Codes of one series in one unit; a pattern alone stands for `code`.

    Attributes:
        code: Pattern; may capture `{unit}`.
        unit: The values' unit where the code tells none (`UNK` and the like are none). Without
            either a value is taken to be in the canonical unit.
    """

    code: Annotated[str, AfterValidator(_one_capture)]
    unit: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"code": given} if isinstance(given, str) else given


Codes = Annotated[tuple[Annotated[str, AfterValidator(_no_capture)], ...], BeforeValidator(_listed)]
UnitCodes = Annotated[
    tuple[Annotated[str, AfterValidator(_one_capture)], ...], BeforeValidator(_listed)
]
SeriesCodes = Annotated[tuple[SeriesPattern, ...], BeforeValidator(_listed), Field(min_length=1)]


class Dataset(Part):
    """What shard.toml says of the origin; what is left out is read from metadata/dataset.json."""

    dataset: str | None = None
    licence: str | None = None
    attribution: str | None = None


class Stays(Part):
    """A stay runs from a code of `begin` to the code of `end` that follows it.

    Attributes:
        begin, end: Admission and discharge.
        died: Those of `end` that mean death. Without any, a patient died in a stay if the time of
            death lies in it.
        unit: Entries to care units. Where given, only stays with one are imported, and the first
            one, by its `{unit}`, is the stay's care unit.
        planned: Those of `begin` that are no unplanned readmission.
    """

    begin: Annotated[Codes, Field(min_length=1)]
    end: Annotated[Codes, Field(min_length=1)]
    died: Codes = ()
    unit: UnitCodes = ()
    planned: Codes = ()


class Patient(Part):
    """Birth and death have a time, sex need not; the first two default to MEDS' own codes."""

    birth: Codes = (meds.birth_code,)
    death: Codes = (meds.death_code,)
    male: Codes = ()
    female: Codes = ()


class Records(Part):
    """When a stay's records are.

    Attributes:
        hour: One record per stay, so many hours after its begin.
        at: Instead, one record at the time of each of these events.
    """

    hour: float = Field(default=DEFAULT_HOUR, gt=0)
    at: Codes = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> Records:
        if self.at and "hour" in self.model_fields_set:
            raise ValueError("give hour or at, not both")
        return self


class Task(Part):
    """A label of the data set's own: true if one of these events follows the record, after it and
    up to `within_hours` later, in whatever stay; else false."""

    codes: Annotated[Codes, Field(min_length=1)]
    within_hours: float = Field(gt=0)


class MedsMap(Part):
    """The whole map.

    Attributes:
        series: Source (`chart`, `lab`, `procedure`), canonical name, patterns. A procedure is 1 at
            the time of each event, so name its start, whose time is when it becomes known.
        notes: Category, patterns; the text is `text_value`.
        tasks: Labels beside the five outcomes that every import has.
    """

    dataset: Dataset = Dataset()
    stays: Stays
    patient: Patient = Patient()
    records: Records = Records()
    series: dict[str, dict[str, SeriesCodes]] = {}
    notes: dict[str, Codes] = {}
    tasks: dict[Key, Task] = {}

    @field_validator("series")
    @classmethod
    def _canonical(
        cls, series: dict[str, dict[str, tuple[SeriesPattern, ...]]]
    ) -> dict[str, dict[str, tuple[SeriesPattern, ...]]]:
        for source, names in series.items():
            if source not in get_args(Source):
                raise ValueError(str(unknown("source", source, get_args(Source))))
            known = [name for kind, name in SERIES if kind == source]
            for name, patterns in names.items():
                if name not in known:
                    raise ValueError(str(unknown(f"{source} series", name, known)))
                for pattern in patterns:
                    _check_unit(source, name, pattern)
        return series

    @field_validator("tasks")
    @classmethod
    def _own_tasks(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        for name in tasks:
            if name in OUTCOME_TASKS:
                raise ValueError(f"'{name}' is a label that every import has; choose another name")
        return tasks

    @property
    def facts(self) -> Mapping[str, tuple[str, ...]]:
        """Patterns of all that makes stays, patients, records and own tasks, by `section.key`."""
        sections = {"stays": self.stays, "patient": self.patient}
        return {
            **{f"{name}.{key}": codes for name, part in sections.items() for key, codes in part},
            "records.at": self.records.at,
            **{f"tasks.{name}": task.codes for name, task in self.tasks.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> MedsMap:
        """Reads a TOML file, or a ready map by its name (`mimic-iv-meds`).

        Raises:
            ShardError: One message naming every wrong key.
        """
        ready = {
            item.name.removesuffix(".toml"): item
            for item in resources.files(__package__).iterdir()
            if item.name.endswith(".toml")
        }
        file = Path(path)
        if str(path) not in ready and not file.is_file():
            raise ShardError(
                f"no map at {path}",
                cure=f"give a TOML file or one of: {', '.join(sorted(ready))}",
            )
        try:
            text = (ready.get(str(path)) or file).read_text(encoding="utf-8")
            return cls.model_validate(tomllib.loads(text))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ShardError(
                f"{path} cannot be read as TOML ({error})", cure="see docs/import.md"
            ) from None
        except ValidationError as error:
            problems = [
                ": ".join(filter(None, (".".join(map(str, item["loc"])), _message(item["msg"]))))
                for item in error.errors(include_url=False)
            ]
            raise ShardError(f"{path}: {'; '.join(problems)}", cure="see docs/import.md") from None


def _check_unit(source: str, series: str, pattern: SeriesPattern) -> None:
    if source == "procedure" and (CAPTURE in pattern.code or pattern.unit is not None):
        raise ValueError(f"procedure {series}: it is done or not, and has no unit")
    if conversion(source, series, pattern.unit) is None:
        raise ValueError(
            f"{source} {series}: '{pattern.unit}' is no unit that can be turned into "
            f"{SERIES[source, series].unit}"
        )


def _message(text: str) -> str:
    return text.removeprefix("Value error, ")


# -- the map and the codes of a data set --------------------------------------------------------


@dataclass(frozen=True)
class NamedCodes:
    """The codes of a data set that a map names; one row per code and use.

    Attributes:
        facts: Columns key (`stays.begin`, `tasks.<name>`, …), code, unit (what `{unit}` captured).
        series: Columns code, source, series, unit (captured or given, else null).
        notes: Columns code, category.
    """

    facts: pl.DataFrame
    series: pl.DataFrame
    notes: pl.DataFrame

    def of(self, key: str) -> pl.Series:
        """The codes that make a kind of facts."""
        return self.facts.filter(pl.col("key") == key)["code"]

    @property
    def inputs(self) -> pl.Series:
        return pl.concat([self.series["code"], self.notes["code"]]).unique()


def find_codes(mapped: MedsMap, vocabulary: pl.DataFrame, tally: Tally) -> NamedCodes:
    """Settles which codes the patterns match; a pattern that matches none becomes a remark.

    Args:
        vocabulary: Columns code and rows: all that the data set holds.

    Raises:
        ShardError: No code begins or no code ends a stay, or one code is two things.
    """
    every = vocabulary["code"].drop_nulls().sort()

    def find(key: str, pattern: str, among: pl.Series) -> pl.DataFrame:
        found = matches(pattern, among)
        if found.is_empty():
            tally.remarks.append(f"{key}: '{pattern}' matches no code")
        return found.select(pl.lit(key).alias("key"), "code", "unit")

    facts: dict[str, pl.DataFrame] = {}
    for key, patterns in mapped.facts.items():
        among = facts[AMONG[key]]["code"] if key in AMONG else every
        facts[key] = _union(find(key, pattern, among) for pattern in patterns)
        if key in ("stays.begin", "stays.end") and facts[key].is_empty():
            raise ShardError(
                f"no code of the data set matches {key} of the map ({', '.join(patterns)})",
                cure=f"name its codes; the commonest of each kind: {_commonest(vocabulary)}",
            )
    series = [_NONE.select("code", source="key", series="key", unit="unit")]
    for source, names in mapped.series.items():
        for name, given in names.items():
            frames = []
            for pattern in given:
                found = find(f"series.{source}.{name}", pattern.code, every)
                told = [unit if canonical_unit(unit) else pattern.unit for unit in found["unit"]]
                frames.append(found.with_columns(unit=pl.Series(told, dtype=pl.String)))
            names_of = {"source": pl.lit(source), "series": pl.lit(name)}
            series.append(_union(frames).select("code", **names_of, unit="unit"))
    notes = [_NONE.select("code", category="key")]
    for category, patterns in mapped.notes.items():
        frames = [find(f"notes.{category}", pattern, every) for pattern in patterns]
        notes.append(_union(frames).select("code", category=pl.lit(category)))
    return NamedCodes(
        facts=pl.concat(facts.values()),
        series=_one_use(pl.concat(series), "{source} {series}"),
        notes=_one_use(pl.concat(notes), "notes {category}"),
    )


def _union(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Each code once, as the first of the patterns that match it reads it."""
    return pl.concat([_NONE, *frames]).unique("code", keep="first", maintain_order=True)


def _one_use(frame: pl.DataFrame, words: str) -> pl.DataFrame:
    twice = frame.filter(pl.col("code").is_duplicated()).sort("code", maintain_order=True)
    if twice.height:
        first, second = (words.format(**row) for row in twice.head(2).iter_rows(named=True))
        raise ShardError(
            f"code '{twice['code'][0]}' is {first} and {second} in the map",
            cure="make the patterns narrower: a code is read as one thing",
        )
    return frame


def _commonest(vocabulary: pl.DataFrame) -> str:
    """The commonest code of each kind (what stands before `//`), and the rows of the kind."""
    kinds = (
        vocabulary.drop_nulls()
        .sort("rows", "code", descending=[True, False])
        .group_by(pl.col("code").str.split("//").list.first().alias("kind"), maintain_order=True)
        .agg(pl.col("code").first(), pl.col("rows").sum())
        .sort("rows", descending=True, maintain_order=True)
        .head(_KINDS_SHOWN)
    )
    return ", ".join(f"{code} ({rows:,})" for _, code, rows in kinds.iter_rows())

"""What a shard holds, in numbers: pure functions from tables to dataclasses.

No identifier, no text and no file name stands in any of them. Shares are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from client.site.shard.clinical import SERIES, SeriesSpec
from client.site.shard.contract import EVENT_SOURCES
from client.site.shard.report.inputs import SOURCES, Inputs
from client.site.shard.report.units import UnitHint, unit_hint
from client.site.shard.shard import Shard

FEW_POSITIVES = 10
"""Patients with a positive label below which a task can hardly be learnt or measured."""
OUTSIDE = 0.02
"""Share of values outside plausible limits from which a series is flagged."""

_ABOUT = ("name", "hospital", "dataset", "description", "licence", "attribution")


@dataclass(frozen=True)
class Histogram:
    """Counts `[n]` between edges `[n + 1]`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """Quantiles of a quantity."""

    n: int
    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The shard at a glance.

    Attributes:
        about: The text keys of its shard.toml; `notes` apart.
        rows: Rows per table that it has.
        per_patient: Records per patient, and how many patients have so many.
        per_stay: The same for stays.
        cutoffs: Hours, over records.
        ages: Years, over patients (the first known age); None if no age is known.
        age_unknown, sexes: Patients.
        largest_patient: Share of all records that belong to the patient with the most.
        populations: Records per population, if the shard says.
    """

    about: Mapping[str, str]
    notes: tuple[str, ...]
    patients: int
    stays: int
    records: int
    rows: Mapping[str, int]
    per_patient: Mapping[int, int]
    per_stay: Mapping[int, int]
    cutoffs: Spread
    cutoff_histogram: Histogram
    ages: Spread | None
    age_histogram: Mapping[str, Histogram]
    age_unknown: int
    sexes: Mapping[str, int]
    largest_patient: float
    populations: Mapping[str, int]


@dataclass(frozen=True)
class Task:
    """A label: records that are true, false, unknown; patients with a true and with a false one."""

    name: str
    true: int
    false: int
    unknown: int
    patients_true: int
    patients_false: int

    @property
    def known(self) -> int:
        return self.true + self.false

    @property
    def prevalence(self) -> float | None:
        return self.true / self.known if self.known else None


@dataclass(frozen=True)
class Source:
    """One source of inputs.

    Attributes:
        inputs: Rows that may be read.
        skipped: Events without a finite value.
        never: Inputs after the last cutoff of their stay.
        at_cutoff: Records with an input at exactly their cutoff.
        seeing: Records that see at least one input.
        hours: When inputs became available, in hours from the last cutoff of their stay: negative
            is before. The outermost bins hold all beyond.
    """

    name: str
    inputs: int
    skipped: int
    never: int
    at_cutoff: int
    seeing: int
    hours: Histogram


@dataclass(frozen=True)
class Item:
    """How many records see one stream of inputs, by label.

    Attributes:
        share: Of all records.
        by_label: For (task, label): share of the records with that label; None where there are
            fewer than 5.
    """

    source: str
    name: str
    canonical: bool
    share: float
    by_label: Mapping[tuple[str, bool], float | None]


@dataclass(frozen=True)
class Range:
    """Values of one series that has a unit.

    Attributes:
        values: Over all inputs; low and high are the 1st and 99th percentiles.
        records: Records that see it.
        outside: Share of values outside the plausible limits of the public clinical constants.
        constant: Whether all values are the same.
    """

    spec: SeriesSpec
    values: Spread
    records: int
    outside: float
    constant: bool
    hint: UnitHint | None


@dataclass(frozen=True)
class Missingness:
    """What records do and do not see.

    Attributes:
        records: All.
        without_input: Records that see nothing at all but age and sex.
        n_seen: Inputs per record.
    """

    records: int
    without_input: int
    n_seen: Spread
    sources: tuple[Source, ...]
    items: tuple[Item, ...]


def summary(shard: Shard, inputs: Inputs) -> Summary:
    records = inputs.records
    told = shard.meta.get("notes", [])
    people = records.group_by("patient").agg(
        pl.len().alias("n"),
        pl.col("age").drop_nulls().first(),
        pl.col("sex").drop_nulls().first(),
    )
    sex = pl.col("sex").replace_strict({"F": "female", "M": "male"}, default="unknown")
    people = people.with_columns(sex.fill_null("unknown"))
    ages = people["age"].drop_nulls()
    tables = {name: getattr(shard, name) for name in ("events", "images", "notes", "embeddings")}
    populations = shard.records.get_column("population", default=None)
    return Summary(
        about={key: str(shard.meta[key]) for key in _ABOUT if key in shard.meta},
        notes=tuple(map(str, told if isinstance(told, list) else [told])),
        patients=people.height,
        stays=records["stay"].n_unique(),
        records=records.height,
        rows={name: frame.height for name, frame in tables.items() if frame is not None},
        per_patient=_tally(people["n"]),
        per_stay=_tally(records.group_by("stay").len()["len"]),
        cutoffs=spread(records["cutoff"], 0.0, 1.0),
        cutoff_histogram=histogram(records["cutoff"], 24),
        ages=spread(ages, 0.0, 1.0) if len(ages) else None,
        age_histogram={
            name: histogram(people.filter(pl.col("sex") == name)["age"], edges=range(0, 135, 5))
            for name in ("female", "male", "unknown")
            if (people["sex"] == name).any()
        },
        age_unknown=people["age"].null_count(),
        sexes={name: int((people["sex"] == name).sum()) for name in ("female", "male", "unknown")},
        largest_patient=float(people["n"].to_numpy().max()) / records.height,
        populations={} if populations is None else dict(populations.value_counts().iter_rows()),
    )


def tasks(inputs: Inputs) -> tuple[Task, ...]:
    found = []
    for name in inputs.tasks:
        known = inputs.known(name)
        true, false = known.filter("label"), known.filter(~pl.col("label"))
        found.append(
            Task(
                name=name,
                true=true.height,
                false=false.height,
                unknown=inputs.records.height - known.height,
                patients_true=true["patient"].n_unique(),
                patients_false=false["patient"].n_unique(),
            )
        )
    return tuple(found)


def missingness(inputs: Inputs) -> Missingness:
    table = inputs.table.join(inputs.items, on="item")
    cutoffs = inputs.records.select("stay", "cutoff").unique()
    exactly = cutoffs.join(
        table.select("stay", "hours", "source").unique(),
        left_on=["stay", "cutoff"],
        right_on=["stay", "hours"],
    )
    at_cutoff = dict(
        inputs.records.join(exactly, on=["stay", "cutoff"])
        .group_by("source")
        .agg(pl.col("record").n_unique())
        .iter_rows()
    )
    late = table.join(inputs.last_cutoff, on="stay").select(
        "source", lag=pl.col("hours") - pl.col("cutoff")
    )
    seeing = dict(
        inputs.seen.join(inputs.items, on="item")
        .group_by("source")
        .agg(pl.col("record").n_unique())
        .iter_rows()
    )
    edges = _time_edges(late["lag"])
    sources = []
    for name in SOURCES:
        lags = late.filter(pl.col("source") == name)["lag"]
        skipped = inputs.skipped.get(name, 0)
        if len(lags) or skipped:
            sources.append(
                Source(
                    name=name,
                    inputs=len(lags),
                    skipped=skipped,
                    never=int((lags > 0).sum()),
                    at_cutoff=at_cutoff.get(name, 0),
                    seeing=seeing.get(name, 0),
                    hours=_at_or_before(lags.clip(edges[0], edges[-1]), edges),
                )
            )
    return Missingness(
        records=inputs.records.height,
        without_input=int((inputs.n_seen == 0).sum()),
        n_seen=spread(inputs.n_seen, 0.0, 1.0),
        sources=tuple(sources),
        items=tuple(_items(inputs)),
    )


def _items(inputs: Inputs) -> list[Item]:
    counts = dict(inputs.seen["item"].value_counts().iter_rows())
    shares: dict[tuple[str, bool], dict[int, float] | None] = {}
    for task in inputs.tasks:
        known = inputs.known(task)
        for label in (True, False):
            group = known.filter(pl.col("label") == label)
            seen = inputs.seen.join(group, on="record", how="semi")["item"].value_counts()
            shares[task, label] = (
                {item: n / group.height for item, n in seen.iter_rows()}
                if group.height >= 5
                else None
            )
    return [
        Item(
            source=source,
            name=name,
            canonical=source not in EVENT_SOURCES or (source, name) in SERIES,
            share=counts.get(item, 0) / inputs.records.height,
            by_label={key: None if s is None else s.get(item, 0.0) for key, s in shares.items()},
        )
        for item, source, name in inputs.items.iter_rows()
    ]


def ranges(inputs: Inputs) -> tuple[Range, ...]:
    """Every canonical chart and lab series that has a value, in the page's order."""
    values = inputs.table.select("item", "value").partition_by("item", as_dict=True)
    records = dict(inputs.seen["item"].value_counts().iter_rows())
    found = []
    for item, source, name in inputs.items.iter_rows():
        spec = SERIES.get((source, name))
        if spec is None or source == "procedure":
            continue
        series = values[(item,)]["value"]
        outside = (series < spec.low) | (series > spec.high)
        found.append(
            Range(
                spec=spec,
                values=spread(series, 0.01, 0.99),
                records=records.get(item, 0),
                outside=float(outside.mean()),  # type: ignore[arg-type]
                constant=series.n_unique() == 1,
                hint=unit_hint(spec, series),
            )
        )
    return tuple(found)


def spread(values: pl.Series, low: float, high: float) -> Spread:
    """Quantiles of at least one number; `low` and `high` say which are the outer two."""
    numbers = values.cast(pl.Float64).to_numpy()
    outer = np.quantile(numbers, [low, 0.25, 0.5, 0.75, high])
    return Spread(len(numbers), *(float(q) for q in outer))


def histogram(
    values: pl.Series, bins: int = 20, edges: range | np.ndarray | None = None
) -> Histogram:
    """Numbers that are not null, counted in bins: equally wide ones unless `edges` says."""
    numbers = values.drop_nulls().cast(pl.Float64).to_numpy()
    counts, cuts = np.histogram(numbers, bins=bins if edges is None else np.asarray(edges))
    return Histogram(tuple(float(c) for c in cuts), tuple(int(c) for c in counts))


def _at_or_before(lags: pl.Series, edges: np.ndarray) -> Histogram:
    """Bins that hold their right edge: an input at exactly the cutoff belongs before it."""
    turned = histogram(-lags, edges=-edges[::-1])
    return Histogram(tuple(edges.tolist()), turned.counts[::-1])


def _time_edges(lags: pl.Series) -> np.ndarray:
    """Forty bins with an edge at 0, wide enough for 98 % of the inputs."""
    if lags.is_empty():
        return np.linspace(-1, 1, 3)
    low, high = min(lags.quantile(0.01) or 0.0, -1.0), max(lags.quantile(0.99) or 0.0, 0.0)
    width = _round_up((high - low) / 40)
    return width * np.arange(math.floor(low / width), math.ceil(high / width) + 2)


def _round_up(width: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    ten = 10.0 ** math.floor(math.log10(width))
    return next(ten * step for step in (1, 2, 5, 10) if ten * step >= width * 0.999)


def _tally(counts: pl.Series) -> dict[int, int]:
    return {int(value): int(n) for value, n in counts.value_counts().sort(counts.name).iter_rows()}

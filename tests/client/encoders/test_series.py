"""Statistics against a slow transcription, and what a vector may depend on."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.signal import find_peaks

from client.site.encoders import series
from client.site.shard import clinical
from common.errors import EncoderError

LABS = ["creatinine", "sodium", "lactate"]


def transcribed(values: list[float]) -> list[float]:
    """The eleven statistics of one series, one line each, as HAIM writes them."""
    x = np.asarray(values, dtype=float)
    d = np.diff(x)
    many = len(x) > 1
    return [
        x.mean(),
        x.var(ddof=1) if many else 0.0,
        x.min(),
        x.max(),
        d.mean() if many else 0.0,
        np.abs(d).mean() if many else 0.0,
        np.abs(d).max() if many else 0.0,
        np.abs(d).sum(),
        x[-1] - x[0],
        len(find_peaks(x, height=np.median(x))[0]),
        np.polyfit(np.arange(len(x)), x, 1)[0] if many else 0.0,
    ]


def events_frame(rows: list[tuple[str, float, str, str, float]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, schema=["stay_id", "hours", "source", "series", "value"], orient="row"
    )


def records_frame(rows: list[tuple[str, str, float]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["record_id", "stay_id", "cutoff_hours"], orient="row")


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors as long as they come, so that single cells can be compared."""
    monkeypatch.setattr(series, "NORM", dict.fromkeys(series.NORM, 1e6))


@pytest.fixture
def cohort() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Thirty stays, two records each, with plateaus, single entries and absent series."""
    rng = np.random.default_rng(0)
    rows = []
    for stay in range(30):
        for name in LABS:
            spec = clinical.SERIES["lab", name]
            for _ in range(rng.integers(0, 9)):
                factor = rng.choice([0.5, 0.9, 1.0, 1.1, 1.6])
                rows.append(
                    (f"s{stay}", float(rng.uniform(0, 60)), "lab", name, spec.centre * factor)
                )
    records = [(f"r{s}-{c}", f"s{s}", c) for s in range(30) for c in (24.0, 48.0)]
    return events_frame(rows), records_frame(records)


def standardised(name: str, value: float) -> float:
    spec = clinical.SERIES["lab", name]
    value = min(max(value, spec.low), spec.high)
    if spec.log:
        return float(np.log(value / spec.centre) / spec.scale)
    return (value - spec.centre) / spec.scale


def test_each_statistic_equals_its_slow_transcription(cohort, unheld) -> None:
    events, records = cohort
    x, present = series.statistics(events, records, "lab", LABS)
    assert x.shape == (60, series.dimension(3))
    assert x.dtype == np.float32
    weights = np.array([clinical.SERIES["lab", name].weight for name in LABS])
    assert weights.max() > weights.min()
    compared = 0
    for row, (_, stay, cutoff) in enumerate(records.iter_rows()):
        seen = []
        for column, name in enumerate(LABS):
            mine = sorted(
                (hours, standardised(name, value))
                for s, hours, _, n, value in events.iter_rows()
                if s == stay and n == name and hours <= cutoff
            )
            seen.append(bool(mine))
            cell = x[row, column * 11 : (column + 1) * 11]
            if not mine:
                np.testing.assert_array_equal(cell, 0)
                continue
            raw = np.array(transcribed([z for _, z in mine]))
            raw[[7, 9]] = np.log1p(raw[[7, 9]])
            expected = (
                weights[column] * series._RANGE * np.tanh((raw - series._TYPICAL) / series._SIZE)
            )
            np.testing.assert_allclose(cell, expected, atol=2e-6)
            compared += 1
        np.testing.assert_allclose(x[row, 33:], series.PRESENCE * weights * seen, rtol=1e-6)
        assert present[row] == any(seen)
    assert compared > 100


def test_entries_after_the_cutoff_are_not_seen() -> None:
    records = records_frame([("a", "s", 10.0), ("b", "s", 30.0)])
    early = [("s", 10.0, "lab", "sodium", 140.0)]
    late = [("s", 10.01, "lab", "sodium", 150.0), ("s", 40.0, "lab", "lactate", 9.0)]
    with_late, _ = series.statistics(events_frame(early + late), records, "lab", LABS)
    without, _ = series.statistics(events_frame(early), records, "lab", LABS)
    np.testing.assert_array_equal(with_late[0], without[0])
    assert not np.array_equal(with_late[1], without[1])
    assert with_late[1, 33 + 2] == 0


def test_the_order_of_rows_means_nothing(cohort) -> None:
    events, records = cohort
    tied = events.with_columns(hours=(pl.col("hours") / 10).round())
    x, _ = series.statistics(tied, records, "lab", LABS)
    shuffled, _ = series.statistics(
        tied.sample(fraction=1, shuffle=True, seed=3), records, "lab", LABS
    )
    np.testing.assert_array_equal(x, shuffled)


def test_a_record_does_not_depend_on_the_others(cohort) -> None:
    events, records = cohort
    x, _ = series.statistics(events, records, "lab", LABS)
    alone, _ = series.statistics(
        events.filter(pl.col("stay_id") == "s7"), records[14:16], "lab", LABS
    )
    np.testing.assert_array_equal(x[14:16], alone)


def test_absent_and_useless_entries_give_zeros() -> None:
    events = events_frame(
        [
            ("s", 1.0, "lab", "sodium", float("nan")),
            ("s", 1.0, "lab", "lactate", float("inf")),
            ("s", 1.0, "chart", "heart_rate", 90.0),
        ]
    )
    x, present = series.statistics(
        events, records_frame([("a", "s", 9), ("b", "t", 9)]), "lab", LABS
    )
    np.testing.assert_array_equal(x, 0)
    assert not present.any()
    empty, _ = series.statistics(events.clear(), records_frame([("a", "s", 9.0)]), "lab", LABS)
    np.testing.assert_array_equal(empty, 0)


@pytest.mark.parametrize("source", ["chart", "lab", "procedure"])
def test_wild_values_stay_in_bounds(source: str) -> None:
    names = [name for kind, name in clinical.SERIES if kind == source]
    rows = [
        ("s", hour, source, name, value)
        for name in names
        for hour, value in enumerate([-1e12, 0.0, 1e-9, 1e12, 1.0, 1e12])
    ]
    x, _ = series.statistics(events_frame(rows), records_frame([("a", "s", 99.0)]), source, names)
    assert np.isfinite(x).all()
    assert np.linalg.norm(x[0]) <= series.NORM[source] * (1 + 1e-6)


def test_holding_a_vector_shortens_it_and_keeps_its_direction() -> None:
    x = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(series._held(x, 2.0), [[1.2, 1.6], [0.3, 0.4], [0, 0]], rtol=1e-6)


def test_a_procedure_counts_as_done_whatever_its_value() -> None:
    records = records_frame([("a", "s", 9.0)])
    once, lasting = (
        series.statistics(
            events_frame([("s", 1.0, "procedure", "dialysis", value)]),
            records,
            "procedure",
            ["dialysis"],
        )[0]
        for value in (1.0, 240.0)
    )
    np.testing.assert_array_equal(once, lasting)
    assert once[0, 0] > 0


def test_demographics(unheld) -> None:
    records = pl.DataFrame({"age": [62.0, 96.0, None], "sex": ["M", "F", None]})
    x, present = series.demographics(records)
    np.testing.assert_allclose(x[:, 0], [0, np.tanh(1.0), 0], atol=1e-6)
    sex = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(x[:, 2:], series.SEX * sex, rtol=1e-6)
    np.testing.assert_array_equal(x[:, 1], [0, 0, 1])
    assert present.all()


def test_unknown_or_doubled_names_are_refused() -> None:
    with pytest.raises(EncoderError, match="heart_rate"):
        clinical.specs("lab", ["heart_rate"])
    with pytest.raises(EncoderError, match="twice"):
        clinical.specs("lab", ["sodium", "sodium"])


def test_constants_are_whole_and_sane() -> None:
    by_source = [kind for kind, _ in clinical.SERIES]
    assert [by_source.count(s) for s in ("chart", "lab", "procedure")] == [28, 40, 54]
    for spec in clinical.SERIES.values():
        assert spec.scale > 0
        assert 0 < spec.weight <= 1.5
        assert spec.low <= spec.high
        if spec.source != "procedure":
            assert spec.low < spec.centre < spec.high
        if spec.log:
            assert spec.low > 0


def test_real_stays(open_data, unheld) -> None:
    folder = open_data / "physionet-2012" / "set-a-ccu"
    events = pl.read_parquet(folder / "events.parquet")
    records = pl.read_parquet(folder / "records.parquet")
    names = [name for kind, name in clinical.SERIES if kind == "chart"]
    x, present = series.statistics(events, records, "chart", names)
    assert present.mean() > 0.95
    # The constants fit: few cells sit at the bound.
    weights = np.array([spec.weight for spec in clinical.specs("chart", names)])
    cells = x[:, : 28 * 11].reshape(len(x), 28, 11) / series._RANGE / weights[:, None]
    assert (np.abs(cells) > 0.99).mean() < 0.05

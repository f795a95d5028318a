"""The open MIMIC-IV demo: every figure of the import against pandas on the raw tables.

The queries below are written from the definitions (the data catalogue's items, the rules of
availability, the papers' outcomes) and share no line with the importer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

from client.site.shard import Shard, inspect
from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options
from client.site.shard.importers.tally import Tally

HOUR = pd.Timedelta(hours=1)
PLANNED = ["ELECTIVE", "SURGICAL SAME DAY ADMISSION", "AMBULATORY OBSERVATION"]
KEY = ["stay_id", "hours", "source", "series", "value"]


@pytest.fixture(scope="module")
def demo(open_data: Path) -> Path:
    folder = open_data / "mimic-iv-demo"
    if not folder.is_dir():
        pytest.skip(f"no open data at {folder}; set FEDWARD_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def items(open_data: Path) -> pd.DataFrame:
    """Columns itemid, source, series: the catalogue's tables, and degrees Fahrenheit."""
    found, source = [(223761, "chart", "temperature")], ""
    for line in (open_data / "CATALOG.md").read_text().splitlines():
        if heading := re.match(r"### `(\w+)` \(\d+; HAIM", line):
            source = heading[1]
        elif row := re.match(r"\| `(\w+)` \|.*\| (\d+): ", line):
            found.append((int(row[2]), source, row[1]))
    return pd.DataFrame(found, columns=["itemid", "source", "series"])


def read(demo: Path, name: str, *times: str) -> pd.DataFrame:
    return pd.read_csv(demo / f"{name}.csv.gz", parse_dates=list(times), low_memory=False)


@pytest.fixture(scope="module")
def admissions(demo: Path) -> pd.DataFrame:
    table = read(demo, "hosp/admissions", "admittime", "dischtime", "deathtime")
    first = read(demo, "icu/icustays", "intime").sort_values("intime").groupby("hadm_id").first()
    table["unit"] = table["hadm_id"].map(first["first_careunit"])
    table = table.merge(read(demo, "hosp/patients"), on="subject_id")
    table["age"] = table["anchor_age"] + table["admittime"].dt.year - table["anchor_year"]
    return table


def expected_records(admissions: pd.DataFrame, hour: float) -> pd.DataFrame:
    """One row per stay that lasts until `hour`, with labels worked out stay by stay."""
    rows = []
    for stay in admissions[admissions["unit"].notna()].itertuples():
        moment = stay.admittime + hour * HOUR
        dead = pd.notna(stay.deathtime)
        if moment > stay.dischtime or (dead and moment > stay.deathtime):
            continue
        later = admissions[
            (admissions["subject_id"] == stay.subject_id)
            & ~admissions["admission_type"].isin(PLANNED)
            & (admissions["admittime"] > stay.dischtime)
            & (admissions["admittime"] - stay.dischtime <= 30 * 24 * HOUR)
        ]
        days = (stay.dischtime - stay.admittime) / (24 * HOUR)
        rows.append(
            {
                "stay_id": str(stay.hadm_id),
                "patient_id": str(stay.subject_id),
                "cutoff_hours": float(hour),
                "age": float(stay.age),
                "sex": stay.gender,
                "y_length_of_stay": not dead and stay.dischtime - moment <= 48 * HOUR,
                "y_mortality_48h": dead and stay.deathtime - moment <= 48 * HOUR,
                "y_hospital_mortality": dead,
                "y_long_stay": None if days < 3 or hour > 48 else days > 7,
                "y_readmission": None if dead else len(later) > 0,
            }
        )
    return pd.DataFrame(rows).sort_values("stay_id", ignore_index=True)


@dataclass
class Sieve:
    """Rows that are left after each reason has taken its own."""

    frame: pd.DataFrame
    lost: dict[str, int]

    def drop(self, reason: str, bad: pd.Series) -> None:
        if bad.any():
            self.lost[reason] = int(bad.sum())
        self.frame = self.frame[~bad]


def expected_events(
    demo: Path, name: str, items: pd.DataFrame, admissions: pd.DataFrame, records: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Events of a table in canonical units, and its counts."""
    procedures = name.endswith("procedureevents")
    times = ["starttime"] if procedures else ["charttime", "storetime"]
    table = read(demo, name, *times)
    table["time"] = table[times].max(axis=1)
    sieve, rows = Sieve(table, {}), len(table)
    kind = {"hosp/labevents": "lab", "icu/chartevents": "chart"}.get(name, "procedure")
    wanted = items[items["source"] == kind]
    sieve.drop("not a canonical series", ~table["itemid"].isin(wanted["itemid"]))
    stays = admissions[admissions["unit"].notna()]
    stranger = ~sieve.frame["subject_id"].isin(stays["subject_id"])
    sieve.drop("patient not among the import's", stranger)
    if procedures:
        sieve.frame = sieve.frame.assign(valuenum=1.0, valueuom=None)
    sieve.drop("no number", sieve.frame["valuenum"].isna())
    frame = sieve.frame.merge(wanted, on="itemid")
    feu = frame["valueuom"] == "ng/mL FEU"  # twice the D-dimer unit: not the catalogue's
    sieve.frame = frame
    sieve.drop("d_dimer in ng/mL FEU: not a unit that is understood", feu)
    frame = sieve.frame.drop(columns="value").rename(columns={"valuenum": "value"})
    fahrenheit = frame["itemid"] == 223761
    frame.loc[fahrenheit, "value"] = (frame["value"] - 32) / 1.8
    frame.loc[frame["series"] == "d_dimer", "value"] /= 1000
    # Rows without an admission belong to the one of the patient in whose span they fall.
    frame = frame.reset_index(drop=True)
    lost = frame[frame["hadm_id"].isna()][["subject_id", "time"]].reset_index()
    spans = stays[["subject_id", "hadm_id", "admittime", "dischtime"]]
    held = lost.merge(spans, on="subject_id")
    held = held[(held["admittime"] <= held["time"]) & (held["time"] <= held["dischtime"])]
    assert held["index"].is_unique
    frame.loc[held["index"], "hadm_id"] = held["hadm_id"].to_numpy()
    begins = stays.set_index("hadm_id")["admittime"]
    since = frame["time"] - frame["hadm_id"].map(begins)
    sieve.frame = frame.assign(hours=since.dt.total_seconds() / 3600)
    outside = ~sieve.frame["hadm_id"].isin(stays["hadm_id"])
    sieve.drop("in no hospital stay of the import", outside)
    owner = sieve.frame["hadm_id"].map(stays.set_index("hadm_id")["subject_id"])
    assert (owner == sieve.frame["subject_id"]).all()
    sieve.frame = sieve.frame.assign(stay_id=sieve.frame["hadm_id"].astype(int).astype(str))
    sieve.drop("the stay has no record", ~sieve.frame["stay_id"].isin(records["stay_id"]))
    cutoff = records["cutoff_hours"].iloc[0]
    sieve.drop("available only after the stay's last record", sieve.frame["hours"] > cutoff)
    sieve.drop("given twice", sieve.frame.duplicated(KEY))
    return sieve.frame[KEY], {"rows": rows, "kept": len(sieve.frame), "skipped": sieve.lost}


def imported(
    demo: Path, out: Path, hour: float | None, sites: Any = None
) -> tuple[dict[str, Shard], Tally]:
    folders, tally = import_mimic_iv(MimicSource(demo, hour=hour), out, Options("demo", sites))
    shards = {}
    for folder in folders:
        shard, problems = inspect(folder)
        assert problems == []
        assert shard is not None
        shards[shard.hospital] = shard
    return shards, tally


@pytest.mark.parametrize("hour", [None, 24.0, 72.0])
def test_records_events_and_counts_equal_the_raw_tables(demo, items, admissions, tmp_path, hour):
    shards, tally = imported(demo, tmp_path / "out", hour)
    shard = shards["demo"]
    records = expected_records(admissions, hour or 48)
    got = shard.records.drop("record_id").sort("stay_id")
    for column in records.columns:
        assert got[column].to_list() == records[column].tolist(), column
    for task in ("length_of_stay", "hospital_mortality", "readmission"):
        assert 0 < records[f"y_{task}"].sum() < records[f"y_{task}"].notna().sum(), "says nothing"
    intensive = admissions["unit"].notna().sum()
    assert tally["records"].rows == intensive
    assert tally["records"].kept == len(records) == shard.records.height
    assert tally["admissions"].rows == len(admissions)
    assert tally["admissions"].skipped == {"no stay in intensive care": len(admissions) - intensive}
    assert shard.events is not None
    expected = []
    for name in ("hosp/labevents", "icu/chartevents", "icu/procedureevents"):
        frame, counts = expected_events(demo, name, items, admissions, records)
        said = tally[name.partition("/")[2]]
        assert {"rows": said.rows, "kept": said.kept, "skipped": dict(said.skipped)} == counts
        expected.append(frame)
    # The last bits of hours and converted values may differ, and must not decide the order.
    want = pd.concat(expected).round(9).sort_values(KEY, ignore_index=True)
    have = shard.events.to_pandas().round(9).sort_values(KEY, ignore_index=True)
    assert have.groupby("series").size().to_dict() == want.groupby("series").size().to_dict()
    for column in KEY:
        assert have[column].tolist() == want[column].tolist(), column


def test_nobody_dies_within_48_hours_of_hour_48_in_the_demo(demo, tmp_path):
    """A label that is never true looks like a fault; here it is the data."""
    raw = read(demo, "hosp/admissions", "admittime", "deathtime")
    hours = ((raw["deathtime"] - raw["admittime"]) / HOUR).dropna()
    near = hours[(hours >= 48) & (hours <= 96)]
    shards, _ = imported(demo, tmp_path / "out", 48)
    label = shards["demo"].records["y_mortality_48h"]
    assert label.null_count() == 0
    assert label.sum() == len(near)


def test_a_patient_is_where_their_first_stay_began(demo, admissions, tmp_path):
    shards, _ = imported(demo, tmp_path / "out", None, "care-unit")
    names = {
        "Medical Intensive Care Unit (MICU)": "micu",
        "Surgical Intensive Care Unit (SICU)": "sicu",
        "Cardiac Vascular Intensive Care Unit (CVICU)": "cvicu",
        "Medical/Surgical Intensive Care Unit (MICU/SICU)": "micu-sicu",
        "Trauma SICU (TSICU)": "tsicu",
        "Coronary Care Unit (CCU)": "ccu",
        "Neuro Surgical Intensive Care Unit (Neuro SICU)": "neuro-sicu",
        "Neuro Stepdown": "neuro-stepdown",
        "Neuro Intermediate": "neuro-intermediate",
    }
    stays = admissions[admissions["unit"].notna()].sort_values("admittime")
    first = stays.groupby("subject_id")["unit"].first().map(names)
    want = expected_records(admissions, 48)
    want["site"] = want["patient_id"].astype(int).map(first)
    have = {
        name: dict(shard.records.group_by("patient_id").len().iter_rows())
        for name, shard in shards.items()
    }
    assert have == {
        name: part.groupby("patient_id").size().to_dict() for name, part in want.groupby("site")
    }
    assert sum(len(patients) for patients in have.values()) == want["patient_id"].nunique()


def test_sites_together_are_the_one_site(demo, tmp_path):
    one, _ = imported(demo, tmp_path / "one", None)
    four, _ = imported(demo, tmp_path / "four", None, 4)
    assert sorted(four) == ["site-1", "site-2", "site-3", "site-4"]
    for table, key in (("records", ["record_id"]), ("events", KEY)):
        joined = pl.concat([getattr(shard, table) for shard in four.values()])
        assert joined.sort(key).equals(getattr(one["demo"], table).sort(key))

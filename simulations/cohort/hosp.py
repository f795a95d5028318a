"""The tables of MIMIC-IV's module `hosp`."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from simulations.cohort.dates import Calendar, duration, timestamps, to_minute
from simulations.cohort.latent import Floats, Population
from simulations.cohort.layout import LAYOUT, table, texts
from simulations.cohort.profiles import Profile
from simulations.cohort.series import LABS, PANELS, kin, readings

_ADMISSIONS = {  # share among first and later, and among unplanned readmissions
    "EW EMER.": (0.46, 0.6),
    "OBSERVATION ADMIT": (0.13, 0.14),
    "URGENT": (0.16, 0.1),
    "EU OBSERVATION": (0.04, 0.06),
    "DIRECT EMER.": (0.05, 0.05),
    "DIRECT OBSERVATION": (0.02, 0.02),
    "SURGICAL SAME DAY ADMISSION": (0.08, 0.015),
    "ELECTIVE": (0.05, 0.01),
    "AMBULATORY OBSERVATION": (0.01, 0.005),
}
_URINE_GLUCOSE = 51478


def patients(population: Population, dates: Calendar, rng: np.random.Generator) -> pl.DataFrame:
    stays = population.stays
    first = np.flatnonzero(stays.visit == 0)
    last = np.append(first[1:], len(stays.hours)) - 1
    died = stays.died[last]
    after = dates.discharge[last] + duration(24 * (1 + rng.exponential(120, len(last))))
    after[rng.random(len(last)) > 0.18] = np.datetime64("NaT")
    dod = np.where(died, dates.discharge[last], after).astype("datetime64[D]")
    age = np.floor(population.age).astype(int)
    return table(
        "hosp/patients",
        subject_id=dates.subject,
        gender=np.where(population.male, "M", "F"),
        anchor_age=np.where(age > 89, 91, age),
        anchor_year=dates.admit[first].astype("datetime64[Y]").astype(int) + 1970,
        anchor_year_group=rng.choice(
            ["2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019"], size=len(age)
        ),
        dod=pl.Series(dod.astype("datetime64[ms]")).dt.strftime("%Y-%m-%d"),
    )


def admissions(population: Population, dates: Calendar, rng: np.random.Generator) -> pl.DataFrame:
    stays = population.stays
    count = len(stays.hours)
    soon = (stays.visit > 0) & (stays.gap_hours < 720)
    names = list(_ADMISSIONS)
    shares = np.cumsum([_ADMISSIONS[name] for name in names], axis=0).T
    drawn = rng.random(count)
    which = np.where(soon, np.searchsorted(shares[1], drawn), np.searchsorted(shares[0], drawn))
    kind = np.array(names)[np.minimum(which, len(names) - 1)]
    emergency = np.isin(kind, ["EW EMER.", "EU OBSERVATION", "OBSERVATION ADMIT"])
    arrival = to_minute(dates.admit - duration(rng.uniform(2, 8, count)))
    onward = to_minute(dates.admit + duration(rng.uniform(0.2, 1.5, count)))
    never = np.datetime64("NaT")
    home = rng.choice(
        ["HOME", "HOME HEALTH CARE", "SKILLED NURSING FACILITY", "REHAB", "HOSPICE"],
        p=[0.35, 0.35, 0.2, 0.08, 0.02],
        size=count,
    )
    person = stays.patient
    per_patient = len(population.age)
    return table(
        "hosp/admissions",
        subject_id=dates.subject[person],
        hadm_id=dates.hadm,
        admittime=timestamps(dates.admit),
        dischtime=timestamps(dates.discharge),
        deathtime=timestamps(np.where(stays.died, dates.discharge, never)),
        admission_type=kind,
        admit_provider_id=_providers(count, rng),
        admission_location=np.where(
            emergency,
            "EMERGENCY ROOM",
            rng.choice(["PHYSICIAN REFERRAL", "TRANSFER FROM HOSPITAL"], size=count),
        ),
        discharge_location=np.where(stays.died, "DIED", home),
        insurance=rng.choice(["Medicare", "Medicaid", "Other"], size=per_patient)[person],
        language=rng.choice(["ENGLISH", "?"], p=[0.9, 0.1], size=per_patient)[person],
        marital_status=rng.choice(["MARRIED", "SINGLE", "WIDOWED", "DIVORCED"], size=per_patient)[
            person
        ],
        race=rng.choice(
            ["WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "OTHER", "UNKNOWN"],
            p=[0.66, 0.13, 0.05, 0.08, 0.08],
            size=per_patient,
        )[person],
        edregtime=timestamps(np.where(emergency, arrival, never)),
        edouttime=timestamps(np.where(emergency, onward, never)),
        hospital_expire_flag=stays.died.astype(int),
    )


def labevents(
    population: Population, dates: Calendar, profile: Profile, rng: np.random.Generator
) -> pl.DataFrame:
    """Draws at admission (often before it, in the emergency room), then once or twice a day."""
    stays = population.stays
    count = len(stays.hours)
    grid = np.concatenate([[-1.5, 7, 19, 31, 43], np.arange(67, 720, 24)])
    hours = grid + rng.uniform(-3, 3, size=(count, len(grid)))
    measured = rng.random(count) < profile.labs
    stay, draw = np.nonzero((hours < stays.hours[:, None]) & measured[:, None])
    hours = hours[stay, draw]
    state = stays.at(stay, hours)
    frames = []
    asked = {panel: rng.random(len(stay)) < share for panel, share in PANELS.items()}
    asked["gas"] |= dates.ventilated[stay] & (rng.random(len(stay)) < 0.5)
    peculiar: dict[object, Floats] = {}
    for item in LABS:
        here = np.flatnonzero(asked[item.group] & (rng.random(len(stay)) < 0.97))
        shift = 0.3 * float(rng.normal())
        own = peculiar.setdefault(kin(item), rng.normal(size=count))
        value = readings(item, state[here], stay[here], own, shift, rng)
        printed, itemid = texts(value, item.digits), np.full(len(here), item.itemid)
        columns = {"draw": here, "itemid": itemid, "valuenum": value, "value": printed}
        frames.append(pl.DataFrame(columns))
    urine = np.flatnonzero(rng.random(len(stay)) < 0.08)
    dip = rng.choice(["NEG", "TR", "100"], size=len(urine))
    itemid = np.full(len(urine), _URINE_GLUCOSE)
    frames.append(pl.DataFrame({"draw": urine, "itemid": itemid, "value": dip}))
    rows = (
        pl.concat(frames, how="diagonal")
        .join(_references(), on="itemid", how="left")
        .sort("draw", "itemid")
    )
    n, at, panel = rows.height, rows["draw"].to_numpy(), rows["panel"].to_numpy()
    chart = to_minute(dates.admit[stay] + duration(hours))[at]
    # A panel is one specimen: it is filed at one moment.
    panels = len(PANELS) + 1
    delay = rng.uniform(30, 120, size=(len(stay), panels))[at, panel]
    spoiled = rng.random(n) < 0.012
    unassigned = (chart < dates.admit[stay[at]]) | (rng.random(n) < 0.07)
    number, text = pl.col("valuenum"), pl.col("value")
    outside = (number < pl.col("ref_range_lower")) | (number > pl.col("ref_range_upper"))
    rows = rows.with_columns(
        labevent_id=np.arange(1, n + 1),
        subject_id=dates.subject[stays.patient[stay]][at],
        hadm_id=dates.hadm[stay][at],
        unassigned=unassigned,
        specimen_id=10_000_000 + panels * at + panel,
        order_provider_id=_providers(len(stay), rng)[at],
        charttime=timestamps(chart),
        storetime=timestamps(to_minute(chart + duration(delay / 60))),
        priority=rng.choice(["STAT", "ROUTINE"], size=len(stay))[at],
        spoiled=spoiled,
    ).with_columns(
        hadm_id=pl.when(~pl.col("unassigned")).then("hadm_id"),
        value=pl.when("spoiled").then(pl.lit("___")).otherwise(text),
        valuenum=pl.when(~pl.col("spoiled")).then(number),
        flag=pl.when(~pl.col("spoiled") & outside).then(pl.lit("abnormal")),
        comments=pl.when("spoiled").then(pl.lit("HEMOLYZED, RESULTS UNRELIABLE.")),
    )
    return rows.select(LAYOUT["hosp/labevents"])


def d_labitems() -> pl.DataFrame:
    rows = [(item.itemid, item.label, "Blood", item.category) for item in LABS]
    rows += [
        (_URINE_GLUCOSE, "Glucose", "Urine", "Hematology"),
        # Never measured here, but a dictionary names everything.
        (50907, "Cholesterol, Total", "Blood", "Chemistry"),
        (51002, "Troponin I", "Blood", "Chemistry"),
        (51211, "Factor XIII", "Blood", "Hematology"),
    ]
    return pl.DataFrame(rows, schema=LAYOUT["hosp/d_labitems"], orient="row").sort("itemid")


def _references() -> pl.DataFrame:
    """Panel (by number), unit and reference range of each item."""
    panels = list(PANELS)
    rows = [
        (
            item.itemid,
            panels.index(item.group),
            item.unit or None,
            *(item.reference or (None, None)),
        )
        for item in LABS
    ]
    rows.append((_URINE_GLUCOSE, len(panels), None, None, None))
    names = ("itemid", "panel", "valueuom", "ref_range_lower", "ref_range_upper")
    return pl.DataFrame(rows, schema=names, orient="row")


def _providers(count: int, rng: np.random.Generator) -> NDArray[np.str_]:
    names = np.array([f"P{number:03X}{'KLMN'[number % 4]}{number % 10}" for number in range(400)])
    return names[rng.integers(0, len(names), size=count)]

"""The tables of MIMIC-IV's module `icu`."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from simulations.cohort.dates import Calendar, duration, timestamps, to_minute
from simulations.cohort.latent import Floats, Population
from simulations.cohort.layout import LAYOUT, table, texts
from simulations.cohort.profiles import Profile
from simulations.cohort.series import CHART, PROCEDURES, VENTILATION, Item, happens, kin, readings

_CARE_UNITS = {
    "Medical Intensive Care Unit (MICU)": 0.28,
    "Surgical Intensive Care Unit (SICU)": 0.2,
    "Medical/Surgical Intensive Care Unit (MICU/SICU)": 0.2,
    "Cardiac Vascular Intensive Care Unit (CVICU)": 0.16,
    "Trauma SICU (TSICU)": 0.09,
    "Coronary Care Unit (CCU)": 0.07,
}
_GCS = {
    223900: (
        "No Response",
        "Incomprehensible sounds",
        "Inappropriate Words",
        "Confused",
        "Oriented",
    ),
    220739: ("None", "To Pain", "To Speech", "Spontaneously"),
    223901: (
        *("No response", "Abnormal extension", "Abnormal Flexion", "Flex-withdraws"),
        *("Localizes Pain", "Obeys Commands"),
    ),
}
_FAHRENHEIT, _ALARM, _RHYTHM = 223761, 220046, 220048


def icustays(population: Population, dates: Calendar, rng: np.random.Generator) -> pl.DataFrame:
    into, out = dates.icu_times
    unit = rng.choice(list(_CARE_UNITS), p=list(_CARE_UNITS.values()), size=len(dates.icu))
    return table(
        "icu/icustays",
        subject_id=dates.subject[population.stays.patient[dates.icu]],
        hadm_id=dates.hadm[dates.icu],
        stay_id=dates.icu_id,
        first_careunit=unit,
        last_careunit=unit,
        intime=timestamps(into),
        outtime=timestamps(out),
        los=(out - into).astype(int) / 86_400,
    )


def chartevents(
    population: Population, dates: Calendar, profile: Profile, rng: np.random.Generator
) -> pl.DataFrame:
    """Rounds of charting on the ICU: every four hours at first, twice a day in the end."""
    stays = population.stays
    grid = np.concatenate(
        [[0.4], np.arange(4, 24, 4), np.arange(24, 72, 6), np.arange(72, 720, 12)]
    )
    hours = grid + rng.uniform(-0.3, 1.5, size=(len(dates.icu), len(grid)))
    measured = rng.random(len(stays.hours)) < profile.charts
    inside = hours < (dates.icu_out - dates.icu_in)[:, None]
    unit, turn = np.nonzero(inside & measured[dates.icu][:, None])
    hours = dates.icu_in[unit] + hours[unit, turn]
    stay = dates.icu[unit]
    state = stays.at(stay, hours)
    ventilated = dates.ventilated[stay]
    arterial = (rng.random(len(stays.hours)) < 0.4)[stay]
    share = {
        "vital": np.full(len(stay), 0.95),
        "neuro": np.full(len(stay), 0.5),
        "temperature": np.full(len(stay), 0.6),
        "arterial": np.where(arterial, 0.8, 0.0),
        "ventilator": np.where(ventilated, 0.5, 0.0),
        "oxygen": np.where(ventilated, 0.0, 0.4),
        "daily": np.full(len(stay), 0.15),
    }
    present = {group: rng.random(len(stay)) < chance for group, chance in share.items()}
    peculiar: dict[object, Floats] = {}
    frames: list[Any] = []
    for item in CHART:
        here = np.flatnonzero(present[item.group] & (rng.random(len(stay)) < 0.96))
        shift = 0.3 * float(rng.normal())
        own = peculiar.setdefault(kin(item), rng.normal(size=len(stays.hours)))
        value = readings(item, state[here], stay[here], own, shift, rng)
        words, itemid = texts(value, item.digits), np.full(len(here), item.itemid)
        unit_name = np.full(len(here), item.unit)
        if words_for := _GCS.get(item.itemid):
            words = np.array(words_for)[value.astype(int) - 1]
        if item.label == "Temperature Celsius":
            warm = rng.random(len(here)) >= profile.celsius
            value = np.where(warm, np.round(value * 1.8 + 32, 1), value)
            words = texts(value, 1)
            itemid[warm] = _FAHRENHEIT
            unit_name[warm] = "°F"
        frames.append((here, itemid, value, words, unit_name))
    alarms = np.flatnonzero(rng.random(len(stay)) < 0.1)
    high = np.full(len(alarms), 120.0)
    frames.append((alarms, np.full(len(alarms), _ALARM), high, texts(high, 0), "bpm"))
    rhythm = np.flatnonzero(rng.random(len(stay)) < 0.3)
    names = rng.choice(["SR (Sinus Rhythm)", "ST (Sinus Tachycardia)", "AF"], size=len(rhythm))
    frames.append((rhythm, np.full(len(rhythm), _RHYTHM), np.full(len(rhythm), np.nan), names, ""))
    columns = ("round", "itemid", "valuenum", "value", "valueuom")
    rows = pl.concat(
        [pl.DataFrame(dict(zip(columns, frame, strict=True))) for frame in frames]
    ).sort("round", "itemid")
    at = rows["round"].to_numpy()
    charted = to_minute(dates.admit[stay] + duration(hours))
    stored = to_minute(charted + duration(rng.uniform(3, 60, size=len(stay)) / 60))
    nurse = rng.integers(1_000, 99_999, size=len(dates.icu))[unit]
    rows = rows.with_columns(
        pl.col("valuenum").fill_nan(None),
        pl.col("valueuom").replace("", None),
        subject_id=dates.subject[stays.patient[stay]][at],
        hadm_id=dates.hadm[stay][at],
        stay_id=dates.icu_id[unit][at],
        caregiver_id=nurse[at],
        charttime=timestamps(charted[at]),
        storetime=timestamps(stored[at]),
        warning=pl.lit(0),
    )
    return rows.select(LAYOUT["icu/chartevents"])


def procedureevents(
    population: Population, dates: Calendar, profile: Profile, rng: np.random.Generator
) -> pl.DataFrame:
    """At most one of each kind per hospital stay, in its first ICU stay."""
    stays = population.stays
    _, first = np.unique(dates.icu, return_index=True)
    into, out = (times[first] for times in dates.icu_times)
    stay = dates.icu[first]
    recorded = rng.random(len(stays.hours)) < profile.procedures
    weight = np.round(rng.normal(81, 17, size=len(stays.hours)).clip(38, 180), 1)
    frames: list[Any] = []
    for procedure in PROCEDURES:
        done = happens(procedure, stays.at(stay, dates.icu_in[first]), rng)
        late = "Removed" in procedure.label or procedure.label == "Extubation"
        if procedure is VENTILATION:
            done = dates.ventilated[stay]
        elif procedure.order in ("Ventilation", "Intubation/Extubation"):
            done &= dates.ventilated[stay] == (procedure.order != "Ventilation")
        delay = (20 if late else 0) + rng.exponential(24 if late else 9, size=len(first))
        start = to_minute(into + duration(delay))
        here = np.flatnonzero(done & (start < out) & recorded[stay])
        lasting = procedure.minutes > 0
        minutes = np.maximum(1, np.round(procedure.minutes * rng.uniform(0.3, 1.7, len(here))))
        end = np.minimum(start[here] + duration(minutes / 60), out[here])
        minutes = np.maximum((end - start[here]).astype(int) // 60, 1).astype(float)
        frames.append(
            pl.DataFrame(
                {
                    "subject_id": dates.subject[stays.patient[stay[here]]],
                    "hadm_id": dates.hadm[stay[here]],
                    "stay_id": dates.icu_id[first[here]],
                    "caregiver_id": rng.integers(1_000, 99_999, size=len(here)),
                    "starttime": timestamps(start[here]),
                    "endtime": timestamps(end),
                    "storetime": timestamps(
                        end if lasting else start[here] + duration(np.full(1, 0.1))
                    ),
                    "itemid": np.full(len(here), procedure.itemid),
                    "value": minutes if lasting else np.ones(len(here)),
                    "valueuom": np.full(len(here), "min" if lasting else "None"),
                    "ordercategoryname": np.full(len(here), procedure.order),
                    "ordercategorydescription": np.full(
                        len(here), "ContinuousProcess" if lasting else "Task"
                    ),
                    "patientweight": weight[stay[here]],
                    "isopenbag": np.full(len(here), int(lasting)),
                    "originalrate": np.full(len(here), int(lasting)),
                }
            )
        )
    rows = pl.concat(frames).sort("subject_id", "starttime", "itemid")
    order = np.arange(1_000_000, 1_000_000 + rows.height)
    nothing = pl.lit(None, dtype=pl.String)
    rows = rows.with_columns(
        location=nothing,
        locationcategory=nothing,
        orderid=order,
        linkorderid=order,
        continueinnextdept=pl.lit(0),
        statusdescription=pl.lit("FinishedRunning"),
        originalamount=pl.col("value"),
    )
    return rows.select(LAYOUT["icu/procedureevents"])


def d_items() -> pl.DataFrame:
    """Label, abbreviation (the same here), table, category, unit and kind of each item."""
    vital, chart, acts = "Routine Vital Signs", "chartevents", "procedureevents"
    rows = [
        (i.itemid, i.label, i.label, chart, i.category, i.unit or None, _kind(i)) for i in CHART
    ]
    extra = (
        (_FAHRENHEIT, "Temperature Fahrenheit", vital, "°F", "Numeric"),
        (_ALARM, "Heart rate Alarm - High", "Alarms", "bpm", "Numeric"),
        (_RHYTHM, "Heart Rhythm", vital, None, "Text"),
    )
    rows += [(i, label, label, chart, kind, unit, how) for i, label, kind, unit, how in extra]
    rows += [(p.itemid, p.label, p.label, acts, p.category, "None", "Process") for p in PROCEDURES]
    schema = LAYOUT["icu/d_items"]
    return pl.DataFrame([(*row, None, None) for row in rows], schema=schema, orient="row").sort(
        "itemid"
    )


def _kind(item: Item) -> str:
    return "Text" if item.itemid in _GCS else "Numeric"

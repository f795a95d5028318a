"""Radiology reports and discharge summaries, in three manners of writing.

A report **names the findings of its own image**: that is the leak which availability bars, since it
is stored hours after the image. What a record may read is an examination of the day of admission,
whose history knows something of each axis, and the reports of earlier images of the stay. The
discharge summary tells everything, and is dated to the midnight before it was written, as MIMIC's
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from simulations.cohort.dates import Calendar, Numbers, Times, duration, timestamps, to_minute
from simulations.cohort.latent import AXES, FINDINGS, Floats, Population
from simulations.cohort.layout import LAYOUT
from simulations.cohort.profiles import Profile, Style

VIEW = 0.9
"""Correlation between an axis on admission and what the history knows of it."""

# axis: words for much of it, for some of it, and for its absence
_HISTORY: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "heart": (
        (
            "severe congestive heart failure",
            "dilated cardiomyopathy with reduced ejection fraction",
        ),
        ("hypertensive heart disease", "coronary artery disease with prior bypass surgery"),
        ("no cardiac history", "normal ejection fraction"),
    ),
    "fluid": (
        ("marked volume overload", "worsening orthopnea and leg swelling"),
        ("mild ankle swelling", "recent weight gain on diuretics"),
        ("euvolemic", "no leg swelling"),
    ),
    "infection": (
        ("productive cough with high fever", "sputum growing gram negative rods"),
        ("cough and low grade fever", "sick contacts"),
        ("afebrile without cough", "no recent infection"),
    ),
    "collapse": (
        ("shallow breathing after abdominal surgery", "prolonged immobility with poor cough"),
        ("reduced breath sounds at the bases", "splinting with shallow breaths"),
        ("good inspiratory effort", "breath sounds to both bases"),
    ),
    "leak": (
        ("sudden pleuritic pain after line placement", "chest tube on water seal"),
        ("bullous emphysema", "recent thoracentesis"),
        ("no chest tube", "no pleuritic pain"),
    ),
    "trauma": (
        ("high speed motor vehicle collision", "fall from height with chest wall crepitus"),
        ("fall from standing", "chest wall tenderness"),
        ("no trauma", "no chest wall tenderness"),
    ),
    "neoplasm": (
        ("metastatic carcinoma on chemotherapy", "known lung malignancy with hemoptysis"),
        ("long smoking history with weight loss", "remote history of cancer"),
        ("never smoker", "no history of malignancy"),
    ),
    "mediastinum": (
        ("thoracic aortic aneurysm", "tearing chest pain radiating to the back"),
        ("tortuous aorta", "long standing hypertension"),
        ("no aortic disease", "normotensive"),
    ),
    "kidney": (
        ("end stage renal disease on dialysis", "acute kidney injury with oliguria"),
        ("chronic kidney disease stage three", "rising creatinine"),
        ("normal renal function", "good urine output"),
    ),
    "shock": (
        ("hypotension requiring vasopressors", "septic shock"),
        ("tachycardia with soft blood pressure", "received fluid boluses"),
        ("hemodynamically stable", "comfortable"),
    ),
    "frailty": (
        ("bedbound nursing home resident", "advanced dementia with malnutrition"),
        ("walks with assistance", "multiple recent admissions"),
        ("independent at baseline", "previously well"),
    ),
}
_SHORT = {
    "congestive heart failure": "CHF",
    "coronary artery disease": "CAD",
    "with prior bypass surgery": "s/p CABG",
    "reduced ejection fraction": "low EF",
    "ejection fraction": "EF",
    "end stage renal disease": "ESRD",
    "dialysis": "HD",
    "chronic kidney disease": "CKD",
    "acute kidney injury": "AKI",
    "motor vehicle collision": "MVC",
    "chest tube": "CT",
    "hypertension": "HTN",
    "hypotension": "low BP",
    "history of": "h/o",
    "history": "hx",
    "without": "w/o",
    "with ": "w/ ",
    "chest pain": "CP",
    "creatinine": "Cr",
    "pneumothorax": "PTX",
    "pulmonary edema": "pulm edema",
    "pneumonia": "PNA",
    "malignancy": "CA",
}
_FOUND: dict[str, tuple[str, str]] = {
    "fracture": ("displaced rib fracture", "no acute fracture"),
    "lung_lesion": ("pulmonary nodule", "no suspicious lung lesion"),
    "enlarged_cardiomediastinum": ("widened mediastinum", "mediastinal contours are normal"),
    "consolidation": ("focal consolidation", "no focal consolidation"),
    "pneumonia": ("findings concerning for pneumonia", "no evidence of pneumonia"),
    "atelectasis": ("bibasilar atelectasis", "no atelectasis"),
    "lung_opacity": ("patchy airspace opacity", "lungs are clear"),
    "pneumothorax": ("pneumothorax", "no pneumothorax"),
    "edema": ("pulmonary edema", "no pulmonary edema"),
    "cardiomegaly": ("cardiomegaly", "heart size is normal"),
}
_EXAMS = (
    "CT HEAD W/O CONTRAST",
    "LIVER OR GALLBLADDER US (SINGLE ORGAN)",
    "ABDOMEN (SUPINE & ERECT)",
    "BILAT LOWER EXT VEINS",
    "RENAL U.S.",
)


@dataclass(frozen=True)
class _Note:
    """One row to be; `stay` numbers the hospital stay, `hours` are since its admission."""

    stay: int
    kind: str
    charted: float
    stored: float
    text: str


def notes(
    population: Population,
    dates: Calendar,
    views: list[str],
    profile: Profile,
    rng: np.random.Generator,
) -> dict[str, pl.DataFrame]:
    """`radiology` and `discharge`; nothing where the hospital has no note module.

    Args:
        views: Of each study's first image, ``PA`` or ``AP``.
    """
    if not profile.notes:
        return {}
    stays, studies = population.stays, population.studies
    known = VIEW * stays.state[:, 0] + np.sqrt(1 - VIEW**2) * rng.normal(
        size=(len(stays.hours), len(AXES))
    )
    written = rng.random(len(stays.hours)) < profile.notes
    radiology, discharge = [], []
    for stay in np.flatnonzero(written).tolist():
        writer = _Writer(profile.style, population, stays.patient[stay], known[stay], rng)
        hour = rng.uniform(-2, 2.5)
        if rng.random() < 0.9 and hour + 1.5 < stays.hours[stay]:
            text = writer.examination(str(rng.choice(_EXAMS)))
            radiology.append(_Note(stay, "RR", hour, hour + rng.uniform(0.5, 4), text))
        text = writer.summary(bool(stays.died[stay]))
        end = stays.hours[stay]
        discharge.append(_Note(stay, "DS", end, end + rng.uniform(12, 120), text))
    for study in np.flatnonzero(written[studies.stay]).tolist():
        stay = int(studies.stay[study])
        writer = _Writer(profile.style, population, stays.patient[stay], known[stay], rng)
        text = writer.report(studies.label[study], views[study])
        hour = studies.hours[study]
        radiology.append(_Note(stay, "RR", hour, hour + rng.uniform(2, 12), text))
    return {
        "note/radiology": _frame("note/radiology", radiology, population, dates),
        "note/discharge": _frame("note/discharge", discharge, population, dates),
    }


def _frame(name: str, rows: list[_Note], population: Population, dates: Calendar) -> pl.DataFrame:
    stay: Numbers = np.array([row.stay for row in rows], dtype=np.int64)

    def times(hours: list[float]) -> Times:
        return to_minute(dates.admit[stay] + duration(np.array(hours, dtype=np.float64)))

    charted = times([row.charted for row in rows])
    if name == "note/discharge":
        charted = charted.astype("datetime64[D]").astype("datetime64[s]")
    frame = pl.DataFrame(
        {
            "subject_id": dates.subject[population.stays.patient[stay]],
            "hadm_id": dates.hadm[stay],
            "note_type": pl.Series([row.kind for row in rows], dtype=pl.String),
            "charttime": timestamps(charted),
            "storetime": timestamps(times([row.stored for row in rows])),
            "text": pl.Series([row.text for row in rows], dtype=pl.String),
        }
    ).sort("subject_id", "storetime")
    number = pl.int_range(1, pl.len() + 1).over("subject_id")
    return frame.with_columns(
        note_seq=number,
        note_id=pl.format("{}-{}-{}", "subject_id", "note_type", number),
    ).select(LAYOUT[name])


class _Writer:
    """One hospital's manner of writing about one stay."""

    def __init__(
        self,
        style: Style,
        population: Population,
        patient: int,
        known: Floats,
        rng: np.random.Generator,
    ) -> None:
        self._style, self._rng = style, rng
        man = bool(population.male[patient])
        self._person = {
            "prose": f"___ year old {'man' if man else 'woman'}",
            "telegraphic": f"___ YO {'M' if man else 'F'}",
            "abbreviated": f"___{'M' if man else 'F'}",
        }[style]
        self._known = known

    def examination(self, name: str) -> str:
        """An examination of another region on admission; its history is what counts."""
        return self._page(
            EXAMINATION=name,
            INDICATION=f"{self._person}, {self._history()}. Evaluate for acute process.",
            TECHNIQUE="Standard departmental protocol.",
            COMPARISON="None.",
            FINDINGS="Study is limited by patient position. No acute abnormality is identified.",
            IMPRESSION="No acute process.",
        )

    def report(self, label: Floats, view: str) -> str:
        """Of an X-ray: it names what CheXpert then reads from it."""
        seen = [
            _FOUND[finding][0 if value == 1 else 1]
            if value >= 0
            else f"possible {_FOUND[finding][0]}"
            for finding, value in zip(FINDINGS, label.tolist(), strict=True)
            if np.isfinite(value)
        ]
        self._rng.shuffle(seen)
        positive = [finding for finding in seen if not finding.startswith(("no ", "possible"))]
        return self._page(
            EXAMINATION=f"CHEST ({'PORTABLE AP' if view == 'AP' else 'PA AND LAT'})",
            INDICATION=f"{self._person}, {self._history(most=3)}.",
            COMPARISON="Chest radiograph ___.",
            FINDINGS=self._list(seen or ["no relevant change"]),
            IMPRESSION=self._list(positive[:3] or ["no acute cardiopulmonary process"]),
        )

    def summary(self, died: bool) -> str:
        end = (
            "The patient died despite maximal care." if died else "Discharged in stable condition."
        )
        return self._page(
            HISTORY=f"{self._person}, {self._history()}.",
            COURSE=f"Admitted to the intensive care unit. {end}",
            DISPOSITION="Expired" if died else "Home or facility",
        )

    def _history(self, most: int = 9) -> str:
        """What is known, the most striking first; nobody writes down the ordinary."""
        phrases = []
        for axis in np.argsort(-np.abs(self._known)).tolist()[:most]:
            much, some, none = _HISTORY[AXES[axis]]
            value = self._known[axis]
            if value > 1.0:
                phrases.append(self._pick(*much))
            elif value > 0.3:
                phrases.append(self._pick(*some))
            elif value < -0.5:
                phrases.append(self._pick(*none))
        return ", ".join(phrases) or "for evaluation"

    def _pick(self, *choices: str) -> str:
        return choices[int(self._rng.integers(len(choices)))]

    def _list(self, findings: list[str]) -> str:
        return " ".join(f"{finding[0].upper()}{finding[1:]}." for finding in findings)

    def _page(self, **sections: str) -> str:
        if self._style == "telegraphic":
            lines = (f"{name}: {text}" for name, text in sections.items())
            return "\n".join(lines).replace(", ", "; ").upper()
        text = "\n\n".join(f"{name}:  {text}" for name, text in sections.items())
        if self._style == "abbreviated":
            for long, short in _SHORT.items():
                text = text.replace(long, short)
        return f"{'FINAL REPORT':^60}\n{text}\n"

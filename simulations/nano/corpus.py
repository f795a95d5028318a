"""Synthetic clinical text from a seeded grammar: invented patients in ten kinds of note.

Each document is drawn in two stages. First a `Patient` is invented: condition, severity, age,
measurements moved by the condition in its own direction, film findings, treatment, outcome. Then
one kind of note is written about that patient. What a model can learn from such text is therefore
real structure, though a small one: names with their units and magnitudes, the word "high" beside a
value above its reference range, findings that go with a condition, outcomes that follow severity.

Nothing is copied or estimated from any data set. Only `random.Random` is used, so one seed gives
the same text on every machine and Python version from 3.11.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from simulations.nano.vocabulary import (
    CHRONIC,
    CONDITIONS,
    DEVICES,
    FINDINGS,
    HOME_DRUGS,
    LABS,
    PLACES,
    QUANTITIES,
    VITALS,
    Condition,
    Quantity,
)

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
# Findings of the whole chest, written without a place.
CENTRAL = ("cardiomegaly", "enlarged cardiomediastinum")


@dataclass(frozen=True)
class Patient:
    """One invented patient.

    Attributes:
        severity: 0 (mild) to 1 (gravest); scales every effect of the condition and the outcome.
        findings: Keys of `FINDINGS` present on the film.
        days: Length of stay.
    """

    age: int
    sex: str
    condition: Condition
    severity: float
    chronic: tuple[str, ...]
    findings: tuple[str, ...]
    died: bool
    icu: bool
    days: int

    @property
    def grade(self) -> str:
        return "mild" if self.severity < 0.35 else "moderate" if self.severity < 0.7 else "severe"

    @property
    def who(self) -> str:
        return f"{self.age} year old {'woman' if self.sex == 'F' else 'man'}"


def invent(rng: random.Random) -> Patient:
    """Draw a patient; death is a logistic function of condition, severity and age."""
    condition = rng.choice(CONDITIONS)
    severity = rng.random()
    age = min(97, max(18, round(rng.gauss(65, 16))))
    logit = condition.lethality + 3.0 * (severity - 0.5) + 0.03 * (age - 65)
    died = rng.random() < 1 / (1 + math.exp(-logit))
    findings = [f for f in condition.findings if rng.random() < 0.35 + 0.6 * severity]
    findings += [f for f in FINDINGS if f not in findings and rng.random() < 0.04]
    return Patient(
        age=age,
        sex=rng.choice("FM"),
        condition=condition,
        severity=severity,
        chronic=tuple(rng.sample(CHRONIC, rng.choice((0, 1, 1, 2, 2, 3)))),
        findings=tuple(findings),
        died=died,
        icu=rng.random() < 0.15 + 0.75 * severity,
        days=1 + int(rng.expovariate(1 / (2 + 8 * severity))),
    )


def measure(rng: random.Random, patient: Patient, quantity: Quantity) -> float:
    """One value: the reference middle, spread over the range, moved by the condition's effect."""
    effect = patient.condition.effects.get(quantity.name, 1.0) ** (0.4 + 0.8 * patient.severity)
    middle, half = (quantity.low + quantity.high) / 2, (quantity.high - quantity.low) / 2
    value = rng.gauss(middle, 0.45 * half) * effect
    return round(min(quantity.ceiling, max(quantity.floor, value)), quantity.decimals)


def judge(quantity: Quantity, value: float) -> str:
    """The word beside a value; "critically" beyond one and a half widths of the range."""
    width = quantity.high - quantity.low
    if value > quantity.high:
        return "critically high" if value > quantity.high + 1.5 * width else "high"
    if value < quantity.low:
        return "critically low" if value < quantity.low - 1.5 * width else "low"
    return "normal"


def _amount(quantity: Quantity, value: float) -> str:
    unit = "%" if quantity.unit == "%" else f" {quantity.unit}" if quantity.unit else ""
    return f"{value:.{quantity.decimals}f}{unit}"


def _listing(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _quantities(
    rng: random.Random, patient: Patient, pool: dict[str, Quantity], count: int
) -> list[Quantity]:
    """Some quantities of the pool, those that the condition moves being three times likelier."""
    moved = patient.condition.effects
    ranked = sorted(pool, key=lambda name: rng.random() ** (3 if name in moved else 1))
    return [pool[name] for name in ranked[:count]]


def _admission(rng: random.Random, patient: Patient) -> str:
    sick = patient.condition
    history = f"a history of {_listing(patient.chronic)}" if patient.chronic else "no prior illness"
    since = f"{rng.choice(NUMBERS)} {rng.choice(('hours', 'days'))}"
    complaint = _listing(rng.sample(sick.complaints, rng.choice((1, 2))))
    opening = rng.choice((
        f"Admission note. {patient.who} with {history} presents with {complaint} for {since}.",
        f"Chief complaint: {complaint}. {patient.who}, {history}, unwell for {since}.",
        f"History of present illness: this {patient.who} was brought in after {since} of "
        f"{complaint}. Past medical history: {_listing(patient.chronic or ('none',))}.",
    ))  # fmt: skip
    taken = rng.sample(HOME_DRUGS, rng.randint(1, 4))
    home = rng.choice((f" Home medications: {_listing(taken)}.", ""))
    shown = _quantities(rng, patient, QUANTITIES, rng.randint(1, 3))
    values = _listing([f"{q.name} {_amount(q, measure(rng, patient, q))}" for q in shown])
    place = "the intensive care unit" if patient.icu else "the ward"
    return (
        f"{opening}{home} On arrival {values}. Assessment: {patient.grade} {sick.name}. "
        f"Plan: {rng.choice(sick.procedures)}, {rng.choice(sick.drugs)}, admit to {place}."
    )


def _nursing(rng: random.Random, patient: Patient) -> str:
    state = {
        "mild": ("alert and oriented", "comfortable, no complaints", "walking with help"),
        "moderate": ("drowsy but rousable", "restless at times", "tired, needs assistance"),
        "severe": ("sedated and ventilated", "unresponsive to voice", "confused and agitated"),
    }[patient.grade]
    air = ("room air", "oxygen by nasal cannula", "mechanical ventilation")
    breathing = air[min(2, int(patient.severity * 3.2))]
    shown = _quantities(rng, patient, VITALS, rng.randint(1, 3))
    values = _listing([f"{q.name} {_amount(q, measure(rng, patient, q))}" for q in shown])
    family = rng.choice((
        "Family at the bedside and updated.", "Skin intact, turned every two hours.",
        "Pain controlled, will continue to monitor.", "Fall precautions in place.",
        "Physician notified of changes.", "Lines are clean and dry.",
    ))  # fmt: skip
    shift = rng.choice(("day", "evening", "night"))
    drug = rng.choice(patient.condition.drugs)
    effect = rng.choice(("as ordered", "with good effect", "with little effect"))
    return (
        f"Nursing note, {shift} shift. Patient {rng.choice(state)}, on {breathing}. "
        f"{values[0].upper()}{values[1:]}. Received {drug} {effect}. {family}"
    )


def _vitals(rng: random.Random, patient: Patient) -> str:
    lines = []
    for quantity in _quantities(rng, patient, VITALS, rng.randint(3, 6)):
        value = measure(rng, patient, quantity)
        lines.append(f"{quantity.name} {_amount(quantity, value)} {judge(quantity, value)}")
    return f"Vital signs at hour {rng.randint(0, 47)}: {'; '.join(lines)}."


def _laboratory(rng: random.Random, patient: Patient) -> str:
    lines, telling = [], False
    for quantity in _quantities(rng, patient, LABS, rng.randint(2, 7)):
        value = measure(rng, patient, quantity)
        word = judge(quantity, value)
        telling |= word != "normal" and quantity.name in patient.condition.effects
        lines.append(f"{quantity.name} {_amount(quantity, value)} {word}")
    reading = (
        f", consistent with {patient.grade} {patient.condition.name}"
        if telling
        else ", no specific pattern"
    )
    return f"Laboratory results: {', '.join(lines)}{reading}."


def _trend(rng: random.Random, patient: Patient) -> str:
    """A series over hours and its own true statistics."""
    quantity = _quantities(rng, patient, QUANTITIES, 1)[0]
    values = [measure(rng, patient, quantity) for _ in range(rng.randint(3, 6))]
    half = (quantity.high - quantity.low) / 2
    drift = values[-1] - values[0]
    course = "stable" if abs(drift) < 0.6 * half else "rising" if drift > 0 else "falling"
    written = [f"{v:.{quantity.decimals}f}" for v in values]
    mean = fmean(values)
    return (
        f"{quantity.name} over {rng.choice((6, 12, 24, 48))} hours: {', '.join(written)}; "
        f"first {written[0]}, last {written[-1]}, minimum {min(values):.{quantity.decimals}f}, "
        f"maximum {max(values):.{quantity.decimals}f}, mean {_amount(quantity, mean)}, "
        f"{judge(quantity, mean)}, {course}."
    )


def _imaging(rng: random.Random, patient: Patient) -> str:
    sentences = []
    for finding in patient.findings:
        phrase = rng.choice(FINDINGS[finding])
        where = "" if finding in CENTRAL else f" in the {rng.choice(PLACES)}"
        change = rng.choice(("new", "unchanged", "worse", "improved"))
        sentences.append(rng.choice((
            f"There is {patient.grade} {phrase}{where}.",
            f"{phrase[0].upper()}{phrase[1:]}{where}, {patient.grade}.",
            f"{patient.grade.capitalize()} {finding}, {change}.",
        )))  # fmt: skip
    absent = [f for f in FINDINGS if f not in patient.findings]
    denied = _listing(rng.sample(absent, rng.randint(1, 3)), "or")
    sentences.append(rng.choice((f"No {denied}.", f"No evidence of {denied}.")))
    if patient.icu and rng.random() < 0.6:
        sentences.append(f"The {rng.choice(DEVICES)} is {rng.choice(('in place', 'unchanged'))}.")
    rng.shuffle(sentences)
    view = rng.choice(("portable", "upright", "two view", "supine"))
    conclusion = _listing(patient.findings) if patient.findings else "no acute disease"
    return f"Chest film, {view}. {' '.join(sentences)} Impression: {conclusion}."


def _procedure(rng: random.Random, patient: Patient) -> str:
    act = rng.choice(patient.condition.procedures)
    trouble = rng.choice(("minor bleeding, controlled", "low blood pressure", "repeated once"))
    end = "no complications" if rng.random() > 0.3 * patient.severity else trouble
    return (
        f"Procedure: {act}. Indication: {patient.grade} {patient.condition.name}. "
        f"{rng.choice(('Consent obtained. ', 'Done as an emergency. ', ''))}Course: {end}."
    )


def _medication(rng: random.Random, patient: Patient) -> str:
    given = list(patient.condition.drugs) + rng.sample(HOME_DRUGS, rng.randint(1, 3))
    rng.shuffle(given)
    return f"Medications for {patient.condition.name}: {'; '.join(given)}."


def _outcome(rng: random.Random, patient: Patient) -> str:
    if patient.died:
        return "died in hospital"
    frail = patient.severity * 0.6 + patient.age / 200
    return "discharged home" if rng.random() > frail else "discharged to a nursing facility"


def _discharge(rng: random.Random, patient: Patient) -> str:
    length = f"{patient.days} day{'s' if patient.days > 1 else ''}"
    stay = f"stayed {length}" + (", including the intensive care unit" if patient.icu else "")
    treatment = _listing(rng.sample(patient.condition.drugs, min(2, len(patient.condition.drugs))))
    return (
        f"Discharge summary. {patient.who} admitted for {patient.grade} {patient.condition.name}, "
        f"treated with {treatment} and {rng.choice(patient.condition.procedures)}, {stay}. "
        f"Outcome: {_outcome(rng, patient)}."
    )


def _questions(rng: random.Random, patient: Patient) -> str:
    """Short answers, so that yes and no mean something to the model."""
    illness = rng.choice((*CHRONIC, *patient.chronic))
    facts = {
        "died in hospital": patient.died,
        "intensive care": patient.icu,
        "stay longer than two days": patient.days > 2,
        "older than 70": patient.age > 70,
        illness: illness in patient.chronic,
        **{f: f in patient.findings for f in rng.sample(tuple(FINDINGS), 3)},
    }
    chosen = rng.sample(tuple(facts), 4)
    asked = " ".join(f"{name}? {'yes' if facts[name] else 'no'}." for name in chosen)
    history = _listing(patient.chronic) if patient.chronic else "nothing of note"
    seen = _listing(patient.findings) if patient.findings else "clear lungs"
    return (
        f"Summary: {patient.who}, {patient.grade} {patient.condition.name}, history of "
        f"{history}, film shows {seen}. {asked}"
    )


KINDS: tuple[Callable[[random.Random, Patient], str], ...] = (
    _admission, _nursing, _vitals, _laboratory, _trend, _imaging, _procedure, _medication,
    _discharge, _questions,
)  # fmt: skip


def documents(seed: int | str) -> Iterator[str]:
    """Endless documents, a function of the seed alone; each is about a patient of its own."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(KINDS)(rng, invent(rng))

"""What to look at first: the facts that a person should weigh before training, worst first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from client.site.shard.report.facts import FEW_POSITIVES, OUTSIDE, Task
from client.site.shard.report.leakage import SEPARATES
from client.site.shard.report.words import count, of, percent, value

if TYPE_CHECKING:
    from client.site.shard.report import Facts

Level = Literal["act", "check", "know"]
LEVELS: tuple[Level, ...] = ("act", "check", "know")

_FEW_PATIENTS = 100
_OUTSIDE_BADLY = 0.2
_LATE, _BLIND, _AT_CUTOFF = 0.5, 0.05, 0.2
_LARGE_PATIENT = 0.05
_AGE_UNKNOWN = 0.2
_NAMED = 6


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        level: ``act`` before training, ``check`` whether it is meant so, ``know`` when reading
            results.
        section: Anchor of the section that shows more.
    """

    level: Level
    title: str
    text: str
    section: str


def findings(facts: Facts) -> tuple[Finding, ...]:
    found = [
        *_labels(facts),
        *_leakage(facts),
        *_missingness(facts),
        *_ranges(facts),
        *_files(facts),
        *_shape(facts),
    ]
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _labels(facts: Facts) -> Iterator[Finding]:
    for task in facts.tasks:
        problem = label_problem(task)
        if problem:
            level: Level = "act" if not (task.true and task.false) else "check"
            yield Finding(level, f"Label {task.name}: {problem}", _LABEL_ADVICE, "labels")


_LABEL_ADVICE = (
    "The hospital can hardly learn this task or measure it alone. Leave the task out here, or know "
    "that its figures mean little."
)


def label_problem(task: Task) -> str:
    """What keeps a task from being learnt here, in a few words; empty if nothing."""
    if not task.known:
        return "no record has a known label"
    if not task.true or not task.false:
        return f"every known label is {'true' if task.true else 'false'}"
    if task.patients_true < FEW_POSITIVES:
        return f"only {of(task.patients_true, 'patient')} with a true label"
    if task.patients_false < FEW_POSITIVES:
        return f"only {of(task.patients_false, 'patient')} with a false label"
    return ""


def _leakage(facts: Facts) -> Iterator[Finding]:
    leakage = facts.leakage
    for series in leakage.series:
        if series.flagged:
            what = "Whether a record has" if series.kind == "presence" else "The last value of"
            if series.kind == "record":
                what = "The record's"
            yield Finding(
                "act",
                f"{what} {series.name} alone separates {series.task} (AUROC {series.auroc:.2f})",
                f"A single input above {SEPARATES} is seldom medicine. Is it recorded after the "
                "outcome, or because of it?",
                "leakage",
            )
    by_task: dict[str, list[str]] = {}
    for word in leakage.words:
        if word.flagged:
            name = f"“{word.word}”" + (" (negated)" if word.form == "negated" else "")
            by_task.setdefault(word.task, []).append(name)
    for task, names in by_task.items():
        yield Finding(
            "act",
            f"Notes may tell the label {task}",
            f"Notes before the cutoff hold {_listed(names)} far more often on one side. Are the "
            "notes' hours the hours at which they were filed?",
            "leakage",
        )
    for group in leakage.groups:
        yield Finding(
            "check",
            f"{group.task} is nearly constant where a record sees {group.source} “{group.name}”",
            f"{percent(group.share)} true there, {percent(group.share_elsewhere)} elsewhere: the "
            "model may learn who is examined how, rather than what is seen.",
            "leakage",
        )
    if leakage.twin_stays:
        yield Finding(
            "act",
            f"{of(leakage.twin_stays, 'stay')} of different patients with identical inputs",
            "One person under two ids would count as two, and could train and validate at once.",
            "leakage",
        )
    if leakage.contradicting:
        yield Finding(
            "check",
            f"{of(leakage.contradicting, 'record')} with the same inputs as another of the stay, "
            "but another label",
            "No model can tell them apart. Do the cutoffs differ as they should?",
            "leakage",
        )


def _missingness(facts: Facts) -> Iterator[Finding]:
    seen = facts.missingness
    if seen.without_input:
        share = seen.without_input / seen.records
        yield Finding(
            "act" if share >= _BLIND else "know",
            f"{of(seen.without_input, 'record')} without any input ({percent(share)})",
            "Only age and sex speak for them. Are hours and cutoffs counted from the same moment?",
            "missing",
        )
    stamped = [
        f"{source.name} in {percent(source.at_cutoff / seen.records)}"
        for source in seen.sources
        if source.at_cutoff > _AT_CUTOFF * seen.records and source.name != "image"
    ]
    if stamped:
        yield Finding(
            "check",
            f"Inputs at exactly the cutoff: {', '.join(stamped)} of records",
            "A summary that is stamped with the cutoff may describe what came before it only, or "
            "what was known later. Which is it?",
            "leakage",
        )
    for source in seen.sources:
        if source.never > _LATE * source.inputs:
            yield Finding(
                "check",
                f"{percent(source.never / source.inputs)} of {source.name} inputs are never read",
                "They become available after the last cutoff of their stay.",
                "missing",
            )
        if source.skipped:
            yield Finding(
                "know",
                f"{of(source.skipped, f'{source.name} event')} without a finite value",
                "They are skipped.",
                "missing",
            )
    others = [item.name for item in seen.items if not item.canonical]
    if others:
        yield Finding(
            "check",
            f"{count(len(others))} series without a canonical name",
            f"No study reads {_listed(others)}. Rename what is the same quantity in the same unit.",
            "missing",
        )


def _ranges(facts: Facts) -> Iterator[Finding]:
    for row in facts.ranges:
        name, unit = row.spec.name, row.spec.unit
        if row.hint:
            who = "" if row.hint.share == 1 else f"{percent(row.hint.share)} of "
            yield Finding(
                "act",
                f"{who}{name} may be in {row.hint.unit}",
                f"The median is {value(row.hint.median)}; read as {row.hint.unit}, "
                f"{'it' if row.hint.share == 1 else 'those values'} would be "
                f"{value(row.hint.converted)} {unit}, which is usual.",
                "ranges",
            )
        elif row.outside >= OUTSIDE:
            yield Finding(
                "act" if row.outside >= _OUTSIDE_BADLY else "check",
                f"{percent(row.outside)} of {name} lie outside plausible limits",
                f"Limits are {value(row.spec.low)} to {value(row.spec.high)} {unit}; encoders hold "
                "values to them.",
                "ranges",
            )
        if row.constant and row.values.n >= FEW_POSITIVES:
            yield Finding(
                "check",
                f"{name} is always {value(row.values.median)}",
                "A series that never changes tells nothing. Is it a default?",
                "ranges",
            )


def _files(facts: Facts) -> Iterator[Finding]:
    images, notes = facts.pictures, facts.texts
    if images:
        seen = f"Opened: {of(images.looked_at, 'file')}."
        if images.unreadable:
            title = f"{of(images.unreadable, 'image file')} cannot be read"
            yield Finding("act", title, f"{seen} fedward shard check names them.", "images")
        if images.inverted:
            share = images.inverted / images.looked_at
            yield Finding(
                "act" if share >= _BLIND else "check",
                f"{of(images.inverted, 'image')} may be inverted ({percent(share)})",
                f"{seen} Bright where air should be dark: MONOCHROME1 that was not turned round?",
                "images",
            )
        if images.repeated:
            across = images.across_patients
            yield Finding(
                "act" if across else "check",
                f"{of(images.repeated, 'image file')} with the content of another",
                f"{seen} With more than one patient: {of(across, 'content')}.",
                "images",
            )
    if notes:
        if notes.empty:
            title = f"{of(notes.empty, 'note')} without text"
            yield Finding("check", title, "Was the text lost in the export?", "notes")
        if notes.across_patients:
            yield Finding(
                "check",
                f"{of(notes.across_patients, 'longer text')} shared by more than one patient",
                "A template, or one person under two ids?",
                "notes",
            )
    if facts.history and facts.history.broken:
        yield Finding("check", facts.history.broken, "Import the shard again.", "made")


def _shape(facts: Facts) -> Iterator[Finding]:
    summary = facts.summary
    if summary.patients < _FEW_PATIENTS:
        yield Finding(
            "know",
            f"Few patients: {count(summary.patients)}",
            "Noise that protects so few patients hides most of what they could teach; a study may "
            "also ask for more.",
            "summary",
        )
    if summary.largest_patient >= _LARGE_PATIENT and summary.records > summary.patients:
        yield Finding(
            "know",
            f"One patient has {percent(summary.largest_patient)} of all records",
            "A step draws only a few records of a patient; many records of few patients teach less "
            "than their number says.",
            "summary",
        )
    if summary.age_unknown >= _AGE_UNKNOWN * summary.patients:
        share = percent(summary.age_unknown / summary.patients)
        yield Finding(
            "know",
            f"Age is unknown for {share} of patients",
            "Encoders see a flag in its place.",
            "summary",
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")

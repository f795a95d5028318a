"""Hints that an input tells the label: words of the label in notes, one series that separates it.

Everything here is a hint. A strong single predictor may be good medicine, and a leak may hide from
all of these looks. Only what a record sees is looked at (hours <= cutoff).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl
from scipy.stats import fisher_exact

from client.site.shard.report.inputs import Inputs
from client.site.shard.shard import Shard

FEWEST = 10
"""Patients that a task needs on either side before a separation is shown."""
SEPARATES = 0.95
"""AUROC of one series alone from which it is flagged."""
SMALL_CELL = 5
"""Counts of words by label below this are not shown."""
_ODDS, _P = 5.0, 0.001
_NEARLY = 0.9
_AWAY = 0.2
NOTES_OF = 5000
"""Most records whose notes are searched for words."""

# Task words (as in the label's name): phrases that would tell it. Phrases are regular expressions,
# matched as whole words, case ignored.
_OUTCOME = {
    "expired": "expired",
    "deceased": "deceased|passed away|pronounced dead|time of death|autopsy",
    "comfort care": "comfort (?:care|measures)|cmo|hospice|palliative|withdrawal of care",
    "discharged": "discharged|discharge (?:home|summary|date|disposition|diagnosis)",
}
_CONCEPTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("mortality|death|dead|died|survival", {"died": "died|dies|death|dead|fatal"}),
    ("readmission|readmitted", {"readmitted": "re-?admi(?:tted|ssion)"}),
    ("los|stay|length", {"length of stay": "length of stay|los|(?:hospital|icu) day [0-9]+"}),
    ("icu", {"to the ICU": "(?:to|in) (?:the )?(?:icu|intensive care)|icu admission"}),
    ("pneumonia", {"pneumonia": "(?:broncho)?pneumonias?"}),
    ("consolidation", {"consolidation": "consolidations?|consolidated"}),
    ("edema|oedema", {"oedema": "o?edema|pulmonary congestion|fluid overload"}),
    (
        "cardiomegaly|cardiomediastinum",
        {"cardiomegaly": "cardiomegaly|enlarged (?:heart|cardiac silhouette|cardiomediastinum)"},
    ),
    ("atelectasis", {"atelectasis": "atelecta(?:sis|ses|tic)"}),
    ("effusion", {"effusion": "effusions?"}),
    ("pneumothorax", {"pneumothorax": "pneumothora(?:x|ces)"}),
    ("fracture", {"fracture": "fractures?|fractured"}),
    ("lesion|nodule|mass", {"lesion": "lesions?|nodules?|mass(?:es)?"}),
    ("opacity", {"opacity": "opacit(?:y|ies)|infiltrates?"}),
    ("devices", {"devices": "pacemaker|endotracheal tube|picc|central line|devices?"}),
    ("finding", {"no finding": "no (?:acute|relevant)? ?(?:finding|abnormalit|process)\\w*"}),
    ("sepsis|septic", {"sepsis": "sepsis|septic"}),
    ("aki|kidney|renal", {"kidney injury": "aki|(?:acute )?(?:kidney|renal) (?:injury|failure)"}),
    ("ventilation|ventilated|intubation", {"ventilated": "ventilated|intubated|ventilator"}),
    ("stroke", {"stroke": "strokes?|cva|infarct(?:ion)?"}),
    ("failure|chf", {"heart failure": "heart failure|chf"}),
)
_NEGATED = (
    r"\b(?:no|not|without|denies|negative for|absence of|free of|resolved|ruled out)"
    r"\b(?:\W+\w+){{0,3}}?\W+(?:{0})\b"
)


@dataclass(frozen=True)
class WordHint:
    """A phrase in the notes against a label, over records with a known label and a visible note.

    Attributes:
        form: ``said`` (at least once without a negation before it) or ``negated``.
        with_true, with_false: Records that have it, by label.
        true, false: All such records.
        auroc: Of having it, for the label.
        flagged: Odds ratio of 5 or more (either way), Fisher's exact p < 0.001 over the number of
            phrases looked at.
    """

    task: str
    word: str
    form: str
    with_true: int
    with_false: int
    true: int
    false: int
    auroc: float
    flagged: bool


@dataclass(frozen=True)
class SeriesHint:
    """One input on its own against a label.

    Attributes:
        kind: ``last value``, ``presence``, or ``record`` for what the record itself says.
        n: Records compared.
        auroc: At least 0.5; `higher` says whether the label is true with higher values (or with
            presence).
    """

    task: str
    source: str
    name: str
    kind: str
    n: int
    auroc: float
    higher: bool

    @property
    def flagged(self) -> bool:
        return self.auroc > SEPARATES


@dataclass(frozen=True)
class GroupHint:
    """A view or category in which a label is nearly constant, and is not elsewhere.

    Attributes:
        n: Records with a known label that see it.
        share, share_elsewhere: True labels among them and among the others.
    """

    task: str
    source: str
    name: str
    n: int
    share: float
    share_elsewhere: float


@dataclass(frozen=True)
class Leakage:
    """All hints.

    Attributes:
        compared: Tasks with enough patients on both sides; other tasks were not compared.
        phrases: How many phrases were looked for, in all tasks and both forms.
        records_read: Records whose notes were searched.
        words: Phrases that occur, the strongest first.
        series: The strongest single inputs, per task in falling order.
        groups: Nearly constant labels.
        twin_stays: Stays of different patients with the same inputs (5 or more, identical).
        twin_records: Records that see exactly what an earlier record of their stay sees.
        contradicting: Of these, those whose known labels differ from it.
    """

    compared: tuple[str, ...]
    phrases: int
    records_read: int
    words: tuple[WordHint, ...]
    series: tuple[SeriesHint, ...]
    groups: tuple[GroupHint, ...]
    twin_stays: int
    twin_records: int
    contradicting: int


def leakage(shard: Shard, inputs: Inputs) -> Leakage:
    known = {task: inputs.known(task) for task in inputs.tasks}
    compared = {
        task: labels
        for task, labels in known.items()
        if min(
            labels.filter(pl.col("label") == side)["patient"].n_unique() for side in (True, False)
        )
        >= FEWEST
    }
    words, phrases, read = _words(shard, inputs, compared)
    return Leakage(
        compared=tuple(compared),
        phrases=phrases,
        records_read=read,
        words=words,
        series=tuple(
            hint for task, labels in compared.items() for hint in _series(inputs, task, labels)
        ),
        groups=tuple(
            hint for task, labels in compared.items() for hint in _groups(inputs, task, labels)
        ),
        twin_stays=_twin_stays(shard),
        **_twin_records(inputs),
    )


def phrases_of(task: str) -> dict[str, str]:
    """Phrases that would tell a label, by what the page calls them: regular expressions.

    They are the task's own name, what is known of its parts (pneumonia, oedema, ...) and words of
    the end of a stay, which tell nearly every outcome.
    """
    parts = set(task.lower().split("_"))
    found = {task.replace("_", " "): re.escape(task.lower()).replace("_", r"[\s_-]+")}
    for names, phrases in _CONCEPTS:
        if parts & set(names.split("|")):
            found |= phrases
    return found | _OUTCOME


def _words(
    shard: Shard, inputs: Inputs, compared: dict[str, pl.DataFrame]
) -> tuple[tuple[WordHint, ...], int, int]:
    wanted = {(task, word): p for task in compared for word, p in phrases_of(task).items()}
    if shard.notes is None or shard.notes.is_empty() or not wanted:
        return (), 0, 0
    patterns = sorted(set(wanted.values()))
    text = pl.col("text").str.to_lowercase()
    records = shard.records.select(
        "stay_id", "cutoff_hours", record=pl.int_range(pl.len(), dtype=pl.UInt32)
    )
    chosen = records.gather_every(-(-records.height // NOTES_OF))
    # Only flags are joined to records, never the text.
    counts = shard.notes.join(chosen, on="stay_id", how="semi").select(
        "stay_id",
        "hours",
        **{f"all{i}": text.str.count_matches(rf"\b(?:{p})\b") for i, p in enumerate(patterns)},
        **{f"not{i}": text.str.count_matches(_NEGATED.format(p)) for i, p in enumerate(patterns)},
    )
    numbers = range(len(patterns))
    seen = (
        chosen.join(counts, on="stay_id")
        .filter(pl.col("hours") <= pl.col("cutoff_hours"))
        .group_by("record")
        .agg(
            *((pl.col(f"all{i}") > pl.col(f"not{i}")).any().alias(f"said{i}") for i in numbers),
            *((pl.col(f"not{i}") > 0).any().alias(f"negated{i}") for i in numbers),
        )
    )
    looked_at = 2 * len(wanted)
    hints = []
    for (task, word), pattern in wanted.items():
        labels = compared[task].join(seen, on="record")
        label = labels["label"].to_numpy()
        true, false = int(label.sum()), int((~label).sum())
        if not true or not false:
            continue
        for form in ("said", "negated"):
            has = labels[f"{form}{patterns.index(pattern)}"].to_numpy()
            a, b = int((has & label).sum()), int((has & ~label).sum())
            if a + b:
                p = float(fisher_exact([[a, b], [true - a, false - b]]).pvalue)
                # Haldane's half in every cell: a cell of 0 is the strongest hint there is.
                odds = (a + 0.5) * (false - b + 0.5) / ((b + 0.5) * (true - a + 0.5))
                flagged = p < _P / looked_at and max(odds, 1 / odds) >= _ODDS
                auroc = 0.5 + 0.5 * (a / true - b / false)
                hints.append(WordHint(task, word, form, a, b, true, false, auroc, flagged))
    hints.sort(key=lambda hint: (not hint.flagged, -abs(hint.auroc - 0.5)))
    return tuple(hints), looked_at, chosen.height


def _series(inputs: Inputs, task: str, labels: pl.DataFrame) -> list[SeriesHint]:
    """Every single input of a task that can be compared, the strongest first."""
    seen = inputs.seen.join(labels, on="record")
    values = aurocs(seen.drop_nulls("value").rename({"value": "score"}), "item")
    present = (
        seen.group_by("item")
        .agg(true=pl.col("label").sum(), false=(~pl.col("label")).sum())
        .select(
            "item",
            n=pl.lit(labels.height),
            auroc=0.5
            + 0.5 * (pl.col("true") / labels["label"].sum())
            - 0.5 * (pl.col("false") / (~labels["label"]).sum()),
        )
    )
    hints = []
    for kind, frame in (("last value", values), ("presence", present)):
        for source, name, n, auroc in (
            frame.join(inputs.items, on="item").select("source", "name", "n", "auroc").iter_rows()
        ):
            hints.append(
                SeriesHint(task, source, name, kind, n, max(auroc, 1 - auroc), auroc >= 0.5)
            )
    records = inputs.records.select(
        "record",
        "age",
        pl.col("cutoff").alias("cutoff hours"),
        inputs.n_seen.cast(pl.Float64).alias("number of inputs"),
    ).unpivot(index="record", variable_name="name", value_name="score")
    for name, n, auroc in aurocs(
        records.drop_nulls("score").join(labels, on="record"), "name"
    ).iter_rows():
        hints.append(
            SeriesHint(task, "record", name, "record", n, max(auroc, 1 - auroc), auroc >= 0.5)
        )
    return sorted(hints, key=lambda hint: (-hint.auroc, hint.name, hint.kind))


def aurocs(scores: pl.DataFrame, by: str) -> pl.DataFrame:
    """AUROC of a score per group, by ranks (Mann-Whitney; ties count half).

    Args:
        scores: Columns `by`, score, label (bool) and patient.

    Returns:
        Columns `by`, n (rows) and auroc; only groups with `FEWEST` patients on either side.
    """
    label = pl.col("label")
    n1, n0 = label.sum().cast(pl.Float64), (~label).sum().cast(pl.Float64)
    return (
        scores.with_columns(rank=pl.col("score").rank("average").over(by))
        .group_by(by, maintain_order=True)
        .agg(
            pl.len().alias("n"),
            ((pl.col("rank").filter(label).sum() - n1 * (n1 + 1) / 2) / (n1 * n0)).alias("auroc"),
            pl.col("patient").filter(label).n_unique().alias("true"),
            pl.col("patient").filter(~label).n_unique().alias("false"),
        )
        .filter((pl.col("true") >= FEWEST) & (pl.col("false") >= FEWEST))
        .select(by, "n", "auroc")
    )


def _groups(inputs: Inputs, task: str, labels: pl.DataFrame) -> list[GroupHint]:
    """Views of images and categories of notes."""
    items = inputs.items.filter(pl.col("source").is_in(["image", "note"]))
    true, n = int(labels["label"].sum()), labels.height
    seen = (
        inputs.seen.join(items, on="item")
        .join(labels, on="record")
        .group_by("source", "name")
        .agg(pl.len().alias("n"), pl.col("label").sum(), pl.col("patient").n_unique())
        .filter((pl.col("patient") >= FEWEST) & (pl.col("n") <= n - FEWEST))
        .sort("source", "name")
    )
    hints = []
    for source, name, inside, positive, _ in seen.iter_rows():
        share, elsewhere = positive / inside, (true - positive) / (n - inside)
        nearly = share >= _NEARLY or share <= 1 - _NEARLY
        if nearly and abs(share - elsewhere) >= _AWAY:
            hints.append(GroupHint(task, source, name, inside, share, elsewhere))
    return hints


def _twin_stays(shard: Shard) -> int:
    """Stays whose inputs are those of another patient's stay: hours and values, notes' texts."""
    stays = shard.records.select("stay_id", "patient_id").unique()
    parts = []
    for frame in (shard.events, shard.notes):
        if frame is not None and not frame.is_empty():
            rows = frame.drop("stay_id").hash_rows()
            parts.append(frame.select("stay_id").with_columns(rows.alias("hash")))
    if not parts:
        return 0
    # Sums do not depend on the order of rows; they wrap around, which is as good.
    digests = (
        pl.concat(parts)
        .group_by("stay_id")
        .agg(pl.len().alias("n"), pl.col("hash").sum())
        .filter(pl.col("n") >= 5)
        .join(stays, on="stay_id")
        .with_columns(people=pl.col("patient_id").n_unique().over("hash", "n"))
    )
    return int((digests["people"] > 1).sum())


def _twin_records(inputs: Inputs) -> dict[str, int]:
    """Records of a stay are nested: they see the same if they see as many."""
    labels = [f"y_{task}" for task in inputs.tasks]
    records = inputs.records.with_columns(inputs.n_seen.alias("n")).filter(pl.col("n") > 0)
    first = records.group_by("stay", "n").agg(pl.col("record").min().alias("first"))
    later = records.join(first, on=["stay", "n"]).filter(pl.col("record") > pl.col("first"))
    pairs = later.join(
        records.select("record", *labels), left_on="first", right_on="record", suffix="_first"
    )
    differs = pl.any_horizontal(
        (pl.col(name) != pl.col(f"{name}_first")).fill_null(False) for name in labels
    )
    return {
        "twin_records": pairs.height,
        "contradicting": pairs.filter(differs).height if pairs.height else 0,
    }

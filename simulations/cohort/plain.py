"""What plain logistic regression learns from the trees: ``python -m simulations.cohort.plain DIR``.

It reads the published layout by itself, without our importer: what can be learned from the cohort
is a property of its files. How clearly each source shows the axes was set by this yardstick alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from client.site.encoders.image import ImageDescriptor
from simulations.cohort.latent import FINDINGS, TASKS
from simulations.cohort.truth import auroc

_WIDE = 40
"""Columns from which on a source counts as wide."""


@dataclass(frozen=True)
class Records:
    """All records of some trees.

    Attributes:
        frame: One row per X-ray study within an admission with an ICU stay: subject_id, hadm_id,
            study_id, time, hospital, and the labels.
        sources: Features ``[N, d]`` by source, NaN where missing.
    """

    frame: pl.DataFrame
    sources: dict[str, np.ndarray]


def read(tree: Path, table: str) -> pl.DataFrame:
    frame = pl.read_csv(tree / f"{table}.csv.gz", infer_schema_length=None)
    times = [c for c in frame.columns if c.endswith("time") and frame[c].dtype == pl.String]
    return frame.with_columns(pl.col(times).str.to_datetime("%Y-%m-%d %H:%M:%S"))


def records(tree: Path) -> pl.DataFrame:
    """One row per study with labels as the tasks define them."""
    images = (
        read(tree, "cxr/mimic-cxr-2.0.0-metadata")
        .filter(pl.col("ViewPosition") != "LATERAL")
        .with_columns(
            time=pl.format(
                "{} {}",
                "StudyDate",
                pl.col("StudyTime").cast(pl.String).str.split(".").list.first().str.zfill(6),
            ).str.to_datetime("%Y%m%d %H%M%S")
        )
    )
    stays = read(tree, "hosp/admissions").join(
        read(tree, "icu/icustays").select("hadm_id").unique(), on="hadm_id"
    )
    labels = read(tree, "cxr/mimic-cxr-2.0.0-chexpert")
    names = {f: f.replace("_", " ").title() for f in FINDINGS}
    names["enlarged_cardiomediastinum"] = "Enlarged Cardiomediastinum"
    soon = pl.col("dischtime") - pl.col("time") <= pl.duration(hours=48)
    died = pl.col("deathtime").is_not_null()
    return (
        images.join(stays, on="subject_id")
        .filter(pl.col("time").is_between("admittime", "dischtime"))
        .join(labels, on=["subject_id", "study_id"])
        .join(read(tree, "hosp/patients"), on="subject_id")
        .select(
            "subject_id",
            "hadm_id",
            "study_id",
            "dicom_id",
            "time",
            male=(pl.col("gender") == "M").cast(pl.Float64),
            age=pl.col("anchor_age") + pl.col("time").dt.year() - pl.col("anchor_year"),
            hospital=pl.lit(tree.name),
            length_of_stay=(soon & ~died).cast(pl.Float64),
            mortality_48h=(soon & died).cast(pl.Float64),
            **{
                finding: pl.when(pl.col(name) >= 0).then(pl.col(name).cast(pl.Float64))
                for finding, name in names.items()
            },
        )
        .sort("study_id")
    )


def load(trees: Mapping[str, Path]) -> Records:
    """Records of all trees with features of each source, as far as available at each record."""
    frames = {name: records(tree) for name, tree in trees.items()}
    series = ("hosp/labevents", "icu/chartevents")
    lab, chart = (
        _stacked([_values(trees[n], table, frame) for n, frame in frames.items()])
        for table in series
    )
    procedure = _stacked([_procedures(trees[n], frame) for n, frame in frames.items()])
    texts = [text for n, frame in frames.items() for text in _texts(trees[n], frame)]
    words = CountVectorizer(ngram_range=(1, 2), min_df=15, binary=True).fit_transform(texts)
    descriptor = ImageDescriptor()
    pixels = []
    for name, frame in frames.items():
        for subject, study, dicom in frame.select("subject_id", "study_id", "dicom_id").iter_rows():
            folder = trees[name] / f"cxr/files/p{str(subject)[:2]}/p{subject}/s{study}"
            with Image.open(folder / f"{dicom}.jpg") as image:
                pixels.append(descriptor.encode([image])[0][0])
    frame = pl.concat(frames.values())
    return Records(
        frame,
        {
            "lab": lab,
            "chart": chart,
            "procedure": np.nan_to_num(procedure),
            "note": words.toarray().astype(float),
            "image": np.asarray(pixels, dtype=float),
            "demographics": frame.select("age", "male").to_numpy().astype(float),
        },
    )


def aurocs(
    data: Records, sources: Sequence[str], tasks: Sequence[str] = TASKS, folds: int = 4
) -> dict[str, float]:
    """Held-out AUROC per task of logistic regression on all these sources, by patient folds."""
    x = np.concatenate([_even(data.sources[source]) for source in sources], axis=1)
    fold = data.frame["subject_id"].to_numpy() % folds
    scores = {}
    for task in tasks:
        y = data.frame[task].to_numpy()
        known = np.isfinite(y)
        logit = np.full(len(y), np.nan)
        for held in range(folds):
            train, test = known & (fold != held), known & (fold == held)
            model = LogisticRegression(C=0.01, max_iter=300).fit(x[train], y[train] == 1)
            logit[test] = model.decision_function(x[test])
        scores[task] = auroc(logit[known], y[known] == 1) or float("nan")
    return scores


def _even(x: np.ndarray) -> np.ndarray:
    """Imputed by means, standardised; wide sources shrunk, so that none drowns the others."""
    x = SimpleImputer(keep_empty_features=True).fit_transform(x)
    scale = min(1.0, (_WIDE / x.shape[1]) ** 0.5)
    return np.asarray(scale * StandardScaler().fit_transform(x))


def _visible(tree: Path, table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Events joined to the records that may see them."""
    events = read(tree, table)
    # Laboratory values may lack the admission.
    key = "subject_id" if table == "hosp/labevents" else "hadm_id"
    joined = events.join(frame.select("study_id", "time", key), on=key)
    ago = pl.col("time") - pl.col("storetime")
    return joined.filter(ago.is_between(pl.duration(), pl.duration(days=30)))


def _values(tree: Path, table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Mean and last value of each item."""
    seen = _visible(tree, table, frame).filter(pl.col("valuenum").is_not_null())
    value = (
        pl.when(pl.col("itemid") == 223761)
        .then((pl.col("valuenum") - 32) / 1.8)
        .otherwise(pl.col("valuenum"))
    )
    item = pl.when(pl.col("itemid") == 223761).then(223762).otherwise(pl.col("itemid"))
    long = (
        seen.with_columns(itemid=item, valuenum=value)
        .sort("charttime")
        .group_by("study_id", "itemid", maintain_order=True)
        .agg(pl.col("valuenum").mean().alias("mean"), pl.col("valuenum").last().alias("last"))
        .unpivot(index=["study_id", "itemid"])
        .with_columns(pl.format("{}-{}", "itemid", "variable").alias("column"))
    )
    wide = long.pivot(on="column", index="study_id", values="value")
    return frame.select("study_id").join(wide, on="study_id", how="left").drop("study_id")


def _procedures(tree: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """Whether each procedure had begun."""
    events = read(tree, "icu/procedureevents").join(
        frame.select("study_id", "time", "hadm_id"), on="hadm_id"
    )
    seen = events.filter(pl.col("starttime") <= pl.col("time"))
    wide = (
        seen.select("study_id", pl.col("itemid").cast(pl.String), one=pl.lit(1.0))
        .unique()
        .sort("study_id", "itemid")
        .pivot(on="itemid", index="study_id", values="one")
    )
    return frame.select("study_id").join(wide, on="study_id", how="left").drop("study_id")


def _texts(tree: Path, frame: pl.DataFrame) -> list[str]:
    if not (tree / "note").exists():
        return [""] * frame.height
    seen = _visible(tree, "note/radiology", frame)
    text = seen.sort("storetime").group_by("study_id").agg(pl.col("text").str.join(" "))
    joined = frame.select("study_id").join(text, on="study_id", how="left", maintain_order="left")
    return joined["text"].fill_null("").to_list()


def _stacked(parts: list[pl.DataFrame]) -> np.ndarray:
    table = pl.concat(parts, how="diagonal")
    return table.select(sorted(table.columns)).to_numpy().astype(float)


def main(folder: Path) -> None:
    """Prints AUROC per task and source, of all sources together, and of the true risk."""
    trees = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    data = load(trees)
    columns = {source: aurocs(data, [source]) for source in data.sources}
    columns["all"] = aurocs(data, list(data.sources))
    truth = pl.concat([pl.read_parquet(tree / "truth.parquet") for tree in trees.values()])
    risk = data.frame.join(truth, on="study_id", how="left", maintain_order="left")
    columns["ceiling"] = {}
    for task in TASKS:
        known = risk.filter(pl.col(task).is_not_null())
        area = auroc(known[f"risk_{task}"].to_numpy(), known[task].to_numpy() == 1)
        columns["ceiling"][task] = area or float("nan")
    table = Table("task", "n", "true", *columns, box=SIMPLE)
    for task in TASKS:
        label = data.frame[task].drop_nulls()
        scores = [f"{column[task]:.3f}" for column in columns.values()]
        share = float(label.to_numpy().mean())
        table.add_row(task, str(len(label)), f"{share:.3f}", *scores)
    means = (f"{np.nanmean(list(column.values())):.3f}" for column in columns.values())
    table.add_row("macro", "", "", *means)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Exact metrics, for the hospital's own eyes; simulations may show them, marked so.

Nothing here is private. Files are readable by their owner only and hold no identifier of a patient
or record: patients are numbered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import FedwardError
from common.files import atomic_file

METRICS = ("auroc", "auprc", "precision", "recall", "f1")

_CELLS = 4_000_000  # of a [replicates, records] block of the bootstrap: 32 MB


def exact_metrics(
    logits: NDArray[np.floating],
    labels: NDArray[np.int8],
    patients: NDArray[np.integer],
    tasks: Sequence[str],
    *,
    threshold: float = 0.0,
    replicates: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics over records by scikit-learn, with percentile intervals from a bootstrap of patients.

    Records of a patient are drawn together: they are not independent (Efron & Tibshirani 1993,
    ch. 8). A record counts as predicted positive at `logit >= threshold`.

    Args:
        logits: `[N, K]`.
        labels: `[N, K]`; 1 true, 0 false, anything else unknown and left out of its task.
        patients: `[N]`, the same number for records of one patient.
        tasks: K names.

    Returns:
        `{"tasks": {task: {auroc, auprc, precision, recall, f1: float | None, "support": labelled
        records, "positives": those true, "invalid": labelled records with a score that is not a
        number, left out, "interval": {metric: [low, high] | None}}}, "macro": {"auroc", "auprc":
        float | None, "interval"}, "patients", "records"}`. None where a class is absent.
    """
    _, patient = np.unique(patients, return_inverse=True)
    count = int(patient.max()) + 1 if len(patient) else 0
    rng = np.random.default_rng(seed)
    drawn = (
        rng.multinomial(count, np.full(count, 1 / count), size=replicates)
        if count
        else np.zeros((replicates, 0), dtype=np.int64)
    )
    tail = (1 - confidence) / 2

    def interval(values: NDArray[np.float64]) -> list[float] | None:
        """Of the replicates in which the metric exists; None where it mostly does not."""
        finite = values[np.isfinite(values)]
        if len(finite) < max(1, replicates // 2):
            return None
        return [float(v) for v in np.quantile(finite, [tail, 1 - tail])]

    by_task: dict[str, Any] = {}
    resampled: dict[str, list[NDArray[np.float64]]] = {"auroc": [], "auprc": []}
    for index, task in enumerate(tasks):
        known = np.isin(labels[:, index], (0, 1))
        valid = known & ~np.isnan(logits[:, index])
        score = np.clip(logits[valid, index].astype(np.float64), -1e300, 1e300)
        truth = labels[valid, index] == 1
        values = _point(score, truth, threshold)
        copies = _bootstrap(score, truth, patient[valid], drawn, threshold)
        for name, kept in resampled.items():
            if values[name] is not None:
                kept.append(copies[name])
        by_task[task] = {
            **values,
            "support": int(valid.sum()),
            "positives": int(truth.sum()),
            "invalid": int((known & ~valid).sum()),
            "interval": {
                name: interval(copies[name]) if values[name] is not None else None
                for name in METRICS
            },
        }
    macro: dict[str, Any] = {"interval": {}}
    for name, kept in resampled.items():
        some = [t[name] for t in by_task.values() if t[name] is not None]
        macro[name] = float(np.mean(some)) if some else None
        macro["interval"][name] = interval(np.mean(kept, axis=0)) if kept else None
    return {"tasks": by_task, "macro": macro, "patients": count, "records": len(patient)}


def write_exact(
    folder: str | Path,
    number: int,
    logits: NDArray[np.floating],
    labels: NDArray[np.int8],
    rows_of_patient: Sequence[NDArray[np.integer]],
    tasks: Sequence[str],
) -> Path:
    """Writes `release-<number>.json` (metrics) and `.npz` (scores, labels, patient numbers).

    Both have mode 0600, the folder 0700; each file appears whole or not at all.

    Returns:
        The JSON file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    patients = np.full(len(logits), -1, dtype=np.int64)
    for patient, rows in enumerate(rows_of_patient):
        patients[rows] = patient
    target = folder / f"release-{number}.json"
    with atomic_file(target.with_suffix(".npz")) as file:
        np.savez_compressed(
            file,
            logits=logits.astype(np.float32),
            labels=labels.astype(np.int8),
            patients=patients,
            tasks=np.array(list(tasks), dtype=np.str_),
        )
    with atomic_file(target) as file:
        # Fewer replicates than a paper would use: sites wait for this.
        metrics = exact_metrics(logits, labels, patients, tasks, replicates=200)
        file.write(json.dumps(metrics, indent=2, allow_nan=False).encode() + b"\n")
    return target


def pooled_exact(site_folders: Mapping[str, Path] | Iterable[Path]) -> dict[str, Any]:
    """Exact metrics of a simulation, over the latest release of each site together.

    Args:
        site_folders: State folders of the sites, each with `exact/release-<n>.npz`.

    Returns:
        `exact_metrics` of all records together (a patient belongs to one site), and "sites":
        {site: {"patients", "records", "tasks": {task: {metric: value, "support", "positives"}}}}.

    Raises:
        FedwardError: No site has a release, or sites disagree on the tasks.
    """
    named = (
        dict(site_folders)
        if isinstance(site_folders, Mapping)
        else {Path(folder).name: Path(folder) for folder in site_folders}
    )
    parts: list[dict[str, Any]] = []
    sites: dict[str, Any] = {}
    for site, folder in sorted(named.items()):
        releases = sorted(
            (Path(folder) / "exact").glob("release-*.npz"),
            key=lambda path: int(path.stem.partition("-")[2]),
        )
        if not releases:
            continue
        with np.load(releases[-1], allow_pickle=False) as stored:
            parts.append({name: stored[name] for name in stored.files})
        own = json.loads(releases[-1].with_suffix(".json").read_text())
        sites[site] = {
            "patients": own["patients"],
            "records": own["records"],
            "tasks": {
                task: {k: v for k, v in values.items() if k not in ("interval", "invalid")}
                for task, values in own["tasks"].items()
            },
        }
    if not parts:
        raise FedwardError(
            "no site holds exact metrics", cure="let the simulation finish one evaluation first"
        )
    tasks = [str(task) for task in parts[0]["tasks"]]
    if any([str(task) for task in part["tasks"]] != tasks for part in parts):
        raise FedwardError(
            "the sites' exact metrics are of different tasks",
            cure="give each study an output folder of its own",
        )
    offset, patients = 0, []
    for part in parts:
        patients.append(part["patients"] + offset)
        offset += int(part["patients"].max(initial=-1)) + 1
    pooled = exact_metrics(
        np.concatenate([part["logits"] for part in parts]),
        np.concatenate([part["labels"] for part in parts]),
        np.concatenate(patients),
        tasks,
    )
    return {**pooled, "sites": sites}


def _point(
    score: NDArray[np.float64], truth: NDArray[np.bool_], threshold: float
) -> dict[str, float | None]:
    if not truth.any() or truth.all():
        return dict.fromkeys(METRICS)
    # Imported late: seconds that a daemon's start need not wait for.
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, score >= threshold, average="binary", zero_division=np.nan
    )
    values = {
        "auroc": roc_auc_score(truth, score),
        "auprc": average_precision_score(truth, score),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }
    return {name: float(v) if np.isfinite(v) else None for name, v in values.items()}


def _bootstrap(
    score: NDArray[np.float64],
    truth: NDArray[np.bool_],
    patient: NDArray[np.int64],
    drawn: NDArray[np.int64],
    threshold: float,
) -> dict[str, NDArray[np.float64]]:
    """The metrics of `_point` under each replicate's multiplicities `drawn [R, patients]`: the same
    definitions on weighted records, all replicates at once. NaN where one does not exist."""
    order = np.argsort(-score, kind="stable")
    score, truth, patient = score[order], truth[order], patient[order]
    ends = np.flatnonzero(np.diff(score, append=-np.inf))  # last record of each tied group
    above = int((score >= threshold).sum())
    out: dict[str, list[NDArray[np.float64]]] = {name: [] for name in METRICS}
    block = max(1, _CELLS // max(len(score), 1))
    for start in range(0, len(drawn), block):
        weight_RN = drawn[start : start + block][:, patient].astype(np.float64)
        zero = np.zeros((len(weight_RN), 1))
        true_RN = np.hstack([zero, np.cumsum(weight_RN * truth, axis=1)])
        false_RN = np.hstack([zero, np.cumsum(weight_RN * ~truth, axis=1)])
        positives, negatives = true_RN[:, -1], false_RN[:, -1]
        hit, wrong = true_RN[:, above], false_RN[:, above]
        groups = np.concatenate([[0], ends + 1])
        tp_RG, fp_RG = true_RN[:, groups], false_RN[:, groups]
        gained_RG = np.diff(tp_RG, axis=1)
        area = (np.diff(fp_RG, axis=1) * (tp_RG[:, 1:] + tp_RG[:, :-1]) / 2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precise_RG = tp_RG[:, 1:] / (tp_RG + fp_RG)[:, 1:]
            out["auroc"].append(area / (positives * negatives))
            summed = np.where(gained_RG > 0, gained_RG * precise_RG, 0.0).sum(axis=1)
            out["auprc"].append(summed / positives)
            out["precision"].append(hit / (hit + wrong))
            out["recall"].append(hit / positives)
            out["f1"].append(2 * hit / (hit + wrong + positives))
    return {name: np.concatenate(parts) for name, parts in out.items()}

"""What is measured of scores: per task, and macro over tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.site.evaluation.exact import exact_metrics

MEASURES = ("accuracy", "auroc", "auprc", "precision", "recall", "f1")
NAMES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "auprc": "mAP",
    "precision": "precision",
    "recall": "mAR",
    "f1": "mF1",
}
"""As the papers' tables call the mean over tasks."""


def on_everyone(
    logits: NDArray[np.floating],
    labels: NDArray[np.int8],
    patients: NDArray[np.integer],
    everyone: NDArray[np.int8],
) -> tuple[NDArray[np.floating], NDArray[np.int8], NDArray[np.integer]]:
    """The scores of all held-out records: those that an arm could not read get logit 0, the prior.

    Scores carry no identifier: which records are missing is known by their labels, all that a
    measure asks for. The bootstrap draws each of them by itself.

    Args:
        logits, labels, patients: See `measure`; of the records that have a score.
        everyone: Labels `[M, K]` of all held-out records.
    """
    rest = Counter(map(tuple, everyone.tolist())) - Counter(map(tuple, labels.tolist()))
    missing = np.array(list(rest.elements()), dtype=np.int8).reshape(-1, labels.shape[1])
    first = int(patients.max(initial=-1)) + 1
    return (
        np.concatenate([logits, np.zeros(missing.shape, dtype=logits.dtype)]),
        np.concatenate([labels, missing]),
        np.concatenate([patients, first + np.arange(len(missing))]),
    )


def measure(
    logits: NDArray[np.floating],
    labels: NDArray[np.int8],
    patients: NDArray[np.integer],
    tasks: Sequence[str],
    *,
    replicates: int = 200,
) -> dict[str, Any]:
    """Exact measures of held-out records, which only a simulation may show.

    Args:
        logits: `[N, K]`; positive at >= 0.
        labels: `[N, K]`; 1 true, 0 false, -1 unknown.
        patients: `[N]`.

    Returns:
        `{"tasks": {task: {measure: float | None, "support", "positives"}}, "macro": {measure: float
        | None}, "interval": [low, high] | None (macro AUROC, 95 %, bootstrap of patients),
        "patients", "records"}`. None where a class is absent; a task counts in a macro mean where
        its measure exists.
    """
    found = exact_metrics(logits, labels, patients, tasks, replicates=replicates)
    by_task: dict[str, dict[str, Any]] = {}
    for index, task in enumerate(tasks):
        values = found["tasks"][task]
        known = labels[:, index] >= 0
        right = (logits[known, index] >= 0) == (labels[known, index] == 1)
        accuracy = float(right.mean()) if values["auroc"] is not None else None
        by_task[task] = {
            "accuracy": accuracy,
            **{name: values[name] for name in MEASURES if name != "accuracy"},
            "support": values["support"],
            "positives": values["positives"],
        }
    macro: dict[str, float | None] = {}
    for name in MEASURES:
        some = [t[name] for t in by_task.values() if t[name] is not None]
        macro[name] = float(np.mean(some)) if some else None
    return {
        "tasks": by_task,
        "macro": macro,
        "interval": found["macro"]["interval"]["auroc"],
        "patients": found["patients"],
        "records": found["records"],
    }

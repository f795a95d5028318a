"""The HAIM benchmark: gradient-boosted trees on the concatenated embeddings (Soenksen et al. 2022,
as UNI-MLM's paper compares against it).

One XGBoost classifier per task on the embeddings of all sources side by side, hyper-parameters by
5-fold cross-validation over HAIM's grid: depth 5 to 8, 200 or 300 trees, learning rate .3, .1 or
.05. HAIM splits by stay, so that one patient can stand on both sides; here every split is by
patient, of the shard's validation patients and of the folds alike.

    python -m simulations.baselines.haim STUDY FOLDER [--local | --federated] [--one]

Pooled, the records of all hospitals lie in one place, as none would allow; `--local` trains each
hospital on its own, `--federated` all of them by exchanging trees (`fed_xgb`). None of it has
privacy, whatever the study's mode: epsilon is infinite, and the output says so first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from client.site.encoders.dataset import Dataset
from client.site.encoders.run import encode_site
from client.site.encoders.vault import Vault
from client.site.evaluation.exact import exact_metrics
from client.site.shard.shard import Shard
from common.study import Study
from simulations.run import find_shards

GRID: Mapping[str, Sequence[float]] = {
    "max_depth": (5, 6, 7, 8),
    "n_estimators": (200, 300),
    "learning_rate": (0.3, 0.1, 0.05),
}
ONE: Mapping[str, Sequence[float]] = {
    "max_depth": (6,),
    "n_estimators": (200,),
    "learning_rate": (0.1,),
}
"""One point of the grid, for a first look."""

_FOLDS = 5

Arrangement = Literal["pooled", "local", "federated"]
PRIVACY: Mapping[Arrangement, str] = {
    "pooled": "no privacy (epsilon infinite): all hospitals' records lie in one place",
    "local": "no exchange; the trees hold exact values of patients, and must stay at the hospital",
    "federated": "no privacy (epsilon infinite): every tree shows coordinator and hospitals exact "
    "values of patients",
}
"""What each arrangement shows of patients, and to whom."""


@dataclass(frozen=True)
class Table:
    """Records of one population.

    Attributes:
        x: `[N, D]` embeddings side by side; nan where a source is absent, which trees route.
        labels: `[N, K]` int8; -1 unknown.
        patients: `[N]` numbers of patients, apart between hospitals.
    """

    x: NDArray[np.float32]
    labels: NDArray[np.int8]
    patients: NDArray[np.int64]


def table_of(data: Dataset, first_patient: int = 0) -> Table:
    """A population's records: of each source the mean of its present tokens."""
    columns = []
    for source, e_NTd in data.inputs.items():
        mask_NT1 = data.present[source].numpy()[:, :, None]
        count = mask_NT1.sum(axis=1)
        total = np.where(mask_NT1, e_NTd.numpy(), 0.0).sum(axis=1)
        columns.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    patients = np.zeros(data.n_records, dtype=np.int64)
    for number, rows in enumerate(data.rows_of_patient):
        patients[rows] = first_patient + number
    return Table(np.concatenate(columns, axis=1).astype(np.float32), data.labels.numpy(), patients)


def pooled(tables: Sequence[Table]) -> Table:
    """All hospitals' records in one table."""
    return Table(
        np.concatenate([t.x for t in tables]),
        np.concatenate([t.labels for t in tables]),
        np.concatenate([t.patients for t in tables]),
    )


def fit_and_score(
    train: Table,
    validation: Table,
    *,
    grid: Mapping[str, Sequence[float]] = GRID,
    seed: int = 0,
    threads: int = 1,
) -> NDArray[np.float64]:
    """Logits `[N, K]` of the validation records, one classifier per task; 0 for a task of which
    training knows one class only.

    Folds are by patient; where a class has too few patients for them, the first point of the grid
    is taken.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from xgboost import XGBClassifier

    logits = np.zeros(validation.labels.shape)
    for task in range(train.labels.shape[1]):
        known = train.labels[:, task] >= 0
        x, y, patients = train.x[known], train.labels[known, task], train.patients[known]
        if len(set(y)) < 2:
            continue
        fewest = min(len(set(patients[y == label])) for label in (0, 1))
        first = {key: values[0] for key, values in grid.items()}
        booster = XGBClassifier(
            objective="binary:logistic", n_jobs=threads, random_state=seed, **first
        )
        if fewest >= _FOLDS and any(len(values) > 1 for values in grid.values()):
            folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
            search = GridSearchCV(
                booster, {k: list(v) for k, v in grid.items()}, scoring="roc_auc", cv=folds
            )
            booster = search.fit(x, y, groups=patients).best_estimator_
        else:
            booster.fit(x, y)
        logits[:, task] = booster.predict(validation.x, output_margin=True)
    return logits


def scores(
    trains: Sequence[Table],
    validations: Sequence[Table],
    arrangement: Arrangement,
    *,
    grid: Mapping[str, Sequence[float]] = GRID,
    seed: int = 0,
    threads: int = 1,
) -> NDArray[np.float64]:
    """Logits `[N, K]` of all hospitals' validation records, in the order of `pooled(validations)`.

    Args:
        trains, validations: One table per hospital, hospitals in the same order.
        arrangement: `pooled`: one booster on all records; `local`: each hospital scores its own
            records by its own trees; `federated`: one booster by exchanging trees.
    """
    if arrangement == "federated":
        # Knows the tables of this module; and Flower is wanted by this arrangement alone.
        from simulations.baselines import fed_xgb

        held = pooled(validations)
        return fed_xgb.fit_and_score(trains, held, grid=grid, seed=seed, threads=threads)
    if arrangement == "local":
        pairs = list(zip(trains, validations, strict=True))
    else:
        pairs = [(pooled(trains), pooled(validations))]
    return np.concatenate(
        [fit_and_score(t, v, grid=grid, seed=seed, threads=threads) for t, v in pairs]
    )


def evaluate(
    study: Study,
    shards: Mapping[str, Path],
    vaults: Path,
    *,
    arrangement: Arrangement = "pooled",
    grid: Mapping[str, Sequence[float]] = GRID,
) -> dict[str, Any]:
    """Exact metrics on validation patients, which no real hospital would release.

    Args:
        shards: Folder of each hospital.
        vaults: Folder for the encoded records, one vault per hospital.

    Returns:
        `exact_metrics` of all hospitals' scores together.
    """
    trains, validations, start = [], [], 0
    for name, path in shards.items():
        key = hashlib.sha256(f"haim {study.seed} {name}".encode()).digest()
        vault = Vault.open(vaults / name)
        site = encode_site(study, Shard.open(path), vault, population_key=key)
        vault.close()
        trains.append(table_of(site.train, start))
        start += site.train.n_patients
        validations.append(table_of(site.validation, start))
        start += site.validation.n_patients
    logits = scores(trains, validations, arrangement, grid=grid, seed=study.seed)
    held = pooled(validations)
    return exact_metrics(logits, held.labels, held.patients, list(study.tasks))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line per task, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", help="a study file, or the name of a ready one")
    parser.add_argument("shards", type=Path, help="folder of hospitals")
    parser.add_argument("--vaults", type=Path, default=Path("runs/haim"))
    kinds = parser.add_mutually_exclusive_group()
    for kind in get_args(Arrangement):
        kinds.add_argument(
            f"--{kind}", dest="arrangement", action="store_const", const=kind, help=PRIVACY[kind]
        )
    parser.set_defaults(arrangement="pooled")
    parser.add_argument("--one", action="store_true", help="one point of the grid")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    found = evaluate(
        Study.load(given.study),
        find_shards(given.shards),
        given.vaults,
        arrangement=given.arrangement,
        grid=ONE if given.one else GRID,
    )
    if given.json:
        about = {"arrangement": given.arrangement, "privacy": PRIVACY[given.arrangement]}
        print(json.dumps(about | found))
        return
    console = Console()
    console.print(f"{given.arrangement}: {PRIVACY[given.arrangement]}", highlight=False)
    for task, values in [*found["tasks"].items(), ("macro", found["macro"])]:
        shown = (f"{values[m]:.3f}" if values[m] is not None else "–" for m in ("auroc", "auprc"))
        console.print(f"{task:30} AUROC {next(shown)}  AUPRC {next(shown)}", highlight=False)


if __name__ == "__main__":
    main()

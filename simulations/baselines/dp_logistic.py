"""The baseline to beat: logistic regression under the same privacy, on the same features.

Every site runs patient-level DP-SGD on its own records (Poisson-sampled patients, each patient's
gradient clipped, Gaussian noise in float64, a declared denominator; Abadi et al. 2016) and sends
its weights after some steps; the coordinator averages them with constant weights (FedAvg). Noise is
local: full at each site, as in the privacy mode `local`. Features are those of the model: here
eleven statistics per series, age and sex; in a comparison the embeddings of the study's sources.

    python -m simulations.baselines.dp_logistic FOLDER --declared 350 550 900 650

prints the exact AUROC on held-out patients, which no site could release: for simulations only.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from client.site.encoders import series
from client.site.encoders.dataset import Dataset
from client.site.shard import clinical
from client.site.training.entropy import Entropy
from common.errors import ShardError, StudyError
from common.privacy.pricing import calibrate_noise_multiplier
from simulations.baselines.haim import Table, table_of


@dataclass(frozen=True)
class SiteArrays:
    """One record per patient of one site.

    Attributes:
        x: Features `[n, D]`.
        y: Labels `[n]`, 0 or 1.
        patients_declared: Public constant: denominator and weight in the average.
    """

    x: np.ndarray
    y: np.ndarray
    patients_declared: int


@dataclass(frozen=True)
class Recipe:
    """What is tuned; every number is public.

    Attributes:
        learning_rate: Step of plain gradient descent.
        momentum: Within a round; sites keep no state between rounds.
        sample_rate: q, a patient's probability to enter a step.
        rounds, local_steps: Steps are their product.
        max_grad_norm: C, the bound on a patient's gradient (ignored without privacy).
        prevalence: Public share of positives; its logit is the fixed intercept.
        average_last: The weights are the mean over this last fraction of the rounds.
        spare: Extra steps that are priced too, as a study's spare rounds are.
    """

    learning_rate: float
    momentum: float = 0.0
    sample_rate: float = 0.2
    rounds: int = 10
    local_steps: int = 10
    max_grad_norm: float = 1.0
    prevalence: float = 0.14
    average_last: float = 0.5
    spare: float = 0.1


def recipe_for(epsilon: float | None) -> Recipe:
    """The recipe tuned for PhysioNet 2012 on an inner split of the training patients."""
    if epsilon is None:
        return Recipe(learning_rate=1.0, momentum=0.9)
    return Recipe(learning_rate=4.0 if epsilon >= 4 else 1.5)


def fit_dp_logistic(
    sites: Sequence[SiteArrays],
    *,
    epsilon: float | None,
    delta: float,
    recipe: Recipe,
    seed: int | None = None,
) -> np.ndarray:
    """Federated logistic regression.

    Args:
        sites: At least one; all with the same number of features D.
        epsilon: Of each site's patients, at `delta`, for all (and spare) steps; None: no privacy.
        recipe: See there.
        seed: Reproducible sampling and noise, **which is not private**; None draws both from the
            operating system.

    Returns:
        Weights `[D]`; the score of a record is ``x @ weights + logit(prevalence)``.

    Raises:
        PrivacyError: epsilon or delta that means no privacy.
    """
    steps = recipe.rounds * recipe.local_steps
    noise_multiplier = 0.0
    if epsilon is not None:
        noise_multiplier = calibrate_noise_multiplier(
            epsilon, delta, recipe.sample_rate, math.ceil(steps * (1 + recipe.spare))
        )
    entropies = [
        Entropy() if seed is None else Entropy.seeded(f"{seed}/{number}")
        for number in range(len(sites))
    ]
    share = np.array([site.patients_declared for site in sites], dtype=float)
    share /= share.sum()
    weights = np.zeros(sites[0].x.shape[1])
    kept: list[np.ndarray] = []
    for number in range(recipe.rounds):
        trained = [
            _local_round(site, weights, noise_multiplier, recipe, entropy)
            for site, entropy in zip(sites, entropies, strict=True)
        ]
        weights = share @ np.stack(trained)
        if number >= recipe.rounds * (1 - recipe.average_last):
            kept.append(weights)
    return np.mean(kept, axis=0) if kept else weights


def clipped_sum(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, intercept: float, max_grad_norm: float | None
) -> np.ndarray:
    """Sum over patients of the gradient of the logistic loss, each at most `max_grad_norm` long.

    A patient's gradient is `r x` with residual r, so its norm is `|r| ||x||`: no gradient needs to
    be formed. A patient with a value that is not finite contributes zero.
    """
    whole = np.isfinite(x).all(axis=1)
    x, y = x[whole], y[whole]
    residual = expit(x @ weights + intercept) - y
    if max_grad_norm is not None:
        norm = np.abs(residual) * np.sqrt(np.square(x).sum(axis=1))
        # A little above the norm, so that rounding cannot carry a gradient past the bound.
        residual *= np.minimum(1, max_grad_norm / np.maximum(norm * (1 + 1e-12), 1e-300))
    return residual @ x


def _local_round(
    site: SiteArrays,
    start: np.ndarray,
    noise_multiplier: float,
    recipe: Recipe,
    entropy: Entropy,
) -> np.ndarray:
    weights, velocity = start.copy(), np.zeros_like(start)
    intercept = math.log(recipe.prevalence / (1 - recipe.prevalence))
    clip = recipe.max_grad_norm if noise_multiplier else None
    for _ in range(recipe.local_steps):
        chosen = entropy.patients.uniforms(len(site.y)) <= recipe.sample_rate
        total = torch.from_numpy(
            clipped_sum(site.x[chosen], site.y[chosen], weights, intercept, clip)
        )
        if noise_multiplier:
            entropy.noise.add_gaussians_(total, noise_multiplier * recipe.max_grad_norm)
        gradient = total.numpy() / (recipe.sample_rate * site.patients_declared)
        velocity = recipe.momentum * velocity + gradient
        weights = weights - recipe.learning_rate * velocity
    return weights


def features(records: pl.DataFrame, events: pl.DataFrame) -> np.ndarray:
    """All canonical series of all kinds, age and sex, `[n, D]` float64."""
    parts = []
    for kind in ("chart", "lab", "procedure"):
        names = [name for source, name in clinical.SERIES if source == kind]
        parts.append(series.statistics(events, records, kind, names)[0])
    parts.append(series.demographics(records)[0])
    return np.concatenate(parts, axis=1).astype(np.float64)


def features_of(table: Table) -> np.ndarray:
    """Embeddings side by side, zero where a source is absent, `[N, D]` float64."""
    return np.nan_to_num(table.x, nan=0.0).astype(np.float64)


def arrays_of(data: Dataset, patients_declared: int) -> SiteArrays:
    """Of each patient the first record whose label, the study's only one, is known."""
    table = table_of(data)
    known = np.flatnonzero(table.labels[:, 0] >= 0)
    rows = known[np.unique(table.patients[known], return_index=True)[1]]
    y = table.labels[rows, 0].astype(np.float64)
    return SiteArrays(features_of(table)[rows], y, patients_declared)


def trains_by_hash(patient_id: str) -> bool:
    """The split of the data's README: SHA-256 of the patient modulo 100, below 70 trains."""
    return int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 100 < 70


def load_sites(
    folders: Sequence[Path],
    task: str,
    declared: Sequence[int],
    trains: Callable[[str], bool] = trains_by_hash,
) -> tuple[list[SiteArrays], np.ndarray, np.ndarray]:
    """Training arrays of each shard, and the held-out records of all of them.

    Of a patient with several records the first with a known label counts.

    Args:
        folders: Shards.
        task: Name without ``y_``.
        declared: Patients declared, one per folder.
        trains: Whether a patient trains; the others are held out.

    Returns:
        Sites, held-out features `[m, D]`, held-out labels `[m]`.

    Raises:
        ShardError: A folder without tables or without the task.
    """
    sites, held_x, held_y = [], [], []
    for folder, patients in zip(folders, declared, strict=True):
        if not (folder / "records.parquet").is_file():
            raise ShardError(f"{folder} has no records.parquet", cure="give a folder of shards")
        records = pl.read_parquet(folder / "records.parquet")
        label = f"y_{task}"
        if label not in records.columns:
            raise ShardError(f"{folder} has no column {label}", cure="name a task of these shards")
        records = records.drop_nulls(label).unique("patient_id", keep="first", maintain_order=True)
        x = features(records, pl.read_parquet(folder / "events.parquet"))
        y = records[label].to_numpy().astype(np.float64)
        mask = np.array([trains(patient) for patient in records["patient_id"]], dtype=bool)
        sites.append(SiteArrays(x[mask], y[mask], patients))
        held_x.append(x[~mask])
        held_y.append(y[~mask])
    return sites, np.concatenate(held_x), np.concatenate(held_y)


def compare(
    sites: Sequence[SiteArrays],
    held_x: np.ndarray,
    held_y: np.ndarray,
    *,
    epsilons: Iterable[float | None],
    delta: float = 1e-5,
    seeds: int = 3,
) -> dict[float | None, list[float]]:
    """Exact AUROC on held-out records per epsilon, one for each seed."""

    def auroc(epsilon: float | None, seed: int) -> float:
        recipe = recipe_for(epsilon)
        weights = fit_dp_logistic(sites, epsilon=epsilon, delta=delta, recipe=recipe, seed=seed)
        return float(roc_auc_score(held_y, held_x @ weights))

    return {epsilon: [auroc(epsilon, seed) for seed in range(seeds)] for epsilon in epsilons}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints mean and single AUROCs per epsilon."""
    parser = argparse.ArgumentParser(description="DP logistic regression on a folder of shards")
    parser.add_argument("folder", type=Path, help="a folder whose subfolders are shards")
    parser.add_argument("--task", default="hospital_mortality")
    parser.add_argument("--declared", type=int, nargs="+", required=True, metavar="PATIENTS")
    parser.add_argument("--epsilon", nargs="+", default=["inf", "8", "2"])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    folders = sorted(path.parent for path in given.folder.glob("*/shard.toml"))
    if len(folders) != len(given.declared):
        raise StudyError(
            f"{len(given.declared)} numbers of declared patients for {len(folders)} shards",
            cure=f"give one for each of: {', '.join(path.name for path in folders) or 'none'}",
        )
    sites, held_x, held_y = load_sites(folders, given.task, given.declared)
    epsilons = [None if text == "inf" else float(text) for text in given.epsilon]
    result = compare(sites, held_x, held_y, epsilons=epsilons, delta=given.delta, seeds=given.seeds)
    print("epsilon  AUROC (mean)  per seed")
    for epsilon, values in result.items():
        name = "inf" if epsilon is None else f"{epsilon:g}"
        print(f"{name:>7}  {np.mean(values):12.4f}  {' '.join(f'{v:.4f}' for v in values)}")


if __name__ == "__main__":
    main()

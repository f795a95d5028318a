"""What privacy costs on real patients: the model through `flwr run` beside DP logistic regression.

    python -m simulations.benchmarks.utility DIR --study physionet2012 --task hospital_mortality

trains, for every seed and epsilon, the study's model through the whole path (daemon, relay, Flower)
and the logistic regression on the same hospitals with the same patients held out, and prints exact
AUROCs of the held-out patients: for simulations only. Runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import hmac
import json
import math
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from common.study import Study
from server.report import Report
from server.report import read as read_report
from simulations.baselines.dp_logistic import fit_dp_logistic, load_sites, recipe_for
from simulations.run import find_shards, simulate


def trains_at(site: Path, fraction: float) -> dict[str, bool]:
    """Patient -> whether they train, by the lasting secret of a virtual hospital's state folder."""
    key = (site / "population.key").read_bytes()

    class Split(dict[str, bool]):
        def __missing__(self, patient: str) -> bool:
            digest = hmac.new(key, patient.encode(), sha256).digest()
            return int.from_bytes(digest[:8], "big") / 2**64 >= fraction

    return Split()


def model_auroc(
    study: str, shards: Path, out: Path, task: str, epsilon: float | None, seed: int
) -> float:
    """Exact pooled AUROC of one run through `flwr run`."""
    report: Report
    if (out / "report.json").exists():
        report = read_report(out)
    else:
        report = simulate(
            study,
            shards,
            out,
            epsilon=epsilon,
            private=epsilon is not None,
            seed=seed,
            resume=(out / "checkpoint").exists(),
        )
    exact = report.simulation_exact
    assert exact is not None
    value = exact.tasks[task].auroc
    assert value is not None
    return value


def baseline_auroc(
    study: Study, shards: Path, out: Path, task: str, epsilon: float | None
) -> float:
    """Exact pooled AUROC of DP logistic regression on the split of the run in `out`."""
    folders = find_shards(shards)
    parts = [
        load_sites(
            [folders[name]],
            task,
            [site.patients_declared],
            trains_at(out / "sites" / name, study.evaluation.validation_fraction).__getitem__,
        )
        for name, site in study.federation.sites.items()
    ]
    sites = [site for part, _, _ in parts for site in part]
    weights = fit_dp_logistic(
        sites, epsilon=epsilon, delta=study.privacy.delta, recipe=recipe_for(epsilon)
    )
    held_x = np.concatenate([x for _, x, _ in parts])
    held_y = np.concatenate([y for _, _, y in parts])
    return float(roc_auc_score(held_y, held_x @ weights))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes `utility.json` beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="folder of shards")
    parser.add_argument("--study", default="physionet2012")
    parser.add_argument("--task", default="hospital_mortality")
    parser.add_argument("--epsilon", nargs="+", default=["inf", "8", "2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/utility"))
    given = parser.parse_args(arguments)
    study, console = Study.load(given.study), Console()
    table = Table(title=f"{given.study}, {given.task}: exact AUROC of held-out patients")
    for column in (
        "ε",
        "model",
        "per seed",
        "DP logistic regression",
        "per seed",
        "difference",
        "standard error",
    ):
        table.add_column(column)
    rows = []
    for text in given.epsilon:
        epsilon = None if text == "inf" else float(text)
        model, baseline = [], []
        for seed in range(given.seeds):
            out = given.out / f"{given.study}-{text}-{seed}"
            console.print(f"[dim]ε {text}, seed {seed}[/]")
            model.append(model_auroc(given.study, given.shards, out, given.task, epsilon, seed))
            baseline.append(baseline_auroc(study, given.shards, out, given.task, epsilon))
        difference = np.subtract(model, baseline)
        error = difference.std(ddof=1) / math.sqrt(len(difference)) if given.seeds > 1 else math.nan
        rows.append({"epsilon": text, "model": model, "baseline": baseline})
        table.add_row(
            text,
            f"{np.mean(model):.4f}",
            " ".join(f"{v:.3f}" for v in model),
            f"{np.mean(baseline):.4f}",
            " ".join(f"{v:.3f}" for v in baseline),
            f"{difference.mean():+.4f}",
            f"{error:.4f}",
        )
    (given.out / "utility.json").write_text(json.dumps(rows, indent=1))
    console.print(table)


if __name__ == "__main__":
    main()

"""What federation and privacy cost on the synthetic cohort, beside one merged site and the ceiling.

    python -m simulations.benchmarks.cohort --patients 500        # 4 hospitals

The same model, recipe and held-out patients everywhere: four sites without privacy, one merged site
without privacy, four sites at each ε. Beside them the AUROC of the true risk, and logistic
regression on the same embeddings, pooled without privacy. Exact figures of held-out patients, for
simulations only. Runs that are there already are not repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from client.site.encoders.dataset import Dataset
from client.site.encoders.run import encode_site
from client.site.encoders.vault import Vault
from client.site.shard import Shard
from common.study import Study
from server.report import read as read_report
from simulations.cohort.shards import synthetic_hospitals
from simulations.merge import merge, with_split
from simulations.run import simulate

_HELD_OUT = 0.25


def validates(hospital: str, patient: str) -> bool:
    """A quarter of the patients, by hash."""
    digest = hashlib.sha256(f"cohort benchmark\0{hospital}\0{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < _HELD_OUT


def prepare(
    out: Path, hospitals: int, patients: int, seed: int
) -> tuple[dict[str, Path], dict[str, Path], Path]:
    """Shards of the sites with the split written into them, of the merged site, and the trees."""
    plain = synthetic_hospitals(out / "cohort", hospitals, patients=patients, seed=seed)
    sites = {}
    for name, path in plain.items():
        sites[name] = out / "split" / name
        if not sites[name].exists():
            with_split(path, sites[name], validates)
    whole = out / "merged" / "merged"
    if not whole.exists():
        merge(plain, whole, "merged", validates)
    return sites, {"merged": whole}, out / "cohort" / "mimic-iv"


def study_for(base: Study, sites: Mapping[str, Path]) -> Study:
    """The study with these sites; each declares nine tenths of its training patients."""
    raw = base.model_dump(mode="json")
    raw["federation"]["sites"] = {}
    for name, path in sites.items():
        records = Shard.open(path).records.filter(pl.col("population") == "train")
        count = records["patient_id"].n_unique()
        raw["federation"]["sites"][name] = {"patients_declared": max(1, int(0.9 * count))}
    return Study.model_validate(raw)


def exact_auroc(
    base: Study, sites: Mapping[str, Path], out: Path, epsilon: float | None, seed: int
) -> dict[str, float]:
    """Exact AUROC per task of the held-out patients of all sites, after a run through Flower."""
    if (out / "report.json").exists():
        report = read_report(out)
    else:
        report = simulate(
            study_for(base, sites),
            sites,
            out,
            epsilon=epsilon,
            private=epsilon is not None,
            seed=seed,
            resume=(out / "checkpoint").exists(),
        )
    assert report.simulation_exact is not None
    tasks = report.simulation_exact.tasks
    return {name: value.auroc for name, value in tasks.items() if value.auroc is not None}


def ceiling(trees: Path, merged: Shard) -> dict[str, float]:
    """AUROC of the true risk on the held-out records."""
    truth = pl.concat(
        [pl.read_parquet(path / "truth.parquet") for path in sorted(trees.iterdir())]
    ).with_columns(record_id=pl.format("{}-s{}", "hadm_id", "study_id"))
    held = merged.records.filter(pl.col("population") == "validation").with_columns(
        pl.col("record_id").str.split("/").list.last()
    )
    joined = held.join(truth, on="record_id")
    found = {}
    for task in merged.tasks:
        if f"risk_{task}" in truth.columns:
            known = joined.filter(pl.col(f"y_{task}").is_not_null())
            if known[f"y_{task}"].n_unique() == 2:
                found[task] = float(roc_auc_score(known[f"y_{task}"], known[f"risk_{task}"]))
    return found


def logistic(study: Study, merged: Shard, out: Path) -> dict[str, float]:
    """Pooled logistic regression per task on the concatenated embeddings, C = 0.01."""
    vault = Vault.open(out / "vault")
    populations = encode_site(study, merged, vault, population_key=b"unused: the shard says it")

    def matrix(data: Dataset) -> np.ndarray:
        parts = [data.inputs[s].numpy().reshape(len(data.record_ids), -1) for s in study.sources]
        parts += [data.present[s].numpy().astype(np.float32) for s in study.sources]
        return np.concatenate(parts, axis=1)

    x, held = matrix(populations.train), matrix(populations.validation)
    found = {}
    for index, task in enumerate(study.tasks):
        y, z = (p.labels[:, index].numpy() for p in (populations.train, populations.validation))
        if len(set(y[y >= 0])) == 2 and len(set(z[z >= 0])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
            model.fit(x[y >= 0], y[y >= 0])
            score = model.decision_function(held[z >= 0])
            found[task] = float(roc_auc_score(z[z >= 0], score))
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of cohort and runs.")] = Path("runs/cohort"),
    study: Annotated[str, typer.Option(help="Study file or name.")] = "cohort",
    hospitals: Annotated[int, typer.Option(min=1)] = 4,
    patients: Annotated[int, typer.Option(min=1, help="Per hospital.")] = 500,
    epsilon: Annotated[list[float] | None, typer.Option(help="Privacy targets.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each; the cohort stays.")] = 1,
) -> None:
    """Prints AUROC per task and macro, and writes `cohort.json` beside the runs."""
    base, console = Study.load(study), Console()
    sites, merged, trees = prepare(out, hospitals, patients, seed=0)
    whole = Shard.open(merged["merged"])
    columns: dict[str, list[dict[str, float]]] = {
        "true risk": [ceiling(trees, whole)],
        "pooled LR": [logistic(base, whole, out)],
    }
    arms: list[tuple[str, Mapping[str, Path], float | None]] = [
        ("merged", merged, None),
        ("federated", sites, None),
        *((f"ε {e:g}", sites, e) for e in epsilon or [8.0, 2.0]),
    ]
    for name, where, target in arms:
        for seed in range(seeds):
            console.print(f"[dim]{name}, seed {seed}[/]")
            run = out / f"{base.name}-{name.replace('ε ', 'federated-')}-{seed}"
            columns.setdefault(name, []).append(exact_auroc(base, where, run, target, seed))
    table = Table(title=f"{base.name}: exact AUROC, held-out patients", box=SIMPLE)
    table.add_column("task", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for task in base.tasks:
        table.add_row(task, *(_mean([r.get(task) for r in runs]) for runs in columns.values()))
    macros = {
        name: [float(np.mean([r[t] for t in base.tasks if t in r])) for r in runs]
        for name, runs in columns.items()
    }
    table.add_row("macro", *(_mean(list(values)) for values in macros.values()), style="bold")
    console.print(table)
    gap = np.subtract(macros["federated"], macros["merged"])
    console.print(f"federated − merged, macro: {gap.mean():+.4f}", highlight=False)
    (out / f"{base.name}.json").write_text(
        json.dumps({"tasks": columns, "macro": macros}, indent=1)
    )


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "–"


if __name__ == "__main__":
    typer.run(main)

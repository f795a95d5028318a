"""The recipes of ready suites: every arm learns a rule that is there, and none runs away.

Under privacy passes have 32 patients, as at a site; kernels that round a row by its place would be
refused here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from client.site.daemon.work import optimizer_of, plan_of
from client.site.encoders.dataset import Dataset
from client.site.encoders.registry import dimensions
from client.site.model.losses import row_loss
from client.site.model.system import build
from client.site.training.entropy import Entropy
from client.site.training.plan import PerformanceFlags
from client.site.training.trainer import Trainer
from common.study import Study, merged, resolve
from simulations.comparison.suite import Cell, Suite, cells, study_of

PATIENTS, HELD_OUT, LATENT, ROUNDS = 300, 300, 6, 2


def first_cells() -> list[tuple[Study, Cell]]:
    """Each arm without privacy and with, on one split."""
    found = []
    for name in ("uni-mlm", "adacomed", "llama-fusion", "m-llm", "physionet2012"):
        suite = Suite.load(name)
        study = Study.load(suite.study)
        found += [
            (study, cell)
            for cell in cells(suite, study)
            if (cell.row.arm.kind, cell.row.group, cell.seed) == ("system", "", 0)
            and (cell.arrangement, cell.epsilon) in {("federated", None), ("federated", 8.0)}
        ]
    return found


def planted(study: Study) -> Dataset:
    """Records whose sources all show, noisily, what the tasks ask for; public prevalences hold."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = PATIENTS + HELD_OUT
    latent = normal(rows, LATENT)
    dims = dimensions(study)
    inputs = {
        source: torch.nn.functional.normalize(latent @ normal(LATENT, d) + normal(rows, d), dim=-1)[
            :, None
        ]
        for source, d in dims.items()
    }
    scores = latent @ normal(LATENT, len(study.tasks))
    limits = [
        torch.quantile(scores[:, k], 1 - task.prevalence)
        for k, task in enumerate(study.tasks.values())
    ]
    return Dataset(
        rows_of_patient=[np.array([i]) for i in range(rows)],
        inputs=inputs,
        present={s: torch.ones(rows, 1, dtype=torch.bool) for s in dims},
        labels=(scores > torch.stack(limits)).to(torch.int8),
        record_ids=[str(i) for i in range(rows)],
    )


@pytest.mark.parametrize(
    ("base", "cell"),
    first_cells(),
    ids=lambda value: value.name if isinstance(value, Study) else value.id,
)
def test_every_arm_of_a_ready_suite_learns(base: Study, cell: Cell) -> None:
    study = study_of(base, cell, {"site": PATIENTS})
    if study.model.adacomed:  # at 2048, p takes most of the time
        small = {"model": {"adacomed": {"shared_width": 128}}}
        study = Study.model_validate(merged(study.model_dump(mode="json"), small))
    study = resolve(study, epsilon=cell.epsilon, private=cell.epsilon is not None)
    everyone = planted(study)
    model = build(study, dimensions(study)).eval()
    train = Dataset(
        rows_of_patient=everyone.rows_of_patient[:PATIENTS],
        inputs={s: e[:PATIENTS] for s, e in everyone.inputs.items()},
        present={s: e[:PATIENTS] for s, e in everyone.present.items()},
        labels=everyone.labels[:PATIENTS],
        record_ids=everyone.record_ids[:PATIENTS],
    )
    for round_ in range(ROUNDS):
        plan = plan_of(study, "site")
        trainer = Trainer(
            model,
            row_loss(study),
            train,
            plan,
            optimizer_of(study),
            Entropy.seeded(round_),
            PerformanceFlags(32),
        )
        trainer.run(study.training.steps_per_round)
        trainer.close()
    with torch.no_grad():
        said = model(
            {s: e[PATIENTS:] for s, e in everyone.inputs.items()},
            {s: e[PATIENTS:] for s, e in everyone.present.items()},
        ).logits_BK
    assert torch.isfinite(said).all()
    labels = everyone.labels[PATIENTS:].numpy()
    macro = np.mean([roc_auc_score(labels[:, k], said[:, k]) for k in range(labels.shape[1])])
    assert macro > (0.7 if cell.epsilon is None else 0.55)

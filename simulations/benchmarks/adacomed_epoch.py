"""What an epoch of AdaCoMed costs at the paper's size, beside its Table 6.

    python -m simulations.benchmarks.adacomed_epoch [--epochs 1]

8,268 cached records of three modalities as wide as the paper's encoders (DINOv2 1536, MeLLaMA 5120,
MOIRAI 1024), batches of 64, no privacy, everything trained. The embeddings are random: size and
time alone are measured. Table 6: 21.3 M trained parameters, 1.0 GB per batch of 64, 0.02 minutes
per epoch on an A100.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from client.site.encoders.dataset import Dataset
from client.site.model.losses import row_loss
from client.site.model.system import build
from client.site.training.entropy import Entropy
from client.site.training.plan import NonPrivatePlan, OptimizerConfig, PerformanceFlags
from client.site.training.trainer import Trainer
from common.study import Study

DIMS = {"image": 1536, "note": 5120, "series": 1024}
RECORDS, BATCH = 8268, 64
WIDTH, SHARED = 1128, 2048


def study() -> Study:
    """AdaCoMed as large as the paper's, on vectors encoded elsewhere."""
    return Study.model_validate(
        {
            "name": "adacomed-epoch",
            "sources": {
                name: {"modality": "embedding", "encoder": "precomputed", "dim": dim}
                for name, dim in DIMS.items()
            },
            "tasks": {"mortality": {"prevalence": 0.1}},
            "model": {
                "system": "adacomed",
                "adacomed": {
                    "width": WIDTH,
                    "shared_width": SHARED,
                    "modalities": {name: [name] for name in DIMS},
                    "small_modalities": {name: [name] for name in DIMS},
                },
            },
        }
    )


def records(count: int) -> Dataset:
    """As many patients of one random record."""
    return Dataset(
        rows_of_patient=[np.array([row]) for row in range(count)],
        inputs={name: torch.randn(count, 1, dim).div_(dim**0.5) for name, dim in DIMS.items()},
        present={name: torch.ones(count, 1, dtype=torch.bool) for name in DIMS},
        labels=torch.randint(0, 2, (count, 1)).to(torch.int8),
        record_ids=[str(row) for row in range(count)],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints parameters, minutes per epoch and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--records", type=int, default=RECORDS)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = study()
    data = records(given.records)
    before = _resident()
    model = build(chosen, DIMS, device=device).eval()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = max(1, given.epochs * given.records // BATCH)
    plan = NonPrivatePlan(min(1.0, BATCH / given.records), 1, steps, given.records)
    trainer = Trainer(
        model,
        row_loss(chosen),
        data,
        plan,
        OptimizerConfig(learning_rate=1e-4),
        Entropy.seeded("epoch"),
        PerformanceFlags(micro_batch=BATCH),
    )
    began = time.perf_counter()
    trainer.run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() / 1e9
        where = torch.cuda.get_device_name()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = (peak - before) / 1e9
        where = f"CPU, {torch.get_num_threads()} threads"
    minutes = (time.perf_counter() - began) / 60 / given.epochs
    print(f"{size / 1e6:.1f} M trained parameters (paper: 21.3 M)")
    print(
        f"{minutes:.2f} minutes per epoch of {given.records} records on {where} (paper: 0.02, A100)"
    )
    print(f"{memory:.1f} GB for model, gradients, Adam and a batch of {BATCH} (paper: 1.0 GB)")


def _resident() -> int:
    """Bytes of this process in memory now; the kernel's peak would hide what is freed by then."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()

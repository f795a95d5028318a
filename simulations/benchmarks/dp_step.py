"""What a private step costs: each system of the papers, and ours beside Opacus' own two ways.

    python -m simulations.benchmarks.dp_step [--system uni-mlm m-llm] [--hidden 256 1024] [--lora]

One process, all ways interleaved, one thread, medians; 64 patients a step, one record each, Adam.
Ours is the product: `Trainer.run(1)` with sampling, the proven bound, noise from AES, and the
optimiser; plain is the same trainer without privacy. Peak memory is that of a process of its own
per way.

Systems: every registered one at its defaults on the cohort study's seven sources and twelve tasks,
with the embedded language model, the smallest there is: the less the frozen part costs, the more
privacy shows. Opacus: on a frozen random Llama (`--hidden`) with six projectors of UNI-MLM's
dimensions and 12 designated logits; the rows `poisson` repeat the first two with true Poisson draws
of mean 64 in passes of 16 patients, which ours must pad. With one of `--system` and `--hidden`
given, only that is run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from client.site.encoders.dataset import Dataset
from client.site.encoders.registry import build_encoder
from client.site.model import losses
from client.site.model.system import BUILDERS
from client.site.model.system import build as build_system
from client.site.training.entropy import Entropy
from client.site.training.optimizer import base_optimizer
from client.site.training.plan import (
    DPExecutionPlan,
    NonPrivatePlan,
    OptimizerConfig,
    PerformanceFlags,
    Plan,
)
from client.site.training.trainer import RowLoss, Trainer
from common.study import Study

DIMENSIONS = {"xray": 1024, "history": 1024, "lab": 110, "chart": 242, "procedure": 99, "note": 768}
TASKS = 12
BATCH = 64
LAYERS = {256: 4, 1024: 8}
WAYS = ("plain", "ours", "ghost", "hooks")
HEADER = f"{'':14}{'ms (median)':>14}{'/ plain':>10}{'peak MB':>10}{'/ plain':>10}"
Step = Callable[[], None]


class Fusion(nn.Module):
    """Projectors before a frozen language model; the mean hidden state on 12 rows of its head."""

    def __init__(self, slm: nn.Module, hidden: int) -> None:
        super().__init__()
        self.projectors = nn.ModuleDict({s: nn.Linear(d, hidden) for s, d in DIMENSIONS.items()})
        self.slm = slm
        self.register_buffer("rows", torch.randn(TASKS, hidden) / hidden**0.5)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([self.projectors[s](inputs[s]) for s in DIMENSIONS], 1)
        return self.slm(inputs_embeds=tokens).last_hidden_state.mean(1) @ self.rows.T


def row_loss(
    model: nn.Module, inputs: dict[str, Tensor], present: dict[str, Tensor], labels: Tensor
) -> Tensor:
    return functional.binary_cross_entropy_with_logits(
        model(inputs), labels.float(), reduction="none"
    ).mean(1)


def frozen_llama(hidden: int, lora: bool) -> nn.Module:
    slm = LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=LAYERS[hidden],
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
    ).requires_grad_(False)
    if not lora:
        return slm
    return get_peft_model(slm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def patients(count: int, shapes: Mapping[str, tuple[int, int]]) -> Dataset:
    """Patients of one record with everything; `shapes`: source -> tokens, width."""
    return Dataset(
        rows_of_patient=[np.array([i]) for i in range(count)],
        inputs={s: torch.randn(count, t, d) / d**0.5 for s, (t, d) in shapes.items()},
        present={s: torch.ones(count, t, dtype=torch.bool) for s, (t, _) in shapes.items()},
        labels=torch.randint(0, 2, (count, TASKS), dtype=torch.int8),
        record_ids=[str(i) for i in range(count)],
    )


def trainer_step(
    model: nn.Module, loss: RowLoss, data: Dataset, rate: float, private: bool
) -> Step:
    many, micro_batch = 10**6, BATCH if rate == 1 else 16
    plan: Plan = NonPrivatePlan(rate, 1, many, data.n_patients)
    if private:
        plan = DPExecutionPlan(
            rate, 1, many, data.n_patients, max_grad_norm=1.0, noise_multiplier=1.0
        )
    trainer = Trainer(
        model, loss, data, plan, OptimizerConfig(), Entropy(), PerformanceFlags(micro_batch)
    )
    return lambda: (trainer.run(1), None)[1]


def opacus_step(model: nn.Module, data: Dataset, ghost: bool) -> Step:
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": BATCH}
    base = base_optimizer(OptimizerConfig(), trainable)
    if not ghost:
        hooked = GradSampleModule(model)
        plain = DPOptimizer(base, **settings)

        def hooks_step() -> None:
            plain.zero_grad()
            row_loss(hooked, data.inputs, data.present, data.labels).mean().backward()
            plain.step()

        return hooks_step

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(base, **settings)

    def ghost_step() -> None:
        optimizer.zero_grad()
        losses = row_loss(wrapped, data.inputs, data.present, data.labels)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
        optimizer.step()

    return ghost_step


def build(way: str, slm: nn.Module, hidden: int, rate: float = 1.0) -> Step:
    shapes = {source: (1, d) for source, d in DIMENSIONS.items()}
    model, data = Fusion(slm, hidden), patients(round(BATCH / rate), shapes)
    if way in ("plain", "ours"):
        return trainer_step(model, row_loss, data, rate, private=way == "ours")
    return opacus_step(model, data, ghost=way == "ghost")


def build_of_system(way: str, system: str) -> Step:
    toml = resources.files("simulations.studies").joinpath("cohort.toml").read_text()
    raw = Study.from_toml(toml).model_dump() | {"model": {"system": system}}
    study = Study.model_validate(raw)
    encoders = {name: build_encoder(source) for name, source in study.sources.items()}
    shapes = {name: (getattr(e, "tokens", 1), e.dim) for name, e in encoders.items()}
    model = build_system(study, {name: d for name, (_, d) in shapes.items()})
    loss = losses.row_loss(study)
    return trainer_step(model, loss, patients(BATCH, shapes), 1.0, private=way == "ours")


def interleaved(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds per way and repeat, the ways taking turns; one warm-up round."""
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def peak_megabytes(way: str, *arguments: str) -> float:
    command = [sys.executable, "-m", "simulations.benchmarks.dp_step", "--memory-of", way]
    out = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout
    return float(json.loads(out.splitlines()[-1]))


def own_peak_megabytes(step: Step) -> float:
    for _ in range(3):
        step()
    # Not getrusage: its maximum is inherited from the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak.group(1)) / 1024 if peak else float("nan")


def compare_systems(systems: Sequence[str], repeats: int) -> None:
    print(f"\nsystems of the papers, {BATCH} patients, 1 thread", flush=True)
    print(HEADER)
    steps = {f"{s} {way}": build_of_system(way, s) for s in systems for way in WAYS[:2]}
    seconds = interleaved(steps, repeats)
    del steps
    for system in systems:
        pair = {f"{system} {way}": way for way in WAYS[:2]}
        memory = {name: peak_megabytes(way, "--system", system) for name, way in pair.items()}
        _print({name: seconds[name] for name in pair}, memory)


def compare_with_opacus(hidden: int, lora: bool, repeats: int) -> None:
    print(f"\nhidden {hidden}, {LAYERS[hidden]} layers, {BATCH} patients, 1 thread", flush=True)
    print(HEADER)
    # LoRA lives in the model it adapts, so each way gets its own copy then.
    shared = None if lora else frozen_llama(hidden, False)
    steps = {way: build(way, shared or frozen_llama(hidden, True), hidden) for way in WAYS}
    seconds = interleaved(steps, repeats)
    del steps
    arguments = ["--hidden", str(hidden), *(["--lora"] if lora else [])]
    _print(seconds, {way: peak_megabytes(way, *arguments) for way in WAYS})
    poisson = {
        f"{way}, poisson": build(way, shared or frozen_llama(hidden, True), hidden, rate=0.1)
        for way in WAYS[:2]
    }
    _print(interleaved(poisson, 2 * repeats), {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", nargs="+", choices=BUILDERS, help="all, if not given")
    parser.add_argument("--hidden", type=int, nargs="+", choices=LAYERS, help="all, if not given")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lora", action="store_true", help="also train LoRA on q and v")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    everything = not options.system and not options.hidden
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.memory_of:
        step = (
            build_of_system(options.memory_of, options.system[0])
            if options.system
            else build(
                options.memory_of, frozen_llama(options.hidden[0], options.lora), options.hidden[0]
            )
        )
        print(own_peak_megabytes(step))
        return
    if options.system or everything:
        compare_systems(options.system or list(BUILDERS), options.repeats)
    for hidden in options.hidden or (LAYERS if everything else ()):
        compare_with_opacus(hidden, options.lora, options.repeats)


def _print(seconds: Mapping[str, list[float]], memory: Mapping[str, float]) -> None:
    first = next(iter(seconds))
    for way, values in seconds.items():
        # Medians of ratios within a turn: what the machine does meanwhile cancels.
        ratio = statistics.median(v / p for v, p in zip(values, seconds[first], strict=True))
        line = f"{way:20}{1e3 * statistics.median(values):>8.0f}{ratio:>10.2f}"
        if memory:
            line += f"{memory[way]:>10.0f}{memory[way] / memory[first]:>10.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()

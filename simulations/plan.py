"""What a study will cost, from the study alone.

Noise and ε are exact: the numbers that the ledger will charge. Parameters and bytes are exact where
SLM and encoders lie on this machine. Memory and time are estimates for a CPU, fitted to what was
measured on one core with `nano`, within a factor of two; a GPU, or a machine that is busy with
other things, is another matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from client.site.encoders.registry import dimensions, tokens
from client.site.model.files import SlmFiles, locate
from common.errors import EncoderError, StudyError
from common.privacy.pricing import epsilon_by_population
from common.study import Study, resolve

_PASS_SECONDS = 0.02  # of a step's forward and backward pass, whatever its size
_FLOPS_PER_SECOND = 4e10
_FLOPS_PER_PARAMETER_AND_TOKEN = 6  # forward 2, backward 4
_ROWS_PER_PASS = 32
_ROUND_SECONDS = 2.0  # messages, signatures, ledger, check of the model, checkpoint
_RESIDENT_BYTES = 0.9e9  # Python, torch, transformers and a small SLM's activations
_ADAPTER_COPIES = 8  # weights, sums, optimiser, messages


@dataclass(frozen=True)
class Plan:
    """A resolved study and its costs.

    Attributes:
        per_round, declared, reserved: ε of one round, of the declared rounds, and of all that is
            reserved (spare rounds, evaluations), by population; None in mode `none`.
        parameters: Trainable ones; None where `unknown` says why.
        bytes_up: From one hospital per round; as much goes down.
        largest_batch: Patients of an expected batch at the largest site.
        memory_bytes: Of a daemon on a CPU, without embeddings.
        bytes_per_record: Of embeddings, in memory, all their tokens counted.
        seconds_per_round: Where one machine serves all sites, one after the other, on a CPU.
        unknown: What is not on this machine; empty where all is.
    """

    study: Study
    per_round: dict[str, float] | None
    declared: dict[str, float] | None
    reserved: dict[str, float] | None
    parameters: int | None
    bytes_up: int | None
    steps: int
    largest_batch: float
    memory_bytes: float | None
    bytes_per_record: int | None
    seconds_per_round: float | None
    unknown: str = ""


def make_plan(
    study: Study,
    *,
    sites: dict[str, int] | None = None,
    epsilon: float | None = None,
    rounds: int | None = None,
) -> Plan:
    """Resolves the study and prices it; touches no data.

    Args:
        sites: Patients declared by site, for a study without roster.

    Raises:
        StudyError, PrivacyError: The study cannot run as written.
        ModelError: Its SLM is a folder that cannot be used.
    """
    if study.resolved and epsilon is None and rounds is None and sites is None:
        settled = study
    else:
        settled = resolve(study, sites=sites, epsilon=epsilon, rounds=rounds)
    names = list(settled.federation.sites)
    per_round = declared = reserved = None
    if settled.privacy.mode != "none":
        delta = settled.privacy.delta
        one = settled.round_event(names[0])
        per_round = epsilon_by_population([one], delta)
        declared = epsilon_by_population([one] * settled.federation.rounds, delta)
        reserved = epsilon_by_population(list(settled.reserved_events(names[0])), delta)
    slm, unknown = locate(settled.model.slm, settled.model.revision), ""
    dims: Mapping[str, int] | None = None
    numbers = None  # of a record's embeddings
    try:
        dims, counts = dimensions(settled), tokens(settled)
        numbers = sum(counts[name] * dim for name, dim in dims.items())
    except EncoderError as error:
        unknown = str(error).partition("\n")[0]
    if slm is None:
        unknown = f"{settled.model.slm} is not on this machine"
    parameters = _parameters(settled, dims, slm) if dims and slm else None
    return Plan(
        study=settled,
        per_round=per_round,
        declared=declared,
        reserved=reserved,
        parameters=parameters,
        bytes_up=None if parameters is None else 4 * parameters,
        steps=settled.training.steps_per_round,
        largest_batch=max(settled.expected_batch(name) for name in names),
        memory_bytes=_memory(slm, parameters) if slm and parameters else None,
        bytes_per_record=None if numbers is None else 4 * numbers,
        seconds_per_round=_seconds(settled, slm) if slm else None,
        unknown=unknown,
    )


def parse_sites(text: str | None) -> dict[str, int] | None:
    """`a=100,b=250` to a mapping.

    Raises:
        StudyError: It is not of that form.
    """
    if text is None:
        return None
    sites: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.strip().isdigit() or not int(number) or not name.strip():
            raise StudyError(f"'{part}' is not name=patients", cure="write a=100,b=250")
        sites[name.strip()] = int(number)
    return sites


def show_plan(
    study: Study,
    console: Console,
    *,
    sites: dict[str, int] | None = None,
    epsilon: float | None = None,
    rounds: int | None = None,
) -> None:
    """Prints the plan as tables."""
    plan = make_plan(study, sites=sites, epsilon=epsilon, rounds=rounds)
    settled, privacy = plan.study, plan.study.privacy
    federation, evaluation = settled.federation, settled.evaluation
    rows = {"hash": settled.hash[:16], "privacy": privacy.mode}
    if settled.start:
        rows["starts from"] = (
            f"adapter {settled.start.adapter[:16]} of study {settled.start.study[:16]}, whose ε "
            "adds to this one's for patients of both"
        )
    if plan.per_round and plan.declared and plan.reserved:
        spare = settled.priced_rounds - federation.rounds
        rows |= {
            "σ, noise multiplier": f"{privacy.noise_multiplier:.4f} "
            f"(evaluation {evaluation.noise_multiplier:.4f})",
            "q, sampling rate": f"{privacy.sample_rate:g}",
            "C, clipping norm": f"{privacy.max_grad_norm:g}",
            "δ": f"{privacy.delta:g}",
            "ε of one round": f"{plan.per_round['train']:.3f}",
            f"ε of {_count(federation.rounds, 'round')}": f"{plan.declared['train']:.3f}",
            f"ε with {_count(spare, 'spare round')}": f"{plan.reserved['train']:.3f}",
            f"ε of {_count(evaluation.releases, 'evaluation')}": (
                f"{plan.reserved['validation']:.3f} (of validation patients)"
            ),
        }
    rows["rounds × steps"] = f"{federation.rounds} × {plan.steps}"
    if plan.parameters is None:
        rows["not known"] = f"parameters, bytes, memory: {plan.unknown}"
    else:
        rows |= {
            "trainable parameters": f"{plan.parameters:,}",
            "bytes per round and hospital": f"{plan.bytes_up:,} up, as many down",
            "memory of a daemon, about": f"{(plan.memory_bytes or 0) / 1e9:.1f} GB, and "
            f"{plan.bytes_per_record:,} bytes per record",
        }
    if plan.seconds_per_round is not None:
        rows["seconds per round, about"] = (
            f"{plan.seconds_per_round:.0f} where one processor core serves all hospitals"
        )
    title = f"study {settled.name}"
    table = Table(title=title, box=SIMPLE, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    roster = Table(title="hospitals", box=SIMPLE, title_justify="left")
    for name in ("hospital", "patients declared", "expected batch", "weight"):
        roster.add_column(name, justify="left" if name == "hospital" else "right")
    for name, site in settled.federation.sites.items():
        roster.add_row(
            name,
            str(site.patients_declared),
            f"{settled.expected_batch(name):.1f}",
            f"{settled.weight(name):.3f}",
        )
    console.print(roster)


def _parameters(study: Study, dims: Mapping[str, int], slm: SlmFiles) -> int:
    """Trainable ones; of `uni-mlm` without building it (a test compares)."""
    if study.model.system != "uni-mlm":
        from client.site.model.system import adapter_spec, build  # imports torch

        return int(adapter_spec(build(study, dims))["trainable_parameters"])
    width = slm.hidden_size
    count = sum(width * dim for dim in dims.values())
    if study.model.decoder:
        count += sum((width + 1) * dim for dim in dims.values())
    return count + (slm.lora_parameters(study.model.lora) if study.model.lora else 0)


def _memory(slm: SlmFiles, trainable: int) -> float:
    return _RESIDENT_BYTES + 4 * slm.parameters + 4 * _ADAPTER_COPIES * trainable


def _seconds(study: Study, slm: SlmFiles) -> float:
    total = _ROUND_SECONDS
    tokens_per_row = sum(source.tokens for source in study.sources.values())
    for name in study.federation.sites:
        rows = study.expected_batch(name) * study.privacy.records_per_patient
        passes = math.ceil(rows / _ROWS_PER_PASS + 0.5)  # one more than full ones, half the time
        flops = _FLOPS_PER_PARAMETER_AND_TOKEN * slm.parameters * max(rows, 4) * tokens_per_row
        step = passes * _PASS_SECONDS + flops / _FLOPS_PER_SECOND
        total += study.training.steps_per_round * step
    return total


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""What a study will cost, from the study alone.

Noise and ε are exact: the numbers that the ledger will charge. Bytes are exact where the encoders'
widths are known without their weights. Memory and time are estimates, of the order of what was
measured on two CPU cores (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.errors import FedwardError, StudyError
from common.privacy.pricing import epsilon_by_population
from common.study import Study, resolve

_STEP_SECONDS_PER_RECORD = 4e-4  # nano, CPU, one core
_RESIDENT_BYTES = 1.2e9  # torch, the embedded SLM and one site's embeddings


@dataclass(frozen=True)
class Plan:
    """A resolved study and its costs.

    Attributes:
        per_round, declared, reserved: ε of one round, of the declared rounds, and of all that is
            reserved (spare rounds, evaluations), by population; None in mode `none`.
        parameters: Trainable ones; None where a model must be loaded to tell.
        bytes_up: From one hospital per round; as much goes down.
        largest_batch: Patients of an expected batch at the largest site.
    """

    study: Study
    per_round: dict[str, float] | None
    declared: dict[str, float] | None
    reserved: dict[str, float] | None
    parameters: int | None
    bytes_up: int | None
    steps: int
    largest_batch: float
    seconds_per_round: float


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
    parameters = _parameters(settled)
    largest = max(settled.expected_batch(name) for name in names)
    records = largest * settled.privacy.records_per_patient
    return Plan(
        settled, per_round, declared, reserved, parameters,
        None if parameters is None else 4 * parameters,
        settled.training.steps_per_round, largest,
        settled.training.steps_per_round * max(0.02, records * _STEP_SECONDS_PER_RECORD)
        * len(names),
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
    table = Table(title=f"study {settled.name}", box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column()
    rows = {"hash": settled.hash[:16], "privacy": privacy.mode}
    if plan.per_round and plan.declared and plan.reserved:
        rows |= {
            "noise multiplier σ": f"{privacy.noise_multiplier:.4f} (evaluation "
            f"{settled.evaluation.noise_multiplier:.4f})",
            "sampling rate q": f"{privacy.sample_rate:g}",
            "clipping norm C": f"{privacy.max_grad_norm:g}",
            "δ": f"{privacy.delta:g}",
            "ε of one round": f"{plan.per_round['train']:.3f}",
            f"ε of {settled.federation.rounds} rounds": f"{plan.declared['train']:.3f}",
            f"ε reserved, with {settled.priced_rounds - settled.federation.rounds} spare rounds":
                f"{plan.reserved['train']:.3f}",
            f"ε of {settled.evaluation.releases} evaluations, validation patients":
                f"{plan.reserved['validation']:.3f}",
        }
    known = plan.parameters is not None
    rows |= {
        "rounds × steps": f"{settled.federation.rounds} × {plan.steps}",
        "trainable parameters": f"{plan.parameters:,}" if known else "known once the SLM is loaded",
        "bytes per round and hospital": f"{plan.bytes_up:,} up, as many down" if known else "–",
        "memory of a site (estimate)": _memory(plan),
        "seconds per round (estimate)": f"{plan.seconds_per_round:.0f} if one machine serves all "
        "sites, on CPU with the embedded SLM",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    roster = Table(title="hospitals", box=SIMPLE, title_justify="left")
    for name in ("hospital", "patients declared", "expected batch", "weight"):
        roster.add_column(name, justify="left" if name == "hospital" else "right")
    for name, site in settled.federation.sites.items():
        roster.add_row(
            name, str(site.patients_declared), f"{settled.expected_batch(name):.1f}",
            f"{settled.weight(name):.3f}",
        )
    console.print(roster)


def _parameters(study: Study) -> int | None:
    """Trainable parameters: the embedded SLM is built and asked; of another one only the
    configuration is read, where it lies on this machine, which tells the projectors' size."""
    try:
        from client.site.encoders.registry import dimensions

        dims = dimensions(study)
        if study.model.slm == "nano":
            from client.site.model.system import adapter_spec, build

            return int(adapter_spec(build(study, dims))["trainable_parameters"])
        if study.model.lora or study.model.decoder:
            return None
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            study.model.slm, revision=study.model.revision, local_files_only=True
        )
        return sum((width + 1) * int(config.hidden_size) for width in dims.values())
    except (ImportError, FedwardError, OSError, AttributeError):
        return None


def _memory(plan: Plan) -> str:
    if plan.study.model.slm != "nano":
        return "the SLM in bf16, its activations for one batch, and about 1 GB"
    return f"{_RESIDENT_BYTES / 1e9:.1f} GB"

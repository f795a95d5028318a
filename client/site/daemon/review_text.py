"""A review in plain words, for the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.site.daemon.review import Review
from common.privacy.events import Population
from common.privacy.lifetime import Spending
from common.privacy.policy import Policy

_POPULATIONS: dict[Population, str] = {"train": "training", "validation": "validation"}


def show(console: Console, site: str, policy: Policy, review: Review) -> None:
    """Prints what a study would do, what would leave, what it costs and what stands against it."""
    study = review.study
    console.print(Text.assemble((f"Study '{study.name}' at site {site}", "bold")))
    console.print(f"hash {study.hash}", highlight=False, soft_wrap=True)
    if study.description:
        console.print(study.description, markup=False, highlight=False)
    for title, lines in (
        ("What it would do", _does(review)),
        ("What would leave the hospital", _leaves(policy, review)),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(f"· {line}", markup=False, highlight=False)
    console.print("\n[bold]What it costs your patients[/bold]")
    console.print(_costs(review))
    console.print(_meaning(review), markup=False, highlight=False)
    console.print("\n[bold]Against your policy[/bold]")
    for demand in review.demands:
        mark = ("✓", "green") if demand.holds else ("✗", "bold red")
        console.print(Text.assemble(mark, f" {demand.text}"))
        if not demand.holds:
            console.print(f"    {demand.code}: {demand.why}", markup=False, highlight=False)
            console.print(f"    cure: {demand.cure}", markup=False, highlight=False)
    verdict = (
        ("Nothing stands against it; the decision is yours.", "bold green")
        if review.approvable
        else ("It cannot be approved as it is.", "bold red")
    )
    console.print(Text.assemble("\n", verdict))


def _does(review: Review) -> list[str]:
    study, privacy = review.study, review.study.privacy
    tasks = ", ".join(
        f"{name} ({task.description.rstrip('.')})" if task.description else name
        for name, task in study.tasks.items()
    )
    lines = [
        f"learn to predict: {tasks}",
        "from: "
        + ", ".join(f"{n} ({s.modality}, by {s.encoder})" for n, s in study.sources.items()),
        f"with {len(study.federation.sites)} sites, in {study.federation.rounds} rounds "
        f"({study.priced_rounds} with spare ones) of {study.training.steps_per_round} steps, "
        f"{review.runs} time{'s' if review.runs > 1 else ''}",
    ]
    if privacy.mode == "none":
        lines.append("WITHOUT PRIVACY: every training patient in every step, no noise")
    else:
        lines.append(
            f"each step draws each of your {review.patients} training patients with probability "
            f"{privacy.sample_rate:g}, up to {privacy.records_per_patient} record"
            f"{'s' if privacy.records_per_patient > 1 else ''} of each, clips each one's influence "
            f"to {privacy.max_grad_norm:g} and adds noise of {privacy.noise_multiplier:g} times "
            "that"
        )
    if study.start:
        lines.append(
            f"start from the adapter {study.start.adapter[:16]} of study {study.start.study[:16]}: "
            "what that one released of your patients is charged to it, and adds up with this one's"
        )
    lines.append(
        f"keep {study.evaluation.validation_fraction:.0%} of the patients out of training, for "
        f"{study.evaluation.releases} evaluation{'s' if study.evaluation.releases > 1 else ''}"
    )
    return lines


def _leaves(policy: Policy, review: Review) -> list[str]:
    study = review.study
    noised = "not noised" if study.privacy.mode == "none" else "noised"
    size = "the adapter's numbers (the models are not on this machine)"
    if review.parameters is not None:
        size = f"{review.parameters:,} numbers of the adapter"
    cells = len(study.tasks) * 2 * study.evaluation.bins
    timing = (
        f"answers leave at multiples of {policy.release_slot:g} s"
        if policy.release_slot
        else "how long each answer took (policy.release_slot would hide it)"
    )
    return [
        f"after each round: {size}, {noised}",
        f"after each evaluation: {cells} counts of a score histogram, {noised}",
        "the public key, ledger receipts (line count and hash), ε spent, and refusal codes",
        timing,
        "never: records, embeddings, exact metrics, numbers of patients, error texts",
    ]


def _costs(review: Review) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("patients")
    for name in ("ε of this study", "δ", "lifetime ε now", "after", "cap", "at δ", "rule"):
        table.add_column(name, justify="right")
    for population, title in _POPULATIONS.items():
        price = review.price.get(population, 0.0)
        before, after = review.before[population], review.after[population]  # type: ignore[index]
        table.add_row(
            title, _up(price), f"{review.study.privacy.delta:g}", *_lifetime(before, after)
        )
    return table


def _lifetime(before: Spending | None, after: Spending | None) -> list[str]:
    if before is None or after is None:
        return ["–", "–", "no cap", "–", "–"]
    cap = after.cap
    rule = f"Rényi filter, order {cap.order}" if cap.rule == "rdp" else "sum of studies"
    return [_up(before.epsilon), _up(after.epsilon), f"{cap.epsilon:g}", f"{cap.delta:g}", rule]


def _meaning(review: Review) -> str:
    largest = max(review.price.values(), default=0.0)
    if math.isinf(largest):
        return "ε is infinite: what leaves may reveal any patient, for ever."
    sure = (math.exp(-largest) * review.study.privacy.delta + 1) / (1 + math.exp(-largest))
    return (
        "What ε means: whoever sees all that this study releases, and guesses whether one given "
        f"patient was in it at all, is right at most {math.ceil(sure * 1e4) / 1e2:g} % of the time "
        "where a coin is right 50 % (Kairouz, Oh and Viswanath 2015)."
    )


def _up(epsilon: float) -> str:
    """Rounded up: a cost may not be flattered."""
    return "∞" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1000) / 1000:.3f}"

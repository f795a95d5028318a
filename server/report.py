"""`report.json`: what a run did, what it spent and what came of it. docs/report.md explains it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.errors import FedwardError
from common.files import write_atomically
from common.privacy.pricing import epsilon_by_population
from common.privacy.receipts import Receipt
from common.study import Study
from server.metrics import Interval, Macro, Metric, TaskMetrics

if TYPE_CHECKING:  # reading a report needs no Flower
    from server.federation import Finished

Epsilons = dict[str, float | None]


class Part(BaseModel):
    """A section of the report; readers ignore keys that a later version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyName(Part):
    name: str
    hash: str


class SiteReport(Part):
    """One hospital.

    Attributes:
        patients_declared: The study's public constant, not a count.
        steps: DP-SGD steps in the answers that arrived.
        noise_multiplier: Noise over sensitivity in training; None in mode `none`.
        epsilon: The larger of the two populations' (they are disjoint patients), as the site's
            ledger stood at its last answer, or `epsilon_reserved` if none arrived; None where
            nothing bounds it (mode `none`).
        epsilon_by_population: `train` and `validation`.
        epsilon_reserved: The most that the whole study can charge, spare rounds included. Holds
            also where an answer, and with it the last word of the ledger, was lost.
        evaluations: Releases on validation patients that arrived.
        refused: Stable code of a site that did not take part to the end; None otherwise.
        left_out: By code, how many of its rounds and evaluations do not count.
        receipt: Head of its ledger at its last answer, signed by it; None if none arrived.
    """

    name: str
    patients_declared: int
    delta: float
    steps: int
    noise_multiplier: float | None
    sample_rate: float
    epsilon: float | None
    epsilon_by_population: Epsilons
    epsilon_reserved: Epsilons
    evaluations: int
    refused: str | None = None
    left_out: dict[str, int] = {}
    receipt: Receipt | None = None


class PrivacyReport(Part):
    """The terms of all sites. `simulated`: virtual hospitals or seeded randomness, so that no
    patient was protected by this run, whatever ε says."""

    mode: Literal["local", "none"]
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"
    simulated: bool
    epsilon: float | None
    delta: float
    max_grad_norm: float
    records_per_patient: int
    evaluation_noise_multiplier: float | None


class Seconds(Part):
    encode: float
    train: float
    total: float


class EvaluationReport(Part):
    """One release of the federation: after which round, of which sites, and what it said."""

    round: int
    sites: list[str]
    tasks: dict[str, TaskMetrics]
    macro: Macro


class ExactTask(Part):
    """Metrics over records, without noise, of a simulation."""

    auroc: float | None
    auprc: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    positives: int
    invalid: int = 0
    interval: dict[Metric, Interval | None]


class ExactMacro(Part):
    auroc: float | None
    auprc: float | None
    interval: dict[Metric, Interval | None]


class StartReport(Part):
    """Where the study started: the adapter of another one, which read patients too.

    Attributes:
        study, adapter: Hashes, as in the study's `[start]`.
        mode: Privacy of that study.
        taken: Arrays that were taken over; all others began with the seed's values.
        epsilon_reserved: By site and population, the most that both studies together can cost;
            None of a population where nothing bounds it, None in all where the earlier study
            started from a third.
    """

    study: str
    adapter: str
    mode: Literal["local", "none"]
    taken: list[str]
    epsilon_reserved: dict[str, Epsilons] | None


class Exact(Part):
    """What no hospital would release: exact metrics of all virtual sites together."""

    tasks: dict[str, ExactTask]
    macro: ExactMacro
    patients: int
    records: int
    sites: dict[str, Any] = {}


class Report(Part):
    """The whole of `report.json`.

    Attributes:
        start: None where the study started from its seed alone.
        simulation_ledgers: Simulations only: by site and population, epsilon of all that its ledger
            holds, of whatever study, at this study's delta; None where nothing bounds it.
    """

    fedward: str
    study: StudyName
    run: str
    status: Literal["completed"] = "completed"
    rounds: int
    rounds_asked: int
    sites: list[SiteReport]
    privacy: PrivacyReport
    encoders: dict[str, Any]
    slm: dict[str, Any]
    trainable_parameters: int
    bytes_up_per_round: int
    tasks: dict[str, TaskMetrics]
    macro: Macro
    evaluations: list[EvaluationReport] = Field(min_length=1)
    start: StartReport | None = None
    simulation_exact: Exact | None = None
    simulation_ledgers: dict[str, Epsilons] | None = None
    seconds: Seconds


def build(finished: Finished) -> Report:
    """The report of a completed run. `tasks` and `macro` are those of its last evaluation."""
    study, progress = finished.study, finished.progress
    prepared = finished.prepared
    evaluations = [
        EvaluationReport(round=e["round"], sites=e["sites"], **e["metrics"])
        for e in progress.evaluations
    ]
    return Report(
        fedward=_version(),
        study=StudyName(name=study.name, hash=study.hash),
        run=finished.run,
        rounds=progress.completed,
        rounds_asked=progress.round,
        sites=[_site(finished, name) for name in study.federation.sites],
        privacy=PrivacyReport(
            mode=study.privacy.mode,
            simulated=any(bool(body.get("simulated")) for body in prepared.values()),
            epsilon=study.privacy.epsilon if study.privacy.mode != "none" else None,
            delta=study.privacy.delta,
            max_grad_norm=study.privacy.max_grad_norm,
            records_per_patient=study.privacy.records_per_patient,
            evaluation_noise_multiplier=study.evaluation.noise_multiplier,
        ),
        encoders=finished.encoders,
        slm=dict(finished.spec["slm"]),
        trainable_parameters=int(finished.spec["trainable_parameters"]),
        bytes_up_per_round=progress.bytes_up_per_round,
        tasks=evaluations[-1].tasks,
        macro=evaluations[-1].macro,
        evaluations=evaluations,
        start=_start(finished),
        seconds=Seconds(
            encode=round(progress.seconds["encode"], 3),
            train=round(progress.seconds["train"], 3),
            total=round(progress.seconds["total"], 3),
        ),
    )


def write(out: str | Path, report: Report) -> Path:
    """Writes `OUT/report.json`, whole or not at all; written last, its presence means completed."""
    path = Path(out) / "report.json"
    text = json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text, mode=0o644)
    return path


def read(out: str | Path) -> Report:
    """Reads `OUT/report.json`.

    Raises:
        FedwardError: There is none, or it is not a report.
    """
    path = Path(out) / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FedwardError(
            f"no report at {path}", cure="a run writes it when it has completed; see failed.json"
        ) from None
    except ValueError as error:
        raise FedwardError(f"{path} is not a report: {error}") from None


def attach_exact(out: str | Path, exact: Mapping[str, Any]) -> Report:
    """Adds a simulation's exact metrics (`pooled_exact` of the site's evaluation) to its report.

    Raises:
        FedwardError: The run was not a simulation: exact metrics never leave a hospital.
    """
    report = _simulated(out, "exact metrics", "fedward site metrics")
    report = report.model_copy(update={"simulation_exact": Exact.model_validate(exact)})
    write(out, report)
    return report


def attach_ledgers(out: str | Path, epsilons: Mapping[str, Mapping[str, float]]) -> Report:
    """Adds to a simulation's report what its sites' ledgers add up to, by population.

    Raises:
        FedwardError: The run was not a simulation: other studies are a hospital's own affair.
    """
    report = _simulated(out, "sums over other studies", "fedward site ledger")
    whole = {s: {p: _finite(e) for p, e in spent.items()} for s, spent in epsilons.items()}
    report = report.model_copy(update={"simulation_ledgers": whole})
    write(out, report)
    return report


def _simulated(out: str | Path, what: str, command: str) -> Report:
    """The report of a simulation; no other may be given what no hospital would release."""
    report = read(out)
    if not report.privacy.simulated:
        raise FedwardError(
            f"{what} never leave a hospital; this run was no simulation",
            cure=f"look at them there: {command}",
        )
    return report


def _start(finished: Finished) -> StartReport | None:
    start, study = finished.start, finished.study
    if start is None:
        return None
    sites = {site: start.epsilon_with(study, site) for site in study.federation.sites}
    return StartReport(
        study=start.terms.study,
        adapter=start.terms.adapter,
        mode=start.study.privacy.mode,
        taken=finished.progress.taken,
        epsilon_reserved={s: e for s, e in sites.items() if e is not None} or None,
    )


def _site(finished: Finished, name: str) -> SiteReport:
    study, progress = finished.study, finished.progress
    reserved = _reserved(study, name)
    # No answer came: it may still have charged one that was lost, so the most it can be stands in.
    stated = progress.epsilon.get(name, reserved)
    spent: Epsilons = {
        population: _finite(stated.get(population, 0.0)) if study.privacy.mode != "none" else None
        for population in ("train", "validation")
    }
    values = list(spent.values())
    return SiteReport(
        name=name,
        patients_declared=study.federation.sites[name].patients_declared,
        delta=study.privacy.delta,
        steps=progress.steps.get(name, 0),
        noise_multiplier=study.privacy.noise_multiplier,
        sample_rate=study.privacy.sample_rate,
        epsilon=None if None in values else max(v for v in values if v is not None),
        epsilon_by_population=spent,
        epsilon_reserved=reserved,
        evaluations=progress.releases.get(name, 0),
        refused=progress.refused.get(name),
        left_out=dict(sorted(progress.left_out.get(name, {}).items())),
        receipt=finished.receipts.get(name),
    )


def _reserved(study: Study, site: str) -> Epsilons:
    prices = epsilon_by_population(study.reserved_events(site), study.privacy.delta)
    return {population: _finite(price) for population, price in prices.items()}


def _finite(epsilon: float | None) -> float | None:
    """JSON has no infinity: None says that nothing bounds it."""
    if epsilon is None or not math.isfinite(epsilon):
        return None
    return float(epsilon)


def _version() -> str:
    try:
        return metadata.version("fedward")
    except metadata.PackageNotFoundError:
        return "0+bundle"

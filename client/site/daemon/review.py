"""A study as a person sees it who may let it in: what it would do, let out and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from client.site.daemon.demands import Demand, demands, model_demands
from client.site.daemon.hospital import Hospital
from client.site.encoders.registry import dimensions, fingerprints
from common.errors import EncoderError, ModelError
from common.privacy.accounts import reserves
from common.privacy.book import POPULATIONS
from common.privacy.events import Population
from common.privacy.ledger import planned
from common.privacy.lifetime import Commitment, Spending
from common.privacy.lines import Decision, reserve_hash
from common.privacy.pricing import epsilon_by_population
from common.study import Study


@dataclass(frozen=True)
class Review:
    """What a person decides on.

    Attributes:
        reserve: Hash of what an approval sets aside: part of what a person signs.
        demands: Everything that must hold, and whether it does.
        price: ε of the whole study by population, at its delta, by PLD; with all that it released
            here before.
        before, after: Lifetime spending without and with the study; None without a cap.
        patients: Training patients here; the number stays here.
        parameters: Trainable ones, that is numbers in each training answer; None where the models
            are not on this machine.
        encoders: SHA-256 by source.
        slm: SHA-256 of the language model; None as `parameters`.
    """

    study: Study
    runs: int
    reserve: str
    demands: tuple[Demand, ...]
    price: Mapping[str, float]
    before: Mapping[Population, Spending | None]
    after: Mapping[Population, Spending | None]
    patients: int
    parameters: int | None
    encoders: Mapping[str, str]
    slm: str | None

    @property
    def approvable(self) -> bool:
        """Whether nothing stands against it."""
        return all(demand.holds for demand in self.demands)


def review(hospital: Hospital, study: Study, runs: int = 1) -> Review:
    """Holds a study against policy, ledger, data and models. Nothing is approved, nothing charged.

    Args:
        study: Resolved.
        runs: How often it shall be let run.

    Raises:
        Refusal: `site-unknown`, `study-invalid`: there is nothing to review here;
            `validation-fraction-fixed`.
        FedwardError: The shard cannot be read.
    """
    hospital.ledger.refresh()
    account = hospital.ledger.book.studies.get(study.hash)
    named = hospital.name in study.federation.sites
    wanted = planned(study, hospital.name, runs) if named and study.resolved else Counter()
    more = account.more(wanted) if account else wanted
    committed = account.committed + more if account else wanted
    found = list(
        demands(
            hospital.policy,
            hospital.name,
            hospital.identity.public,
            study,
            committed,
            hospital.roster,
        )
    )
    for demand in found[:2]:  # named here, and resolved: the rest builds on it
        demand.insist()
    patients = hospital.training_patients(study)
    found.append(hospital.enough(study, patients))
    encoders: Mapping[str, str] = {}
    slm = parameters = None
    try:
        encoders = fingerprints(study)
        with hospital.bench.lock:
            spec = hospital.bench.resident(study, dimensions(study)).spec
        slm, parameters = spec["slm"]["sha256"], int(spec["trainable_parameters"])
        found += model_demands(hospital.policy, encoders, slm)
    except (EncoderError, ModelError) as error:
        found.append(Demand("model-invalid", False, "its models are on this machine", str(error)))
    book, delta = hospital.ledger.book, study.privacy.delta
    before = {population: book.lifetime(population) for population in POPULATIONS}
    after = {
        population: book.lifetime(population, Commitment(delta, more)) for population in POPULATIONS
    }
    for population, spending in after.items():
        if spending is not None:
            found.append(
                Demand(
                    "lifetime-exceeded",
                    spending.within,
                    f"the {population} patients stay within ε {spending.cap.epsilon:g} in their "
                    "lifetime",
                    f"it would take them to ε {spending.epsilon:.3f} at δ {spending.delta:g}",
                    "revoke a study that is not needed, or ask for a smaller one",
                )
            )
    return Review(
        study=study,
        runs=runs,
        reserve=reserve_hash(study.hash, delta, runs, reserves(wanted)),
        demands=tuple(found),
        price=epsilon_by_population(committed, delta),
        before=before,
        after=after,
        patients=patients,
        parameters=parameters,
        encoders=encoders,
        slm=slm,
    )


def approve(hospital: Hospital, reviewed: Review, decision: Decision, expires: str) -> None:
    """Signs a person's decision into the ledger, and fixes the split of the patients.

    Args:
        decision: On this study, with the review's runs and this expiry.
        expires: ISO 8601, UTC.

    Raises:
        Refusal: The first demand that is not met, or as `Ledger.approve`.
        PrivacyError: The policy does not let this person decide.
    """
    for demand in reviewed.demands:
        demand.insist()
    hospital.fix_split(reviewed.study)
    hospital.ledger.approve(reviewed.study, runs=reviewed.runs, expires=expires, decision=decision)

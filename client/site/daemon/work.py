"""The two kinds of work that touch patients: a training round and an evaluation.

Each is made ready first (adapter checked, mechanism proven) without touching a patient, so that the
guard can charge between `ready` and `run`. Both are pure in what they are given: a round begins
from the received adapter with a fresh optimiser, so a resumed run needs nothing that a daemon
remembers.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.site.daemon.bench import Resident
from client.site.daemon.hospital import Hospital, Prepared
from client.site.encoders.dataset import Dataset
from client.site.evaluation.exact import write_exact
from client.site.evaluation.histograms import release, score_histograms
from client.site.model.losses import row_loss
from client.site.training.entropy import Entropy
from client.site.training.invariance import BatchDependent, scores_stand_alone
from client.site.training.plan import (
    DPExecutionPlan,
    NonPrivatePlan,
    OptimizerConfig,
    PerformanceFlags,
    Plan,
)
from client.site.training.trainer import Trainer
from common.errors import PrivacyError
from common.messages import Arrays, Request
from common.study import Study

# Per pass of training, whatever the site's size: in smaller passes kernels were seen to round a
# patient by their place among the others.
_PATIENTS = 32
_SCORED_ROWS = 64  # records per pass of an evaluation, where they do not affect each other


class Work(Protocol):
    """Something that is ready to touch patients, once it is charged."""

    def run(self) -> tuple[dict[str, Any], Arrays]:
        """Body and arrays of the answer."""

    def close(self) -> None:
        """Leaves the shared model as it was found."""


def ready(hospital: Hospital, prepared: Prepared, request: Request, arrays: Arrays) -> Work:
    """The work that a request asks for. Call it, and use what it returns, under the bench's lock.

    Raises:
        Refusal: `adapter-invalid`.
        PrivacyError: The model breaks an assumption of the plan.
    """
    resident = hospital.bench.resident(prepared.study, prepared.dims)
    resident.load(arrays)
    kind = TrainingRound if request.kind == "train" else Evaluation
    return kind(hospital, prepared, resident, request.round)


class TrainingRound:
    """`steps_per_round` steps from the received adapter.

    Raises:
        PrivacyError: The model breaks an assumption of the plan, found on random rows.
    """

    def __init__(
        self, hospital: Hospital, prepared: Prepared, resident: Resident, round_: int
    ) -> None:
        study = prepared.study
        plan = plan_of(study, hospital.name)
        if plan.event != study.round_event(hospital.name):
            raise PrivacyError("the plan's event is not the one that the study reserved")
        self._hospital, self._resident = hospital, resident
        self._round, self._steps = round_, study.training.steps_per_round

        def trainer(micro_batch: int) -> Trainer:
            return Trainer(
                resident.model,
                row_loss(study),
                prepared.populations.train,
                plan,
                optimizer_of(study),
                _entropy(study, hospital.name, "train", round_),
                PerformanceFlags(micro_batch=micro_batch),
            )

        try:
            self._trainer = trainer(_PATIENTS)
        except BatchDependent as error:  # alone in its pass, a patient has no neighbours
            hospital.log.info("one patient per pass: %s", error)
            self._trainer = trainer(1)

    def run(self) -> tuple[dict[str, Any], Arrays]:
        hospital = self._hospital
        hospital.show(phase="training", round=self._round, step=0, steps=self._steps)

        def stepped(step: int) -> None:
            hospital.status.step = step
            hospital.check_stopping()

        self._trainer.run(self._steps, stepped)
        return {"steps": self._steps}, self._resident.adapter()

    def close(self) -> None:
        self._trainer.close()


class Evaluation:
    """Score histograms of the validation patients; the exact metrics stay in the state folder.

    Where the scores of a pass hang on its other records, passes of one record each have none.
    """

    def __init__(
        self, hospital: Hospital, prepared: Prepared, resident: Resident, number: int
    ) -> None:
        self._hospital, self._prepared = hospital, prepared
        self._resident, self._number = resident, number
        device = hospital.bench.device
        alone = scores_stand_alone(
            resident.model, prepared.populations.validation, _SCORED_ROWS, device, self._logits
        )
        self._rows = _SCORED_ROWS if alone else 1

    def run(self) -> tuple[dict[str, Any], Arrays]:
        hospital, study = self._hospital, self._prepared.study
        hospital.show(phase="evaluating")
        data, settings = self._prepared.populations.validation, study.evaluation
        logits, labels = self._score(data), data.labels.numpy()
        entropy = _entropy(study, hospital.name, "evaluate", self._number)
        histograms = score_histograms(
            logits,
            labels,
            data.rows_of_patient,
            bins=settings.bins,
            logit_range=settings.logit_range,
            records_per_patient=settings.records_per_patient,
            rng=entropy.records,
        )
        noise = None if study.privacy.mode == "none" else settings.noise_multiplier
        released = release(histograms, noise, entropy)
        try:
            write_exact(
                hospital.state / "exact",
                self._number,
                logits,
                labels,
                data.rows_of_patient,
                list(study.tasks),
            )
        except Exception as error:  # their own affair: whether they exist must not show outside
            hospital.log.error("no exact metrics of release %d", self._number, exc_info=error)
        return {"release": self._number}, {"histograms": released}

    def close(self) -> None:
        """Nothing was changed."""

    @torch.no_grad()
    def _score(self, data: Dataset) -> NDArray[np.float32]:
        """Logits [N, K]. Every pass has the same shape, padded by repeating a row, so that a row's
        score does not hang on how many records there are."""
        device = self._hospital.bench.device
        scores = [np.zeros((0, data.labels.shape[1]), dtype=np.float32)]
        for start in range(0, data.n_records, self._rows):
            rows = torch.arange(start, start + self._rows).clamp(max=data.n_records - 1)
            logits = self._logits(
                {source: x[rows].to(device) for source, x in data.inputs.items()},
                {source: m[rows].to(device) for source, m in data.present.items()},
            )
            scores.append(logits.cpu().numpy())
            self._hospital.check_stopping()
        return np.concatenate(scores)[: data.n_records]

    def _logits(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self._resident.model(inputs, present).logits_BK.float()


def plan_of(study: Study, site: str) -> Plan:
    """What one round of the study obeys at `site`."""
    privacy = study.privacy
    schedule: dict[str, Any] = {
        "sample_rate": privacy.sample_rate,
        "records_per_patient": privacy.records_per_patient,
        "steps": study.training.steps_per_round,
        "patients_declared": study.federation.sites[site].patients_declared,
    }
    if privacy.mode == "none":
        return NonPrivatePlan(**schedule)
    assert privacy.noise_multiplier is not None, "only a resolved study is admitted"
    return DPExecutionPlan(
        **schedule,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=privacy.noise_multiplier,
        batch_slack=privacy.batch_slack,
    )


def optimizer_of(study: Study) -> OptimizerConfig:
    """How a site takes its steps."""
    training = study.training
    noise = (study.privacy.noise_multiplier or 1.0) if training.scale_by_noise else 1.0
    return OptimizerConfig(
        name=training.optimizer,
        learning_rate=training.learning_rate / noise,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


def _entropy(study: Study, site: str, use: str, number: int) -> Entropy:
    """The operating system's. Without privacy, and only then, a function of the study, so that a
    resumed baseline is the uninterrupted one bit for bit."""
    if study.privacy.mode == "none":
        return Entropy.seeded(f"{study.seed}|{site}|{use}|{number}")
    return Entropy()

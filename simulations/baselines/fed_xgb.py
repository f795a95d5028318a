"""HAIM's boosted trees over hospitals, by Flower's `FedXgbBagging`.

In a round every hospital adds one tree to the boosters so far, fitted to its own records, and sends
it; Flower's strategy appends the trees of all hospitals to the booster that they start the next
round from. The strategy takes one tree of each answer, however many a hospital grew, so a round is
one local tree.

The forest is as large as a pooled one: `n_estimators` trees of all hospitals together, in
ceil(n_estimators / N) rounds with N hospitals. The N trees of a round answer the same residuals, so
each weighs learning_rate / N, as in Flower's example: a round is one boosting step by their mean.
Unscaled, a round would step N times too far. All trees weigh alike, whatever their hospital's size:
that is Flower's rule.

What varies only between hospitals no tree can split on, and where their prevalences differ, each
hospital's tree pulls all others towards its own: federated may be worse than local.

There is no privacy here: epsilon is infinite. A split's threshold is a value that a patient has, or
lies between two; a leaf's weight is a sum over those who reach it. Both leave the hospital as they
are, readable by the coordinator and by every other hospital. No clipping and no noise stands in
between, and nothing is charged to a ledger. A hospital should do this only with those to whom it
would hand the records too. It is a yardstick for utility.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import xgboost
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedXgbBagging
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from simulations.baselines.haim import GRID, Table

_HELD_OUT = 0.2
"""Share of each hospital's training patients on which the grid's point is chosen."""

_WEIGHT = "weight"
_Point = Mapping[str, float]


@dataclass(frozen=True)
class Hospital:
    """One hospital's records of one task.

    Attributes:
        x: `[n, D]`.
        y: `[n]`, 0 or 1.
        patients: `[n]`.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int8]
    patients: NDArray[np.int64]

    @classmethod
    def of(cls, table: Table, task: int) -> Hospital:
        """The records of a table whose label is known."""
        known = table.labels[:, task] >= 0
        return cls(table.x[known], table.labels[known, task], table.patients[known])

    def split(self, rng: np.random.Generator) -> tuple[Hospital, Hospital]:
        """What trains while the point is chosen, and what it is chosen on; by patient."""
        patients = rng.permutation(np.unique(self.patients))
        held = np.isin(self.patients, patients[: round(_HELD_OUT * len(patients))])
        return self._rows(~held), self._rows(held)

    def _rows(self, rows: NDArray[np.bool_]) -> Hospital:
        return Hospital(self.x[rows], self.y[rows], self.patients[rows])


def fit_and_score(
    trains: Sequence[Table],
    validation: Table,
    *,
    grid: Mapping[str, Sequence[float]] = GRID,
    seed: int = 0,
    threads: int = 1,
) -> NDArray[np.float64]:
    """Logits `[N, K]` of the validation records, one federated booster per task; 0 for a task of
    which the hospitals together know one class only.

    The grid's point is the one whose booster, trained without a fifth of each hospital's training
    patients, orders most of those patients' pairs rightly; HAIM's five folds would be five
    federations per point. A hospital that knows a task of nobody takes no part in it.
    """
    logits = np.zeros(validation.labels.shape)
    for task in range(validation.labels.shape[1]):
        hospitals = [h for h in (Hospital.of(table, task) for table in trains) if len(h.y)]
        if len({label for h in hospitals for label in h.y}) < 2:
            continue
        with _quiet():
            point = choose(hospitals, grid, seed=seed, threads=threads)
            booster = Bagging(hospitals, point, seed=seed, threads=threads).fit()
        logits[:, task] = _margins(booster, validation.x)
    return logits


def choose(
    hospitals: Sequence[Hospital],
    grid: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    threads: int = 1,
) -> _Point:
    """The point of the grid that federated validation prefers; the first one where no hospital
    has both classes among the patients that it holds out."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) == 1:
        return points[0]
    parts = [h.split(np.random.default_rng((seed, i))) for i, h in enumerate(hospitals)]
    parts = [(train, held) for train, held in parts if len(train.y)]
    helds = [held for _, held in parts]
    if not any(_pairs(held.y) for held in helds):
        return points[0]
    boosters = [
        Bagging([train for train, _ in parts], point, seed=seed, threads=threads)
        for point in points
    ]
    found = [boosting.validate(boosting.fit(), helds) for boosting in boosters]
    return points[int(np.argmax(found))]


class Bagging:
    """A federation of one task at one point of the grid; messages pass by a call.

    Args:
        hospitals: Each with at least one record.
        point: `max_depth`, `n_estimators` (of all hospitals together), `learning_rate`.
    """

    def __init__(
        self, hospitals: Sequence[Hospital], point: _Point, *, seed: int, threads: int
    ) -> None:
        count = len(hospitals)
        self.rounds = math.ceil(point["n_estimators"] / count)
        self._params = {
            "objective": "binary:logistic",
            # XGBoost would take each hospital's own prevalence, and Flower keeps but one of them.
            "base_score": 0.5,
            "max_depth": int(point["max_depth"]),
            "learning_rate": point["learning_rate"] / count,
            "seed": seed,
            "nthread": threads,
        }
        self._records = [xgboost.DMatrix(h.x, label=h.y) for h in hospitals]
        self._strategy = FedXgbBagging(
            min_train_nodes=count,
            min_evaluate_nodes=count,
            min_available_nodes=count,
            weighted_by_key=_WEIGHT,
        )
        # Flower's messages want to know whose they are, which its runtime says in a ServerApp.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def get_node_ids(self) -> Iterable[int]:
        """All that the strategy asks of a Flower `Grid`."""
        return range(len(self._records))

    def fit(self) -> bytes:
        """The booster after all rounds, as XGBoost's JSON."""
        arrays = _arrays(b"")
        for number in range(1, self.rounds + 1):
            messages = self._strategy.configure_train(
                number, arrays, ConfigRecord(), cast(Grid, self)
            )
            replies = [
                _reply(
                    message, weight=self._records[node].num_row(), booster=self._grow(node, seen)
                )
                for node, message, seen in _opened(messages)
            ]
            merged, _ = self._strategy.aggregate_train(number, replies)
            assert merged is not None
            arrays = merged
        return _bytes(arrays)

    def _grow(self, node: int, booster: bytes) -> bytes:
        """A booster of the one tree that this hospital adds."""
        records = self._records[node]
        if not booster:
            grown = xgboost.train(self._params, records, num_boost_round=1)
        else:
            grown = xgboost.Booster(self._params, model_file=bytearray(booster))
            trees = grown.num_boosted_rounds()
            grown.update(records, trees)
            grown = grown[trees : trees + 1]
        return bytes(grown.save_raw("json"))

    def validate(self, booster: bytes, helds: Sequence[Hospital]) -> float:
        """Share of pairs, one record of each class at the same hospital, in the right order: the
        hospitals' AUROCs weighted by their pairs.

        Args:
            helds: Held-out records, hospitals as in training.
        """
        messages = self._strategy.configure_evaluate(
            self.rounds, _arrays(booster), ConfigRecord(), cast(Grid, self)
        )
        replies = [
            _reply(message, weight=_pairs(helds[node].y), auroc=_auroc(seen, helds[node]))
            for node, message, seen in _opened(messages)
        ]
        found = self._strategy.aggregate_evaluate(self.rounds, replies)
        assert found is not None
        return cast(float, found["auroc"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Flower's two lines per round, which are thousands over a grid."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _opened(messages: Iterable[Message]) -> list[tuple[int, Message, bytes]]:
    """Hospital, message and the booster in it; in the order of hospitals, which Flower shuffles."""
    ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    return [
        (message.metadata.dst_node_id, message, _bytes(message.content["arrays"]))
        for message in ordered
    ]


def _reply(message: Message, booster: bytes | None = None, **metrics: int | float) -> Message:
    content: dict[str, Any] = {"metrics": MetricRecord({**metrics})}
    if booster is not None:
        content["arrays"] = _arrays(booster)
    return Message(RecordDict(content), reply_to=message)


def _arrays(booster: bytes) -> ArrayRecord:
    return ArrayRecord([np.frombuffer(booster, dtype=np.uint8)])


def _bytes(arrays: Any) -> bytes:
    return bytes(arrays["0"].numpy().tobytes())


def _pairs(y: NDArray[np.int8]) -> int:
    return int((y == 1).sum() * (y == 0).sum())


def _auroc(booster: bytes, held: Hospital) -> float:
    """0 where the hospital holds out one class only; it then weighs nothing."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(held.y, _margins(booster, held.x))) if _pairs(held.y) else 0.0


def _margins(booster: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    loaded = xgboost.Booster(model_file=bytearray(booster))
    return np.asarray(loaded.predict(xgboost.DMatrix(x), output_margin=True))

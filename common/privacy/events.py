"""Releases, described. An event says what mechanism touched whom and how often, never an epsilon:
prices are computed from events (`common.privacy.pricing`) and can be computed again by anyone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import PrivacyError

Population = Literal["train", "validation"]


class _Release(BaseModel):
    """What every release says: whose data, protected in which unit and neighbourhood."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"


class PoissonGaussian(_Release):
    """Steps of DP-SGD: each patient enters a step with probability `sample_rate`, independently.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity of the sum, which
            includes the slack of finite arithmetic.
        steps: Noised sums computed; what later leaves the site is post-processing of them.
        max_grad_norm: C, kept for the record; the price does not depend on it.
        denominator: Public constant that divides the noised sum; no part of the price.
    """

    kind: Literal["poisson_gaussian"] = "poisson_gaussian"
    population: Population = "train"
    sample_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)
    steps: int = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    denominator: float = Field(gt=0)


class GaussianHistogram(_Release):
    """`count` noised vectors of score histograms, all of one shape.

    `noise_multiplier` is the noise over the vector's L2 sensitivity: √K for K tasks in which each
    patient has total weight 1.
    """

    kind: Literal["gaussian_histogram"] = "gaussian_histogram"
    population: Population = "validation"
    noise_multiplier: float = Field(gt=0)
    count: int = Field(ge=0)


class NoisyCount(_Release):
    """`count` noised counts (of label prevalences, say); the rest as in GaussianHistogram."""

    kind: Literal["noisy_count"] = "noisy_count"
    population: Population
    noise_multiplier: float = Field(gt=0)
    count: int = Field(default=1, ge=0)


class Unprotected(_Release):
    """A release without noise. It prices its population at infinity, for ever."""

    kind: Literal["unprotected"] = "unprotected"
    population: Population


ReleaseEvent = PoissonGaussian | GaussianHistogram | NoisyCount | Unprotected

_ANY_EVENT: TypeAdapter[ReleaseEvent] = TypeAdapter(
    Annotated[ReleaseEvent, Field(discriminator="kind")]
)


def to_json(event: ReleaseEvent) -> str:
    """One line of JSON that `from_json` turns back into an equal event."""
    return event.model_dump_json()


def from_json(line: str | bytes) -> ReleaseEvent:
    """The event of a line written by `to_json`.

    Raises:
        PrivacyError: The line describes no release known here. Nothing is guessed: an event that
            cannot be read cannot be priced.
    """
    try:
        return _ANY_EVENT.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "event"
        raise PrivacyError(
            f"not a release event: {where}: {first['msg']}",
            cure="price this ledger with the version of Fedward that wrote it",
        ) from None

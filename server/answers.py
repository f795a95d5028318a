"""What the coordinator takes from a site's answer. A site may write anything into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.study import MOST_STEPS
from server.exchange import Outcome

Epsilon = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Population = Annotated[str, Field(pattern="^(train|validation)$")]
Printed = Annotated[str, Field(max_length=300, pattern=r"^\P{C}*$")]
Body = TypeVar("Body", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Released(_Part):
    """Beside the arrays of a charged answer.

    Attributes:
        steps: DP-SGD steps that were made, none in an evaluation.
        epsilon: By population, as the site's ledger stands; None for infinity.
    """

    steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    epsilon: dict[Population, Epsilon | None] = {}


class Slm(_Part):
    """The language model, as the model card prints it."""

    model_config = ConfigDict(extra="allow")

    name: Printed
    sha256: Printed
    revision: Printed | None = None
    family: Printed | None = None
    parameters: int | None = Field(default=None, ge=0)
    embedded: bool = False


class Spec(_Part):
    """What the adapter is; see `client.site.model.system`."""

    model_config = ConfigDict(extra="allow")

    trainable_parameters: int = Field(ge=0)
    slm: Slm
    lora: dict[str, Any] | None
    designated: list[int]
    logits: str
    dims: dict[str, int]


class Ready(_Part):
    """What a site says that has prepared the study; see `client.site.daemon.hospital`."""

    spec: Spec
    encoders: dict[str, Any]
    simulated: bool


def read(outcome: Outcome, kind: type[Body]) -> dict[str, Body]:
    """The answers' bodies by site; a site whose body is none joins the refused ones."""
    bodies = {}
    for site, received in list(outcome.answers.items()):
        try:
            bodies[site] = kind.model_validate(received.answer.body)
        except ValidationError:
            leave_out(outcome, site, "answer-invalid")
    return bodies


def leave_out(outcome: Outcome, site: str, code: str) -> None:
    """The site's answer does not count."""
    del outcome.answers[site]
    outcome.refused[site] = code


def most(bodies: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """What most sites say of something that they all build from the same study."""
    said = [body[name] for body in bodies.values()]
    return dict(max(said, key=said.count))

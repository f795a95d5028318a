"""Documentation that can be checked against the code is."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import study

DOCS = Path(__file__).resolve().parent.parent / "docs"
PARTS = [
    study.Study,
    study.Source,
    study.Task,
    study.Model,
    study.Lora,
    study.Training,
    study.Privacy,
    study.Evaluation,
    study.Federation,
    study.Site,
]


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.__name__)
def test_every_key_of_a_study_is_documented(part: type[study.Part]) -> None:
    text = (DOCS / "study.md").read_text()
    for name in part.model_fields:
        assert (
            f"`{name}`" in text
            or f"[{name}]" in text
            or f"[{name}.<name>]" in text
            or f".{name}" in text
        ), f"{part.__name__}.{name} is not in docs/study.md"


def test_the_example_study_can_be_resolved() -> None:
    _, _, rest = (DOCS / "study.md").read_text().partition("```toml\n")
    example = study.Study.from_toml(rest.partition("```")[0])
    settled = study.resolve(example, sites={"north": None, "south": None})
    assert settled.resolved
    assert settled.federation.sites["south"].patients_declared == 200


@pytest.mark.parametrize("encoder", study.EMBEDDED_ENCODERS)
def test_every_embedded_encoder_is_documented(encoder: str) -> None:
    assert f"`{encoder}`" in (DOCS / "study.md").read_text()

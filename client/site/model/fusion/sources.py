"""Which part of a system reads which of a study's sources. Without torch, so that what does not fit
can be told before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import StudyError
from common.study import Source, Study, unknown
from common.systems.adacomed import AdaCoMed
from common.systems.llama_fusion import LlamaFusion
from common.systems.m_llm import Group, MLlm


def check_sources(study: Study) -> None:
    """Sorts the study's sources as its system's build would.

    Raises:
        StudyError: The options name a source that the study does not have, or leave one out.
    """
    if study.model.adacomed is not None:
        pathways_of(study, study.model.adacomed)
    if study.model.llama_fusion is not None:
        sides_of(study, study.model.llama_fusion)
    if study.model.m_llm is not None:
        streams_of(study, study.model.m_llm)


def pathways_of(study: Study, options: AdaCoMed) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """AdaCoMed's modalities of the large pathway and of the small model, each as its sources; none
    of a pathway that the form does not have.

    Raises:
        StudyError: The options name an unknown source, or no pathway reads one.
    """
    large = _modalities(study, options.modalities)
    small = _modalities(study, options.small_modalities)
    if options.form == "small-only":
        large = []
    if options.form in ("large-only", "concatenation"):
        small = []
    used = {source for group in (*large, *small) for source in group}
    if idle := [source for source in study.sources if source not in used]:
        keys = [key for key, has in (("modalities", large), ("small_modalities", small)) if has]
        raise StudyError(
            f"source '{idle[0]}' is in no modality that AdaCoMed, form '{options.form}', reads",
            cure=f"add it to {' or '.join(map(repr, keys))}, or take it out of the study",
        )
    return large, small


def _modalities(study: Study, named: Mapping[str, Sequence[str]]) -> list[Sequence[str]]:
    """As named, or image, text and structured (all else)."""
    for name in (name for group in named.values() for name in group):
        if name not in study.sources:
            raise unknown("source", name, study.sources, cure="mend model.adacomed")
    if named:
        return [tuple(group) for group in named.values()]
    groups: dict[Group, list[str]] = {"image": [], "text": [], "structured": []}
    for name, source in study.sources.items():
        groups[group_of(source)].append(name)
    return [tuple(group) for group in groups.values() if group]


def sides_of(study: Study, options: LlamaFusion) -> dict[str, list[str]]:
    """Side of LLaMA-II fusion -> its sources in the study's order; `transchex` always has a text
    side.

    Raises:
        StudyError: `vision` names a source that the study does not have.
    """
    for name in options.vision:
        if name not in study.sources:
            raise StudyError(
                f"model.llama_fusion.vision: no source '{name}'",
                cure=f"name some of: {', '.join(study.sources)}",
            )
    seen = options.vision or [n for n, s in study.sources.items() if s.modality == "image"]
    text = [name for name in study.sources if name not in seen]
    vision = [name for name in study.sources if name in seen]
    sides = {"text": text, "vision": vision}
    always = "text" if options.fusion == "transchex" else None
    return {side: names for side, names in sides.items() if names or side == always}


def group_of(source: Source) -> Group:
    """The stream of M-LLM that a source's modality tells."""
    return source.modality if source.modality in ("text", "image") else "structured"


def streams_of(study: Study, options: MLlm) -> dict[str, Group]:
    """Source -> its stream of M-LLM.

    Raises:
        StudyError: `groups` names an unknown source, or `without` leaves no source.
    """
    for name in options.groups:
        if name not in study.sources:
            raise unknown("source", name, study.sources, cure="mend model.m_llm.groups")
    streams = {name: options.groups.get(name, group_of(s)) for name, s in study.sources.items()}
    if set(streams.values()) <= set(options.without):
        raise StudyError(
            f"model.m_llm.without = {list(options.without)} leaves none of the study's sources",
            cure="leave a stream in, or add a source of another one",
        )
    return streams

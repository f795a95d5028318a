"""What a study may choose of each system of the papers, beside what all systems share.

One file per system, one section `[model.<section>]` per file; a study holds the section of its own
system, every default written out, so that the choice stands in the study's hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from common.systems.adacomed import AdaCoMed
from common.systems.llama_fusion import LlamaFusion
from common.systems.m_llm import MLlm
from common.systems.part import Part


class System(NamedTuple):
    """A registered system.

    Attributes:
        section: Its options' key in `[model]`; None where the shared ones are all.
        options: Their type.
        has_slm: Whether it stands on a frozen language model.
    """

    section: str | None
    options: type[Part] | None
    has_slm: bool


SYSTEMS: Mapping[str, System] = {
    "uni-mlm": System(None, None, True),
    "adacomed": System("adacomed", AdaCoMed, False),
    "llama-fusion": System("llama_fusion", LlamaFusion, True),
    "m-llm": System("m_llm", MLlm, False),
}
"""`Model.system` of a study names one of these."""

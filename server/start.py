"""Where a study starts: the published adapter of an earlier study, `[start]` of the study file.

AdaCoMed's small model is trained first, and the whole begins with it (Chen, Zhao et al. 2025,
Algorithm 1). Under privacy that first training is a study of its own, charged in the sites'
ledgers; this module lays its adapter over the one that the second study's seed gives. An adapter is
no patient's data any more than any other that the coordinator sends: the sites need not trust it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from common.errors import StudyError
from common.messages import Arrays
from common.privacy.pricing import epsilon_by_population
from common.study import Start as Terms
from common.study import Study
from server.publish import LORA, PROJECTORS, site_name

_SHOWN = 6  # arrays in an error


@dataclass(frozen=True)
class Start:
    """A published adapter, read back.

    Attributes:
        terms: Its hash, and that of its study.
        study: That study, as it lies beside the arrays.
        arrays: Under the names that a site gives them.
    """

    terms: Terms
    study: Study
    arrays: Arrays

    @classmethod
    def read(cls, folder: Path) -> Start:
        """Reads `OUT/adapter/`, or the `OUT` that holds it.

        Raises:
            StudyError: No adapter lies there, or its parts are not of one study.
        """
        folder = folder / "adapter" if (folder / "adapter" / PROJECTORS).is_file() else folder
        paths = [path for name in (LORA, PROJECTORS) if (path := folder / name).is_file()]
        if folder / PROJECTORS not in paths:
            raise StudyError(
                f"{folder} holds no published adapter ({PROJECTORS})",
                cure="give the folder 'adapter' that a completed run wrote",
            )
        digest = hashlib.sha256()
        arrays: Arrays = {}
        try:
            for path in paths:  # by name, as the shell's *.safetensors
                content = path.read_bytes()
                digest.update(content)
                arrays |= {site_name(path.name, n): a for n, a in load(content).items()}
            with safe_open(folder / PROJECTORS, "numpy") as file:
                made_by = (file.metadata() or {}).get("study", "")
        except (OSError, SafetensorError) as error:
            raise StudyError(f"the adapter in {folder} cannot be read: {error}") from None
        except KeyError as kind:  # safetensors' numpy reader knows no bfloat16, no float8
            raise StudyError(
                f"the adapter in {folder} has arrays of type {kind}, and those of a study are F32",
                cure="give the folder 'adapter' as the run wrote it",
            ) from None
        if not (folder / "study.toml").is_file():
            raise StudyError(
                f"{folder} lacks the study.toml of the study that made its arrays",
                cure="take the folder whole, as the run wrote it",
            )
        study = Study.load(folder / "study.toml")
        if study.hash != made_by:
            raise StudyError(
                f"{folder / 'study.toml'} has hash {study.hash[:12]}…, but the arrays beside it "
                f"were made by study {made_by[:12] or 'none'}…",
                cure="take the folder whole, as the run wrote it, of the same version of Fedward",
            )
        return cls(Terms(adapter=digest.hexdigest(), study=made_by), study, arrays)

    def over(self, initial: Arrays) -> tuple[Arrays, list[str]]:
        """Lays the arrays over those that the seed gives.

        Returns:
            The adapter to start with, and the names of the arrays that were taken over; the others,
            whose names or shapes do not fit, keep the seed's values.

        Raises:
            StudyError: None fits, or one that does is not finite.
        """
        fits = [n for n, a in initial.items() if n in self.arrays and _alike(a, self.arrays[n])]
        if not fits:
            raise StudyError(
                f"no array of study {self.terms.study[:12]}… fits into this one: it has "
                f"{_shapes(self.arrays)}; this study has {_shapes(initial)}",
                cure="start from a study of the same system, sources and widths",
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told
            taken = {name: self.arrays[name].astype(np.float32) for name in fits}
        if broken := [name for name, array in taken.items() if not np.isfinite(array).all()]:
            raise StudyError(
                f"array '{broken[0]}' of the start holds values that are not finite in float32",
                cure="start from another adapter; this one's training diverged",
            )
        return {**initial, **taken}, fits

    def epsilon_with(self, study: Study, site: str) -> dict[str, float | None] | None:
        """The most that both studies can cost a patient of `site`, by population; None of a
        population for infinity.

        Composed from both protocols, spare rounds included, at the second one's delta: a bound
        where the second one's parameters do not depend on what the first released. A site outside
        the first one's roster has released nothing for it. None where the first study started from
        a third, whose protocol is not known here.
        """
        if self.study.start is not None:
            return None
        events = list(study.reserved_events(site))
        if site in self.study.federation.sites:
            events += self.study.reserved_events(site)
        prices = epsilon_by_population(events, study.privacy.delta)
        return {p: price if math.isfinite(price) else None for p, price in prices.items()}


def started(study: Study, folder: Path | None) -> tuple[Study, Start | None]:
    """The study with its `[start]` settled, and the adapter to start from.

    A study without `[start]` that is given a folder becomes another study, with another hash.

    Args:
        folder: Of the published adapter; None where none is given.

    Raises:
        StudyError: The study starts from an adapter that is not given, or from another one.
    """
    if folder is None:
        if study.start is not None:
            raise StudyError(
                f"study '{study.name}' starts from adapter {study.start.adapter[:12]}…, made by "
                f"study {study.start.study[:12]}…, and none was given",
                cure="give its folder with --start (run configuration: start), or take [start] out",
            )
        return study, None
    start = Start.read(folder)
    if study.start is None:
        return Study.model_validate({**study.model_dump(), "start": start.terms}), start
    if study.start != start.terms:
        raise StudyError(
            f"study '{study.name}' starts from adapter {study.start.adapter[:12]}… of study "
            f"{study.start.study[:12]}…, but {folder} holds adapter {start.terms.adapter[:12]}… "
            f"of study {start.terms.study[:12]}…",
            cure="give the folder that [start] names, or take [start] out of the study",
        )
    return study, start


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.issubdtype(other.dtype, np.floating)


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    shown = [f"{name} {list(array.shape)}" for name, array in sorted(arrays.items())[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(arrays) > _SHOWN else "")

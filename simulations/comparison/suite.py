"""A suite: what is compared, as a TOML file. `docs/compare.md` lists every key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from client.site.model.fusion.sources import check_sources
from common.errors import StudyError, explain
from common.study import Key, Study, merged, unknown
from common.systems.adacomed import written_out
from common.systems.part import Part

Arrangement = Literal["federated", "pooled", "local"]
Privacy = Literal["none"] | float
Kind = Literal["system", "haim", "dp-logistic"]

SUITES = "simulations.studies.suites"
DATA_RATIO = "data_ratio"
SINGLE, ABLATION, BEFORE = "single", "ablation", "before"
_KINDS_OF_SOURCES = {"images": ("image",), "notes": ("text",), "structured": ("series", "table")}


class Arm(Part):
    """A row of the table.

    Attributes:
        kind: A `system` of the papers by the study's own path; `haim`, gradient-boosted trees on
            the embeddings; `dp-logistic`, logistic regression by DP-SGD (studies of one task).
        study: Sections laid over the suite's study.
        sources: Only these of the study's sources; empty takes all.
        privacy, arrangements, seeds: Only these of the suite's.
        after: Another arm, whose adapter this one starts from: its pre-training, charged to the
            same ledgers.
        grid: `full` is HAIM's of 24 points, `one` a single one (kind `haim`).
    """

    kind: Kind = "system"
    study: dict[str, Any] = {}
    sources: tuple[str, ...] = ()
    privacy: tuple[Privacy, ...] | None = None
    arrangements: tuple[Arrangement, ...] | None = None
    seeds: tuple[int, ...] | None = None
    after: str | None = None
    grid: Literal["full", "one"] = "one"


class Sweep(Part):
    """An arm with one key at several values.

    Attributes:
        key: Of the study, dotted (`model.adacomed.contrast_weight`), or `data_ratio`: the share of
            each hospital's training patients that is kept.
    """

    arm: str
    key: str
    values: tuple[float | str | bool, ...] = Field(min_length=1)
    privacy: tuple[Privacy, ...] | None = None
    arrangements: tuple[Arrangement, ...] | None = None
    seeds: tuple[int, ...] | None = None


class Suite(Part):
    """A matrix of runs.

    Attributes:
        study: A ready study's name or a file: what all arms have in common.
        reference: Arm that the others are compared with, patient for patient.
        single_sources: Arms that are also run on each source alone, in their first arrangement.
        ablations: Arms that are also run, in their first arrangement, without images, without
            notes, without structured data.
        maps: Arms of AdaCoMed of which a map of the representations is drawn.
    """

    name: str
    description: str = ""
    study: str
    reference: str | None = None
    seeds: tuple[int, ...] = (0,)
    privacy: tuple[Privacy, ...] = ("none", 8.0, 2.0)
    arrangements: tuple[Arrangement, ...] = ("federated",)
    arms: dict[Key, Arm] = Field(min_length=1)
    sweeps: dict[Key, Sweep] = {}
    single_sources: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

    @field_validator("seeds", "privacy", "arrangements")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("must not be empty")
        if len(set(values)) < len(values):
            raise ValueError("names a value twice")
        if any(isinstance(v, float) and not v > 0 for v in values):
            raise ValueError("an epsilon is above 0")
        return values

    @model_validator(mode="after")
    def _known(self) -> Suite:
        named = [*self.single_sources, *self.ablations, *self.maps]
        named += [sweep.arm for sweep in self.sweeps.values()]
        named += [arm.after for arm in self.arms.values() if arm.after]
        for name in [*named, *([self.reference] if self.reference else [])]:
            if name not in self.arms:
                raise ValueError(f"no arm '{name}'; there are {', '.join(self.arms)}")
        for name in self.arms:
            self._check_after(name)
        return self

    def _check_after(self, name: str) -> None:
        chain = [name]
        while (after := self.arms[chain[-1]].after) is not None:
            for one in (chain[-1], after):
                if (kind := self.arms[one].kind) != "system":
                    raise ValueError(
                        f"arm '{chain[-1]}' comes after '{after}', but '{one}' is of kind "
                        f"'{kind}': only arms of kind 'system' have adapters"
                    )
            if after in chain:
                circle = " after ".join(f"'{one}'" for one in [*chain, after])
                raise ValueError(f"no arm can be the first: {circle}")
            chain.append(after)

    @classmethod
    def load(cls, source: str | Path) -> Suite:
        """From a file, or the name of a ready suite.

        Raises:
            StudyError: There is none, or it is not a suite.
        """
        ready = resources.files(SUITES).joinpath(f"{source}.toml")
        path = Path(source)
        try:
            text = ready.read_text() if ready.is_file() else path.read_text()
        except OSError as error:
            names = sorted(
                f.name.removesuffix(".toml")
                for f in resources.files(SUITES).iterdir()
                if f.name.endswith(".toml")
            )
            raise StudyError(
                f"cannot read suite {source} ({error.strerror})",
                cure=f"give a TOML file, or a ready suite: {', '.join(names)}",
            ) from None
        try:
            return cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"{source} is not TOML: {error}") from None
        except ValidationError as error:
            raise StudyError(
                f"suite {source}: {explain(error)}", cure="docs/compare.md lists the keys"
            ) from None


@dataclass(frozen=True)
class Row:
    """An arm with everything spelt out.

    Attributes:
        base: The arm of the suite that it comes from.
        group: What it belongs to beside the main table: a sweep's name, `single`, `ablation`; or
            `before`, in no table but the costs': what such a row starts from.
        value: Of the sweep's key; source or kind of sources of the others.
    """

    name: str
    arm: Arm
    base: str
    group: str = ""
    value: Any = None
    ratio: float = 1.0


def rows(suite: Suite, study: Study) -> list[Row]:
    """All rows, those of sweeps, single sources and ablations included.

    Raises:
        StudyError: An arm leaves no source.
    """
    found = [Row(name, arm, name) for name, arm in suite.arms.items()]
    for name, sweep in suite.sweeps.items():
        for value in sweep.values:
            arm, ratio = suite.arms[sweep.arm], 1.0
            if sweep.key == DATA_RATIO:
                ratio = float(value)
                if not 0 < ratio <= 1:
                    raise StudyError(f"sweep '{name}': data_ratio {value} is not in (0, 1]")
            else:
                arm = arm.model_copy(update={"study": merged(arm.study, _nested(sweep.key, value))})
            only = {
                key: getattr(sweep, key)
                for key in ("privacy", "arrangements", "seeds")
                if getattr(sweep, key) is not None
            }
            label = f"{sweep.arm}, {name} {value}"
            found.append(Row(label, arm.model_copy(update=only), sweep.arm, name, value, ratio))
    for base in suite.single_sources:
        for source in _sources(suite.arms[base], study):
            arm = _narrowed(suite.arms[base], (source,))
            found.append(Row(f"{base}, {source} alone", arm, base, SINGLE, source))
    for base in suite.ablations:
        own = _sources(suite.arms[base], study)
        for kind, modalities in _KINDS_OF_SOURCES.items():
            left = tuple(s for s in own if study.sources[s].modality not in modalities)
            if left and len(left) < len(own):
                arm = _narrowed(suite.arms[base], left)
                found.append(Row(f"{base}, without {kind}", arm, base, ABLATION, kind))
    return found


def _narrowed(arm: Arm, sources: tuple[str, ...]) -> Arm:
    first = arm.arrangements and arm.arrangements[:1]
    return arm.model_copy(update={"sources": sources, "arrangements": first})


def _sources(arm: Arm, study: Study) -> tuple[str, ...]:
    for name in arm.sources:
        if name not in study.sources:
            raise unknown("source", name, study.sources)
    return arm.sources or tuple(study.sources)


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    row: Row
    privacy: Privacy
    arrangement: Arrangement
    seed: int

    @property
    def id(self) -> str:
        """Name of its folder."""
        privacy = "none" if self.privacy == "none" else f"eps{self.privacy:g}"
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.row.name)
        return f"{name}_{privacy}_{self.arrangement}_{self.seed}"

    @property
    def epsilon(self) -> float | None:
        return None if self.privacy == "none" else float(self.privacy)


def cells(suite: Suite, study: Study) -> list[Cell]:
    """The matrix, without what cannot be: trees with privacy."""
    found = []
    for row in rows(suite, study):
        arm = row.arm
        for privacy in arm.privacy or suite.privacy:
            if arm.kind == "haim" and privacy != "none":
                continue
            for arrangement in arm.arrangements or suite.arrangements:
                for seed in arm.seeds or suite.seeds:
                    found.append(Cell(row, privacy, arrangement, seed))
    return found


def predecessor(suite: Suite, study: Study, cell: Cell) -> Cell | None:
    """The cell whose adapter this one starts from; None where its arm comes after none.

    It has seen no more than this one will: the same share of the patients, and of its own sources
    those that this one has where it is narrowed. Where that leaves it as it is in the suite, it is
    that arm's own cell.

    Raises:
        StudyError: There is no such cell.
    """
    row, name = cell.row, cell.row.arm.after
    if name is None:
        return None
    arm = suite.arms[name]
    where = {"privacy": cell.privacy, "arrangements": cell.arrangement, "seeds": cell.seed}
    if any(value not in (getattr(arm, k) or getattr(suite, k)) for k, value in where.items()):
        raise StudyError(
            f"arm '{row.name}' comes after '{name}', which has no run like it",
            cure=f"give '{name}' the same privacy, arrangements and seeds",
        )
    whole = left = _sources(arm, study)
    if row.arm.sources != suite.arms[row.base].sources:
        left = tuple(source for source in whole if source in row.arm.sources)
    if not left:
        raise StudyError(
            f"'{row.name}' comes after '{name}', which has none of its sources",
            cure=f"take '{row.base}' out of 'single_sources' and 'ablations', or its 'after' away",
        )
    if left == whole and row.ratio == 1:
        return replace(cell, row=Row(name, arm, name))
    told = [f"{row.ratio:g} of the patients"] if row.ratio < 1 else []
    told += [" and ".join(left)] if left != whole else []
    narrow = arm if left == whole else arm.model_copy(update={"sources": left})
    label = f"{name} ({', '.join(told)})"
    return replace(cell, row=Row(label, narrow, name, BEFORE, ratio=row.ratio))


def study_of(base: Study, cell: Cell, sites: Mapping[str, int]) -> Study:
    """The unresolved study of a cell.

    Args:
        sites: Patients declared by site.

    Raises:
        StudyError: What the arm lays over the study does not fit; the text names the arm.
    """
    over = cell.row.arm.study
    if set(over.get("privacy", {})) & {"mode", "epsilon"}:
        raise StudyError(
            f"arm '{cell.row.name}' sets its own privacy.mode or epsilon",
            cure="that is the table's column: use the suite's or the arm's 'privacy'",
        )
    match over:
        # The base has every key: a preset is laid over it as the keys that it stands for.
        case {"model": {"adacomed": {"preset": _} as own} as model}:
            over = {**over, "model": {**model, "adacomed": written_out(own)}}
    raw = merged(base.model_dump(mode="json"), over)
    raw["privacy"]["mode"] = "none" if cell.epsilon is None else "local"
    own = _sources(cell.row.arm, base)
    raw["sources"] = {name: raw["sources"][name] for name in base.sources if name in own}
    raw["federation"]["sites"] = {n: {"patients_declared": count} for n, count in sites.items()}
    try:
        study = Study.model_validate(raw)
        check_sources(study)
    except ValidationError as error:
        raise StudyError(f"arm '{cell.row.name}': {explain(error)}") from None
    except StudyError as error:
        raise StudyError(f"arm '{cell.row.name}': {error}") from None
    return study


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return dict(value)

"""A suite: what is compared, as a TOML file. `docs/compare.md` lists every key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

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
_READS: Mapping[str, tuple[str, ...]] = {
    "haim": ("sources", "tasks", "complete_records_only"),
    "dp-logistic": (
        *("sources", "tasks", "complete_records_only"),
        *("privacy.delta", "privacy.sample_rate", "privacy.max_grad_norm", "privacy.spare_rounds"),
    ),
}
"""What of a study makes a difference to the kinds that are no system."""

_COLUMN = "that is the table's column: use the suite's or the arm's 'privacy'"
_DECLARED = "each hospital declares nine tenths of its training patients"
_SETTLED = {
    "privacy.mode": _COLUMN,
    "privacy.epsilon": _COLUMN,
    "privacy.noise_multiplier": _COLUMN,
    "evaluation.epsilon": _COLUMN,
    "evaluation.noise_multiplier": _COLUMN,
    "evaluation.validation_fraction": "all arms hold out the same patients: the suite's study "
    "decides how many",
    "federation.sites": _DECLARED,
    "federation.patients_declared": _DECLARED,
    "seed": "use the suite's or the arm's 'seeds'",
    "start": "use 'after'",
}
"""Keys of a study that the comparison sets itself, and what to do instead."""

_OF_SOURCES = {
    "adacomed": ("modalities", "small_modalities"),
    "llama_fusion": ("vision",),
    "m_llm": ("groups",),
}
"""Options of the systems that name sources."""

_KINDS_OF_SOURCES = {"images": ("image",), "notes": ("text",), "structured": ("series", "table")}


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must not be empty")
    if len(set(values)) < len(values):
        raise ValueError("names a value twice")
    return values


def _spent(values: tuple[Privacy, ...]) -> tuple[Privacy, ...]:
    if any(value != "none" and not value > 0 for value in values):
        raise ValueError("an epsilon is above 0")
    return values


Privacies = Annotated[tuple[Privacy, ...], AfterValidator(_some), AfterValidator(_spent)]
Arrangements = Annotated[tuple[Arrangement, ...], AfterValidator(_some)]
Seeds = Annotated[tuple[int, ...], AfterValidator(_some)]


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
    privacy: Privacies | None = None
    arrangements: Arrangements | None = None
    seeds: Seeds | None = None
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
    values: Annotated[tuple[float | str | bool, ...], AfterValidator(_some)]
    privacy: Privacies | None = None
    arrangements: Arrangements | None = None
    seeds: Seeds | None = None


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
    seeds: Seeds = (0,)
    privacy: Privacies = ("none", 8.0, 2.0)
    arrangements: Arrangements = ("federated",)
    arms: dict[Key, Arm] = Field(min_length=1)
    sweeps: dict[Key, Sweep] = {}
    single_sources: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

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
        for name in self.sweeps:
            if name in (SINGLE, ABLATION, BEFORE):
                raise ValueError(f"a sweep cannot be named '{name}': that is another table's name")
        several: list[Arm | Sweep] = [*self.arms.values(), *self.sweeps.values()]
        for one in several:
            arm = self.arms[one.arm] if isinstance(one, Sweep) else one
            if arm.kind == "haim" and "none" not in (one.privacy or arm.privacy or self.privacy):
                raise ValueError(
                    "an arm of kind 'haim' runs without privacy only, and 'none' is not in its "
                    "'privacy'"
                )
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
            content = ready.read_bytes() if ready.is_file() else path.read_bytes()
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
            return cls.model_validate(tomllib.loads(content.decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
                ratio = value if isinstance(value, float) else 0.0
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
            arm = _narrowed(suite, base, (source,))
            found.append(Row(f"{base}, {source} alone", arm, base, SINGLE, source))
    for base in suite.ablations:
        own = _sources(suite.arms[base], study)
        for kind, modalities in _KINDS_OF_SOURCES.items():
            left = tuple(s for s, modality in own.items() if modality not in modalities)
            if left and len(left) < len(own):
                arm = _narrowed(suite, base, left)
                found.append(Row(f"{base}, without {kind}", arm, base, ABLATION, kind))
    return found


def _narrowed(suite: Suite, name: str, sources: tuple[str, ...]) -> Arm:
    arm = suite.arms[name]
    first = (arm.arrangements or suite.arrangements)[:1]
    return arm.model_copy(update={"sources": sources, "arrangements": first})


def _sources(arm: Arm, study: Study) -> dict[str, str]:
    """The arm's sources, those that it brings itself included, and the modality of each."""
    modalities = {name: str(source.modality) for name, source in study.sources.items()}
    own = arm.study.get("sources")
    for name, source in own.items() if isinstance(own, Mapping) else ():
        said = source.get("modality", "") if isinstance(source, Mapping) else ""
        modalities[name] = str(said) or modalities.get(name, "")
    for name in arm.sources:
        if name not in modalities:
            raise unknown("source", name, modalities)
    return {name: m for name, m in modalities.items() if name in arm.sources or not arm.sources}


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
    whole = left = tuple(_sources(arm, study))
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
    over, below = cell.row.arm.study, base.model_dump(mode="json")
    _check_over(over, below, cell.row)
    match over:
        # The base has every key: a preset is laid over it as the keys that it stands for.
        case {"model": {"adacomed": {"preset": _} as own} as model}:
            over = {**over, "model": {**model, "adacomed": written_out(own)}}
    raw = merged(below, over)
    raw["privacy"]["mode"] = "none" if cell.epsilon is None else "local"
    own = _sources(cell.row.arm, base)
    gone = raw["sources"].keys() - own.keys()
    raw["sources"] = {name: source for name, source in raw["sources"].items() if name in own}
    if gone:
        raw["model"] = _without(raw["model"], gone, cell.row.name)
    raw["federation"]["sites"] = {n: {"patients_declared": count} for n, count in sites.items()}
    try:
        study = Study.model_validate(raw)
        check_sources(study)
    except ValidationError as error:
        raise StudyError(f"arm '{cell.row.name}': {explain(error)}") from None
    except StudyError as error:
        raise StudyError(f"arm '{cell.row.name}': {error}") from None
    return study


def _check_over(over: Mapping[str, Any], below: Mapping[str, Any], row: Row) -> None:
    """Whether what an arm or a sweep lays over the study can make a difference."""
    for key, value in over.items():
        if isinstance(below.get(key), Mapping) and not isinstance(value, Mapping):
            raise StudyError(
                f"arm '{row.name}': study.{key} is a section, not {value!r}",
                cure=f"name a key within it: study.{key}.<key>",
            )
    reads = _READS.get(row.arm.kind)
    for key in _dotted(over):
        for settled, cure in _SETTLED.items():
            if _within(key, settled):
                raise StudyError(f"arm '{row.name}' sets its own {key}", cure=cure)
        if reads is not None and not any(_within(key, read) for read in reads):
            raise StudyError(
                f"arm '{row.name}' is of kind '{row.arm.kind}', on which {key} has no effect",
                cure=f"take it out; what has one is {', '.join(reads)}",
            )


def _dotted(sections: Mapping[str, Any]) -> Iterator[str]:
    for key, value in sections.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{below}" for below in _dotted(value))
        else:
            yield key


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _without(model: Mapping[str, Any], gone: Set[str], name: str) -> dict[str, Any]:
    """The model without what its options say of sources that the arm leaves out."""
    changed: dict[str, Any] = {}
    for section, keys in _OF_SOURCES.items():
        own: Any = model.get(section)
        for key in keys if isinstance(own, Mapping) else ():
            if key in own and own[key] != (left := _left(own[key], gone)):
                if section == "adacomed" and not left:
                    raise StudyError(
                        f"arm '{name}' leaves no source of model.adacomed.{key}",
                        cure="name others there too, or do not run the arm without these sources",
                    )
                own = {**own, key: left}
        changed |= {section: own} if section in model else {}
    return {**model, **changed}


def _left(named: Any, gone: Set[str]) -> Any:
    """A list of sources, or groups of them, or what is said of each: without those that are gone,
    and without groups that had no others."""
    if isinstance(named, Mapping):
        rest = {k: _left(v, gone) for k, v in named.items() if k not in gone}
        return {k: v for k, v in rest.items() if v}
    return [s for s in named if s not in gone] if isinstance(named, list | tuple) else named


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return dict(value)

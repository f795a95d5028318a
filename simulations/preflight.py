"""What can be told to be wrong before anything starts: in seconds, and in the user's own terms.

Hospitals tell a coordinator nothing of their data but a code. Virtual hospitals are the user's own,
so here a mistake is named, with file and cure, before Flower and the daemon cost their time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from client.site.encoders.registry import build_encoder
from client.site.model.files import locate, require
from client.site.model.fusion.sources import check_sources
from client.site.shard import Shard
from common.errors import FedwardError, StudyError
from common.study import Source, Study, unknown
from common.systems import SYSTEMS

_IMAGES = 2000  # are decoded in seconds; of more, the daemon finds a broken one when it comes to it
_TABLE = {"series": "events", "text": "notes", "image": "images", "embedding": "embeddings"}


def check(study: Study, shards: Mapping[str, Path]) -> list[str]:
    """Checks language model, LoRA, encoders, the sources that the system's options name and every
    shard, and that each task and source of the study is known to one hospital at least.

    Args:
        shards: Folder of each site that takes part.

    Returns:
        Origin and licence of the data, one line per data set.

    Raises:
        FedwardError: The first thing that is wrong.
    """
    _there(study)
    opened = _opened(shards, _has_images(study))
    _known(study, opened)
    return list(dict.fromkeys(line for shard in opened for line in _origin(shard)))


def check_arms(arms: Mapping[str, Study], shards: Mapping[str, Path]) -> None:
    """As `check`, for several studies over the same shards, which are opened once.

    Args:
        arms: By what the user calls each of them.

    Raises:
        StudyError: The first thing that is wrong, and the arm's name.
    """
    opened = _opened(shards, any(map(_has_images, arms.values())))
    for name, study in arms.items():
        try:
            _there(study)
            _known(study, opened)
        except FedwardError as error:
            raise StudyError(f"arm '{name}': {error}") from None


def _has_images(study: Study) -> bool:
    return any(source.modality == "image" for source in study.sources.values())


def _there(study: Study) -> None:
    """Encoders, language model, matrices in it for LoRA, sources that options name."""
    model = study.model
    if SYSTEMS[model.system].has_slm:
        require(model.slm, model.revision)
        files = locate(model.slm, model.revision)
        if model.lora is not None and files is not None:
            files.lora_parameters(model.lora)
    check_sources(study)
    for source in study.sources.values():
        build_encoder(source)


def _opened(shards: Mapping[str, Path], look: bool) -> list[Shard]:
    """The shards, and whether their images can be read."""
    images, opened = _IMAGES if look else 0, []
    for path in shards.values():
        shard = Shard.open(path)
        images -= shard.images.height if shard.images is not None else 0
        if images > 0 and (problems := shard.check_images()):
            raise problems[0]
        opened.append(shard)
    return opened


def _known(study: Study, shards: Iterable[Shard]) -> None:
    without = set(study.sources)
    tasks: dict[str, None] = {}
    for shard in shards:
        tasks |= dict.fromkeys(shard.tasks)
        without -= {name for name in without if _has(shard, name, study.sources[name])}
    for task in study.tasks:
        if task not in tasks:
            raise unknown("task", task, tasks, cure="name a label column y_<task> of the shards")
    for name in study.sources:
        if name in without:
            table = _TABLE[study.sources[name].modality]
            raise StudyError(
                f"no hospital has anything for source '{name}' in its {table}.parquet",
                cure=f"take sources.{name} out of the study, or mend what it names",
            )


def place(study: Study) -> Study:
    """The same study with paths in it absolute: the daemon runs in another folder."""
    raw = study.model_dump(mode="json")
    if study.model.slm.startswith((".", "~")):
        raw["model"]["slm"] = _absolute(study.model.slm)
    for source in raw["sources"].values():
        family, colon, name = source["encoder"].partition(":")
        if colon and name.startswith((".", "~")):
            source["encoder"] = f"{family}:{_absolute(name)}"
    return Study.model_validate(raw)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _has(shard: Shard, name: str, source: Source) -> bool:
    """Whether the shard holds an input of this source, at whatever hour."""
    if source.modality == "table":
        return True
    table = getattr(shard, _TABLE[source.modality])
    if table is None:
        return False
    if source.modality == "series":
        return bool(table["series"].is_in(source.series).any())
    if source.modality == "embedding":
        return bool((table["source"] == name).any())
    if source.modality == "text" and source.categories:
        return bool(table["category"].is_in(source.categories).any())
    return bool(table.height)


def _origin(shard: Shard) -> list[str]:
    """One line, where shard.toml says something."""
    said = [
        str(shard.meta[key]) for key in ("dataset", "licence", "attribution") if shard.meta.get(key)
    ]
    return [". ".join(part.rstrip(".") for part in said)] if said else []

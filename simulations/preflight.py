"""What can be told to be wrong before anything starts: in seconds, and in the user's own terms.

Hospitals tell a coordinator nothing of their data but a code. Virtual hospitals are the user's own,
so here a mistake is named, with file and cure, before Flower and the daemon cost their time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from client.site.encoders.registry import build_encoder
from client.site.model.files import require
from client.site.model.fusion.sources import check_sources
from client.site.shard import Shard
from common.errors import StudyError
from common.study import Source, Study, unknown
from common.systems import SYSTEMS

_IMAGES = 2000  # are decoded in seconds; of more, the daemon finds a broken one when it comes to it
_TABLE = {"series": "events", "text": "notes", "image": "images", "embedding": "embeddings"}


def check(study: Study, shards: Mapping[str, Path]) -> list[str]:
    """Checks language model, encoders, the sources that the system's options name and every shard,
    and that each task and source of the study is known to one hospital at least.

    Args:
        shards: Folder of each site that takes part.

    Returns:
        Origin and licence of the data, one line per data set.

    Raises:
        FedwardError: The first thing that is wrong.
    """
    if SYSTEMS[study.model.system].has_slm:
        require(study.model.slm, study.model.revision)
    check_sources(study)
    for source in study.sources.values():
        build_encoder(source)
    without = set(study.sources)
    tasks: dict[str, None] = {}
    origins: dict[str, None] = {}
    images = _IMAGES if any(s.modality == "image" for s in study.sources.values()) else 0
    for path in shards.values():
        shard = Shard.open(path)
        images -= shard.images.height if shard.images is not None else 0
        if images > 0 and (problems := shard.check_images()):
            raise problems[0]
        tasks |= dict.fromkeys(shard.tasks)
        without -= {name for name in without if _has(shard, name, study.sources[name])}
        origins |= dict.fromkeys(_origin(shard))
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
    return list(origins)


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

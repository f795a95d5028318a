"""The synthetic hospitals as shards: written in MIMIC-IV's layout, and imported like any other."""

from __future__ import annotations

from pathlib import Path

from client.site.shard.importers.mimic import MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options
from simulations.cohort.write import PATIENTS, Progress, write_cohort

_META = {
    "dataset": "Fedward synthetic cohort",
    "licence": "CC0-1.0",
    "attribution": "made by simulations/cohort",
}


def synthetic_hospitals(
    folder: Path | str,
    hospitals: int,
    *,
    patients: int = PATIENTS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Writes `folder`/mimic-iv/<name> and imports it to `folder`/shards/<name>.

    What is there is kept. Images stay where they were written; shards link to them.

    Args:
        hospitals, patients, seed, progress: See `write_cohort`.

    Returns:
        The shards by name.

    Raises:
        StudyError, ShardError: See `write_cohort` and `import_mimic_iv`.
    """
    folder = Path(folder).absolute()
    trees = write_cohort(
        folder / "mimic-iv", hospitals, patients=patients, seed=seed, progress=progress
    )
    shards = {}
    for name, tree in trees.items():
        shards[name] = folder / "shards" / name
        if not shards[name].exists():
            notes = tree / "note"
            import_mimic_iv(
                MimicSource(tree, notes if notes.is_dir() else None, tree / "cxr"),
                shards[name],
                Options(name, meta=_META),
            )
    return shards

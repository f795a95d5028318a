"""The open MIMIC-IV demo, from its tables to the door of a study; what follows is any study's."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.site.shard.importers.mimic import META, MimicSource, import_mimic_iv
from client.site.shard.importers.staging import Options
from client.site.shard.importers.timeline import CHEXPERT_TASKS, OUTCOME_TASKS, PATHOLOGY_TASKS
from common.study import Study
from simulations.preflight import check
from simulations.run import find_shards


@pytest.fixture(scope="module")
def units(open_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mimic") / "units"
    source = MimicSource(open_data / "mimic-iv-demo")
    import_mimic_iv(source, folder, Options("demo", sites="care-unit", meta=META))
    return folder


def test_the_ready_study_fits_what_the_importer_makes(units: Path) -> None:
    study, found = Study.load("mimic-iv-demo"), find_shards(units)
    roster = {name: found[name] for name in study.federation.sites}
    (origin,) = check(study, roster)
    assert origin.startswith("MIMIC-IV.")


def test_the_study_of_the_paper_has_its_sources_series_and_tasks() -> None:
    """HAIM's 41 series, UNI-MLM's twelve tasks and AdaCoMed's three."""
    study = Study.load("mimic-iv")
    assert len(study.sources) == 7
    assert [len(study.sources[s].series) for s in ("procedure", "lab", "chart")] == [10, 22, 9]
    assert set(study.tasks) == {*PATHOLOGY_TASKS, *OUTCOME_TASKS}
    assert set(Study.load("llama-fusion").tasks) == set(CHEXPERT_TASKS)

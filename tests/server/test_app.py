"""The settings of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StudyError
from common.study import Study, resolve
from server.app import Settings


def test_nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDWARD_HOME", str(tmp_path))
    settings = Settings.read({"study": "demo", "out-dir": "", "run-id": "", "resume": False})
    assert settings.study.resolved
    assert settings.out.parent == tmp_path / "runs"
    assert settings.coordinator_key == tmp_path / "coordinator.key"
    assert settings.run
    assert not settings.resume


def test_tasks_and_sites_stand_in_the_order_that_sites_see(tmp_path: Path) -> None:
    """Histograms have an axis of tasks; a site reads the study from its canonical form."""
    path = tmp_path / "study.toml"
    study = resolve(Study.load("demo"), private=False)
    path.write_text(study.to_toml())
    read = Settings.read({"study": str(path), "out-dir": str(tmp_path)}).study
    seen = Study.model_validate_json(study.canonical())
    assert list(read.tasks) == list(seen.tasks) == list(study.tasks)
    assert (
        list(read.federation.sites) == list(seen.federation.sites) == list(study.federation.sites)
    )
    assert read.hash == study.hash


def test_a_study_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study at"):
        Settings.read({"study": "nowhere.toml", "out-dir": str(tmp_path)})

"""The same arguments write the same hospitals; what is in the way is not overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import StudyError
from simulations.cohort.cli import cohort
from simulations.cohort.write import digest, write_cohort

# THE FREEZE. The cohort's data are frozen; a change here changes every figure in docs/results.md.
# It covers the text of all tables, the values of truth.parquet, ceiling.json and the grey levels of
# all images as the locked Pillow decodes them: everything but how the files are compressed.
FROZEN = "4e72f04a9b1681cf34f43c81da0c171f639a1c0414a6daa1769f06a69d9145da"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_the_cohort_is_frozen(tmp_path: Path) -> None:
    write_cohort(tmp_path, 4, patients=6, seed=0)
    assert digest(tmp_path) == FROZEN


def test_a_hospital_does_not_depend_on_the_others(tmp_path: Path) -> None:
    few = write_cohort(tmp_path / "few", 1, patients=8, seed=3)
    many = write_cohort(tmp_path / "many", 2, patients=8, seed=3)
    assert contents(few["riverside"]) == contents(many["riverside"])
    assert digest(many["northgate"]) != digest(many["riverside"])


def test_another_seed_writes_other_patients(tmp_path: Path) -> None:
    one = write_cohort(tmp_path / "one", 1, patients=5, seed=0)
    two = write_cohort(tmp_path / "two", 1, patients=5, seed=1)
    assert digest(one["riverside"]) != digest(two["riverside"])


def test_the_digest_sees_a_grey_level_and_a_name(tmp_path: Path) -> None:
    tree = write_cohort(tmp_path, 1, patients=5)["riverside"]
    before = digest(tree)
    first, second = sorted(tree.rglob("*.jpg"))[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert digest(tree) != before
    first.write_bytes(kept)
    assert digest(tree) == before
    first.rename(first.with_name("other.jpg"))
    assert digest(tree) != before


def test_a_tree_is_kept_and_another_refused(tmp_path: Path) -> None:
    tree = write_cohort(tmp_path, 1, patients=3)["riverside"]
    (tree / "cxr" / "mark").touch()
    assert (write_cohort(tmp_path, 1, patients=3)["riverside"] / "cxr" / "mark").exists()
    with pytest.raises(StudyError, match="is in the way"):
        write_cohort(tmp_path, 1, patients=4)


def test_what_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    left = tmp_path / ".riverside.part" / "hosp"
    left.mkdir(parents=True)
    (left / "half").touch()
    tree = write_cohort(tmp_path, 1, patients=2)["riverside"]
    assert not (tree / "hosp" / "half").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["riverside"]


@pytest.mark.parametrize(("hospitals", "patients"), [(0, 5), (101, 5), (1, 0), (1, 20_001)])
def test_sizes_that_cannot_be(tmp_path: Path, hospitals: int, patients: int) -> None:
    with pytest.raises(StudyError, match="cannot be written"):
        write_cohort(tmp_path, hospitals, patients=patients)


@pytest.mark.parametrize("seed", range(4))
def test_a_single_patient_is_enough(tmp_path: Path, seed: int) -> None:
    for tree in write_cohort(tmp_path, 10, patients=1, seed=seed).values():
        assert json.loads((tree / "ceiling.json").read_text())["patients"] == 1


def test_the_command_says_how_to_import(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(cohort)
    result = CliRunner().invoke(app, [str(tmp_path), "--hospitals", "3", "--patients", "2"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "fedward import mimic-iv" in line]
    assert len(lines) == 3
    assert f"--notes {tmp_path}/riverside/note" in lines[0]
    assert "--notes" not in lines[2]  # lakeview has no note module

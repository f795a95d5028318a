"""Mistakes are named before anything starts: file, row or key, and the cure; no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.site.shard.shard import Shard
from common import cli
from common.errors import FedwardError
from common.study import Study
from simulations import synthetic_hospitals
from simulations.preflight import check, place
from simulations.run import clear, free


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return synthetic_hospitals(tmp_path_factory.mktemp("cohort"), 2, patients=12)


@pytest.fixture
def broken(cohort: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the cohort, to be broken."""
    return {n: Path(shutil.copytree(p, tmp_path / "broken" / n)) for n, p in cohort.items()}


def demo(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Study:
    raw = Study.load("demo").model_dump(mode="json")
    raw["federation"]["sites"] = {}
    change(raw)
    return Study.model_validate(raw)


def rename(column: str) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: raw["tasks"].update({column: raw["tasks"].pop("pneumonia")})


def test_a_sound_study_passes_and_says_where_data_come_from(cohort: dict[str, Path]) -> None:
    (line,) = check(demo(), cohort)
    assert "Fedward synthetic cohort" in line
    assert "CC0-1.0" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename("pneumona"), r"unknown task 'pneumona'; did you mean 'pneumonia'"),
        (
            lambda raw: raw["sources"].update(
                ecg={"modality": "embedding", "encoder": "precomputed", "dim": 8}
            ),
            r"no hospital has anything for source 'ecg' in its embeddings\.parquet[\s\S]*cure: ",
        ),
        (
            lambda raw: raw["sources"]["note"].update(categories=["nursing"]),
            r"source 'note' in its notes\.parquet",
        ),
        (
            lambda raw: raw["sources"]["lab"].update(series=["creatinin"]),
            r"unknown series 'creatinin'; did you mean 'creatinine'",
        ),
        (
            lambda raw: raw["sources"]["note"].update(encoder="huggingface:/nowhere"),
            r"no encoder folder at /nowhere",
        ),
        (
            lambda raw: raw["sources"]["xray"].update(encoder="torchxrayvision:nonsense"),
            r"unknown torchxrayvision weights 'nonsense'",
        ),
        (
            lambda raw: raw.update(
                model={"system": "adacomed", "adacomed": {"modalities": {"a": ["xrays"]}}}
            ),
            r"unknown source 'xrays'; did you mean 'xray'",
        ),
        (
            lambda raw: raw.update(
                model={"system": "llama-fusion", "llama_fusion": {"vision": ["xrays"]}}
            ),
            r"model.llama_fusion.vision: no source 'xrays'",
        ),
        (
            lambda raw: raw.update(
                model={"system": "m-llm", "m_llm": {"groups": {"xrays": "image"}}}
            ),
            r"unknown source 'xrays'; did you mean 'xray'",
        ),
        (lambda raw: raw["model"].update(slm="/nowhere"), r"slm folder /nowhere has no config"),
    ],
)
def test_what_nobody_knows(
    cohort: dict[str, Path], change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    with pytest.raises(FedwardError, match=said):
        check(demo(change), cohort)


def test_a_task_or_source_that_one_hospital_lacks_is_normal(broken: dict[str, Path]) -> None:
    folder = broken["northgate"]
    (folder / "notes.parquet").unlink()
    records = pl.read_parquet(folder / "records.parquet").drop("y_pneumonia")
    records.write_parquet(folder / "records.parquet")
    check(demo(), broken)


def test_broken_shards_are_named(broken: dict[str, Path]) -> None:
    shard = Shard.open(broken["riverside"])
    assert shard.images is not None
    picture = shard.path / shard.images["path"][3]
    picture.write_bytes(picture.read_bytes()[:200])
    place = rf"riverside/images\.parquet, row 3, file '{shard.images['path'][3]}'"
    with pytest.raises(FedwardError, match=place + r": unreadable image[\s\S]*cure: "):
        check(demo(), broken)
    (shard.path / "records.parquet").unlink()
    with pytest.raises(FedwardError, match=r"riverside/records\.parquet is missing[\s\S]*cure: "):
        check(demo(), broken)


def test_relative_paths_of_a_study_are_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    placed = place(
        demo(
            lambda raw: (
                raw["model"].update(slm="./slm"),
                raw["sources"]["note"].update(encoder="huggingface:./encoder"),
            )
        )
    )
    assert placed.model.slm == str(tmp_path / "slm")
    assert placed.sources["note"].encoder == f"huggingface:{tmp_path / 'encoder'}"
    assert place(demo()).hash == demo().hash


def test_a_folder_of_results_is_neither_mixed_nor_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    free(out)
    with pytest.raises(FedwardError, match="no run to resume"):
        free(out, resume=True)
    (out / "checkpoint").mkdir(parents=True)
    free(out, resume=True)
    with pytest.raises(FedwardError, match="holds an earlier run"):
        free(out)
    with pytest.raises(FedwardError, match="no run of Fedward"):
        clear(out)
    (out / "daemon.toml").touch()
    clear(out)
    assert not out.exists()
    out.touch()
    with pytest.raises(FedwardError, match="is a file"):
        free(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", "--synthetic", "2", "--hospitals", "9"], "9 hospitals asked for"),
        (["simulate", "--synthetic", "2", "--epsilon", "0"], "epsilon must be a positive"),
        (["simulate", "--shards", "SHARDS", "--epsilon", "1", "--no-privacy"], "exclude"),
        (["simulate", "--shards", "/nowhere"], "/nowhere: no such folder"),
        (["simulate", "--shards", "SHARDS", "--study", "nonsense"], "no study at nonsense"),
        (["simulate", "--shards", "SHARDS", "--resume"], "--resume needs --out"),
        (["simulate"], "give either --shards DIR or --synthetic N"),
        (["simulate", "--synthetic", "1", "--out", "FILE/out"], "Not a directory"),
        (["plan", "demo", "--epsilon", "-1"], "epsilon must be a positive"),
        (["plan", "FILE"], "unknown slm 'gemma'"),
        (["shard", "check", "/nowhere"], "no such folder"),
        (["site", "status", "/nowhere"], "no daemon answers"),
        (["site", "ledger", "/nowhere"], "no ledger in /nowhere"),
    ],
)
def test_the_command_line_says_one_thing_and_fails(
    arguments: list[str],
    said: str,
    cohort: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "study.toml"
    file.write_text(demo().to_toml().replace('slm = "nano"', 'slm = "gemma"'))
    shards = str(next(iter(cohort.values())).parent)
    words = [a.replace("SHARDS", shards).replace("FILE", str(file)) for a in arguments]
    monkeypatch.setattr("sys.argv", ["fedward", *words])

    def started(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = "".join(capsys.readouterr())
    assert said in " ".join(told.split())
    assert "error" in told
    assert "Traceback" not in told


def test_lora_on_what_the_language_model_lacks_is_told(cohort: dict[str, Path]) -> None:
    lora = {"rank": 2, "targets": ["qq_proj"]}
    with pytest.raises(FedwardError, match=r"no matrix 'qq_proj' for LoRA[\s\S]*cure: "):
        check(demo(lambda raw: raw["model"].update(lora=lora)), cohort)

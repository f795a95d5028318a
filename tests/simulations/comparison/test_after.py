"""Arms that come after others: what a row starts from has seen no more than the row itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import StudyError
from common.study import Study
from simulations.comparison import run as runner
from simulations.comparison.execute import Job, execute
from simulations.comparison.suite import Suite

pytestmark = pytest.mark.timeout(400)

SMALL = {"width": 48, "shared_width": 8, "prototypes": 3}


@pytest.fixture(scope="module")
def base(two_sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = two_sources
    raw["model"] = {"system": "adacomed", "adacomed": SMALL}
    raw["training"]["steps_per_round"] = 2
    raw["federation"] |= {"rounds": 1, "quorum": 1.0, "sites": {}}
    path = tmp_path_factory.mktemp("study") / "base.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def suite(base: Path, **changes: Any) -> Suite:
    """`last` after `middle` after `first`."""
    small = {"study": {"model": {"adacomed": {"form": "small-only"}}}}
    raw = {
        "name": "x",
        "study": str(base),
        "privacy": [8.0],
        "arms": {"last": {"after": "middle"}, "middle": {"after": "first"}, "first": small},
    }
    return Suite.model_validate({**raw, **changes})


def planned(base: Path, shards: dict[str, Path], out: Path, *only: str, **changes: Any) -> Any:
    jobs, cohort = runner.plan(suite(base, **changes), Study.load(base), shards, out)
    return {job.cell.row.name: job for job in runner.wanted(jobs, only)}, cohort


def chain(jobs: dict[str, Job], name: str) -> list[Job]:
    folders = {job.folder: job for job in jobs.values()}
    found = [jobs[name]]
    while (before := found[-1].before) is not None:
        found.append(folders[before])
    return found


def test_what_a_row_starts_from_is_narrowed_as_the_row_is(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    share = {"arm": "last", "key": "data_ratio", "values": [0.5, 1.0]}
    rate = {"arm": "last", "key": "training.learning_rate", "values": [0.5]}
    jobs, _ = planned(
        base,
        shards,
        tmp_path,
        sweeps={"share": share, "rate": rate},
        ablations=["last", "middle"],
        single_sources=["last"],
    )
    for name in ("last, share 0.5", "last, without notes", "last, lab alone"):
        steps = chain(jobs, name)
        assert [step.cell.row.base for step in steps] == ["last", "middle", "first"]
        for step in steps:
            assert step.cell.row.ratio == (0.5 if "share" in name else 1)
            assert list(step.study.sources) == (["lab", "note"] if "share" in name else ["lab"])
        assert {step.cell.row.group for step in steps[1:]} == {"before"}
    for name in ("last, share 1.0", "last, rate 0.5"):
        assert chain(jobs, name)[1:] == chain(jobs, "last")[1:]
    assert chain(jobs, "middle, without notes")[1] == chain(jobs, "last, without notes")[2]
    assert len({job.folder for job in jobs.values()}) == len(jobs)


def test_a_chain_runs_in_its_order_and_every_step_counts(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    jobs, cohort = planned(base, shards, tmp_path)
    order = runner.waves(list(jobs.values()))
    assert [[job.cell.row.name for job in wave] for wave in order] == [
        ["first"],
        ["middle"],
        ["last"],
    ]
    assert [len(wave) for wave in runner.waves(chain(jobs, "last")[1::-1])] == [1, 1]
    failed = execute(jobs["last"], cohort)["error"]
    assert "the cell that it starts from" in failed
    spent = []
    for (job,) in order:
        assert "error" not in execute(job, cohort)
        report = json.loads((job.folder / "run" / "report.json").read_text())
        own = {site["name"]: site["epsilon_by_population"] for site in report["sites"]}
        ledgers = report["simulation_ledgers"] or own
        spent.append([ledgers[name]["train"] for name in sorted(shards)])
    assert all(a < b < c for a, b, c in zip(*spent, strict=True)), "one ledger for all three"


def test_a_change_of_the_first_is_a_change_of_the_last(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    jobs, _ = planned(base, shards, tmp_path)
    arms = {
        "last": {"after": "middle"},
        "middle": {"after": "first"},
        "first": {"study": {"model": {"adacomed": {"form": "small-only", "temperature": 0.5}}}},
    }
    other, _ = planned(base, shards, tmp_path, arms=arms)
    assert not {j.identity for j in jobs.values()} & {j.identity for j in other.values()}


def test_a_part_of_the_suite_takes_in_what_it_starts_from(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    assert list(planned(base, shards, tmp_path, "middle")[0]) == ["first", "middle"]
    with pytest.raises(StudyError, match="'middle' comes after 'first', which has no run like it"):
        planned(
            base,
            shards,
            tmp_path,
            arms={"middle": {"after": "first"}, "first": {"arrangements": ["pooled"]}},
        )


def test_what_has_none_of_the_sources_is_told(
    base: Path, shards: dict[str, Path], tmp_path: Path
) -> None:
    arms = {"a": {"after": "b"}, "b": {"sources": ["note"]}}
    with pytest.raises(StudyError, match="'a, lab alone' comes after 'b', which has none"):
        planned(base, shards, tmp_path, arms=arms, single_sources=["a"])


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ({"a": {"after": "a"}}, "no arm can be the first: 'a' after 'a'"),
        (
            {"a": {"after": "b"}, "b": {"after": "c"}, "c": {"after": "b"}},
            "'b' after 'c' after 'b'",
        ),
        ({"a": {"after": "b"}, "b": {"kind": "haim"}}, "'b' is of kind 'haim'"),
        ({"a": {"after": "b"}, "b": {"kind": "dp-logistic"}}, "'b' is of kind 'dp-logistic'"),
        ({"a": {"after": "b", "kind": "haim"}, "b": {}}, "'a' is of kind 'haim'"),
    ],
)
def test_what_cannot_come_after_is_told(base: Path, arms: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        suite(base, arms=arms)

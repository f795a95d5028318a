"""What persons do at a site: review, approve, revoke, erase, and the care of ledger and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from client.site.daemon.cli import app
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.book import Book
from common.privacy.receipts import read_receipts
from common.study import Study

Run = Callable[..., Any]


@pytest.fixture
def world(ward_module: ModuleType, tmp_path: Path) -> Any:
    made = ward_module.Ward(tmp_path, simulated=False)
    made.daemon._lock.release()
    (tmp_path / "site.toml").write_text(made.config.to_toml())
    (tmp_path / "study.toml").write_text(ward_module.make_study().to_toml())
    return made


@pytest.fixture
def run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `fedward site …` as in a terminal 200 wide; errors are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str, code: int = 0, typed: str = "") -> str:
        done = CliRunner().invoke(app, list(arguments), input=typed)
        if isinstance(done.exception, FedwardError):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.output

    return invoke


SIGN = ("--as", "officer", "--key", "officer.key")


def book(folder: Path) -> Book:
    return Book.read(folder / "sites" / "a" / "ledger.jsonl")


def test_review_says_what_it_does_lets_out_and_costs(run: Run, tmp_path: Path) -> None:
    text = run("review", "study.toml")
    for said in (
        "Study 'ward' at site a",
        "in 2 rounds (3 with spare ones) of 2 steps, 1 time",
        "with probability 0.2",
        "numbers of the adapter, noised",
        "8 counts of a score histogram, noised",
        "never: records, embeddings",
        "ε of this study",
        "Rényi filter, order 2",
        "Nothing stands against it",
    ):
        assert said in text, said
    assert not book(tmp_path).studies, "a review approves nothing"


def test_review_names_the_study_that_it_starts_from(run: Run, ward_module: Any) -> None:
    assert "start from" not in run("review", "study.toml")
    raw = ward_module.make_study().model_dump(mode="json")
    raw["start"] = {"adapter": "a" * 64, "study": "b" * 64}
    Path("study.toml").write_text(Study.model_validate(raw).to_toml())
    text = " ".join(run("review", "study.toml").split())
    assert f"start from the adapter {'a' * 16} of study {'b' * 16}" in text


def test_review_of_an_overpriced_study_says_no_and_why(
    run: Run, world: Any, ward_module: Any
) -> None:
    Path("study.toml").write_text(
        ward_module.make_study(tasks={"sepsis": {"prevalence": 0.1}}).to_toml()
    )
    config = Path("site.toml").read_text()
    Path("site.toml").write_text(
        config.replace("[sites.policy]", '[sites.policy]\ntasks = ["death"]')
    )
    text = run("review", "study.toml", code=1)
    assert "✗ the policy allows its tasks" in text
    assert "task-forbidden" in text
    assert "cannot be approved as it is" in text
    assert "cannot be approved" in run("approve", "study.toml", *SIGN, "--yes", code=1)


def test_approving_asks_signs_and_can_be_taken_back(run: Run, tmp_path: Path) -> None:
    assert "nothing was approved" in run("approve", "study.toml", *SIGN, typed="n\n", code=1)
    assert not book(tmp_path).studies
    run("approve", "study.toml", *SIGN, "--days", "30", typed="y\n")
    (account,) = book(tmp_path).studies.values()
    decision = account.approvals[-1].decision
    assert decision is not None
    assert decision.approver == "officer"
    assert account.expires is not None
    run("revoke", "study.toml", *SIGN)
    (account,) = book(tmp_path).studies.values()
    assert account.closed == "revoked"
    with pytest.raises(FedwardError, match="is not approved here"):
        run("revoke", account.study_hash, *SIGN)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("approve", "study.toml", "--as", "nobody", "--key", "officer.key"), "does not name"),
        (("approve", "study.toml", "--as", "officer", "--key", "none.key"), "no key at none.key"),
        (
            ("approve", "study.toml", "--as", "officer", "--key", "coordinator.key"),
            "is not the key that the policy gives",
        ),
        (("approve", "study.toml", *SIGN, "--days", "9999"), "more than the policy's"),
        (("review", "nowhere.toml"), "no study at nowhere.toml"),
        (("review", "study.toml", "--site", "z"), "unknown site 'z'"),
        (("review", "study.toml", "--config", "none.toml"), "cannot read none.toml"),
        (("reconcile",), "lacks no line"),
        (("reconcile", "--receipt", "study.toml"), "holds no receipt"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_approved(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    with pytest.raises(FedwardError, match=why):
        run(*arguments)
    assert not book(tmp_path).studies


def test_a_receipt_on_file_and_a_ledger_that_lost_its_lines(
    run: Run, world: Any, tmp_path: Path
) -> None:
    state = tmp_path / "sites" / "a"
    backup = {name: (state / name).read_bytes() for name in ("ledger.jsonl", "ledger.head")}
    run("approve", "study.toml", *SIGN, "--yes")
    run("receipt", "the auditor", "-o", "receipt.json")
    (receipt,) = read_receipts([Path("receipt.json")])
    assert receipt.approvals == 1
    for name, content in backup.items():
        (state / name).write_bytes(content)
    for given in ((), ("--study", "study.toml:2")):
        with pytest.raises(FedwardError, match="counts 1 approvals; not exactly these are given"):
            run("reconcile", "--receipt", "receipt.json", *given)
    text = run("reconcile", "--receipt", "receipt.json", "--study", "study.toml")
    assert "all that the lost lines may have released counts as spent" in text
    assert book(tmp_path).holds(receipt)
    (account,) = book(tmp_path).studies.values()
    assert account.closed == "reconciled"
    assert account.spent.total() == 4, "three rounds and an evaluation"


def test_rotating_the_key_and_finishing_a_rotation_that_was_cut_short(
    run: Run, world: Any, tmp_path: Path
) -> None:
    state = tmp_path / "sites" / "a"
    old = (state / "site.key").read_bytes()
    run("rotate-key")
    assert not (state / "site.key.next").exists()
    keys = book(tmp_path).keys
    assert len(keys) == 2
    fresh = (state / "site.key").read_bytes()
    (state / "site.key.next").write_bytes(fresh)  # as if the process had died before the rename
    (state / "site.key").write_bytes(old)
    run("rotate-key")
    assert book(tmp_path).keys == keys
    assert Identity.open(state / "site.key").public == keys[1]


def test_erasing_asks_first(run: Run, tmp_path: Path, ward_module: Any) -> None:
    patient = f"a-{ward_module.SECRET}-3"
    run("erase", patient, typed="n\n", code=1)
    assert not book(tmp_path).erased
    assert "embeddings destroyed" in run("erase", patient, "--yes")
    assert len(book(tmp_path).erased) == 1
    assert ward_module.SECRET not in json.dumps(
        [line.model_dump() for line in book(tmp_path).lines]
    )

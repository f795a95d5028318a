"""A published card against its sites' ledgers. The card is the one that the coordinator writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.audit.card import read_card
from common.audit.reconcile import Reconciliation, reconcile
from common.errors import FedwardError
from common.study import Study
from server import report
from server.card import card
from server.federation import Finished, Progress
from server.metrics import measure

Makers = dict[str, Callable[..., Any]]
SITES = ("north", "st-clara")


def published(
    folder: Path, study: Study, scribes: list[Any], *, simulated: bool = False, **progress: Any
) -> Path:
    """The card of a run in which every answer arrived."""
    metrics = measure(np.full((1, 2, 16), 60.0), 0.0, list(study.tasks)).model_dump(mode="json")
    spec = {"slm": {"name": "nano", "embedded": True, "sha256": "0" * 64}, "lora": None}
    body = {"spec": {**spec, "trainable_parameters": 7}, "encoders": {}, "simulated": simulated}
    fields: dict[str, Any] = {
        "round": 3,
        "completed": 3,
        "epsilon": {s.site: s.book.epsilon(study.privacy.delta, study.hash) for s in scribes},
        "steps": {s.site: 15 for s in scribes},
        "releases": {s.site: 1 for s in scribes},
        "evaluations": [{"round": 3, "sites": list(SITES), "metrics": metrics}],
        **progress,
    }
    receipts = {s.site: s.receipt() for s in scribes}
    done = Finished(study, "run-1", {}, Progress(**fields), {"north": body}, receipts)
    folder.mkdir(exist_ok=True)
    text = card(study, body["spec"], report.build(done))  # type: ignore[arg-type]
    (folder / "README.md").write_text(text)
    return folder


class Run:
    """Two hospitals that ran one study, and its card."""

    def __init__(self, folder: Path, ledgers: Makers, study: Study, **options: Any) -> None:
        self.folder, self.study = folder, study
        self.scribes = []
        for site in SITES:
            scribe = ledgers["bare"](site, **options)
            scribe.approve(study)
            scribe.release(study, rounds=3)
            scribe.release(study, evaluate=True)
            self.scribes.append(scribe)

    def publish(self, **options: Any) -> Path:
        return published(self.folder / "adapter", self.study, self.scribes, **options)

    def ledgers(self) -> list[Path]:
        return [s.save(self.folder / f"{s.site}.jsonl") for s in self.scribes]


@pytest.fixture
def run(tmp_path: Path, ledgers: Makers, studies: Callable[..., Study]) -> Run:
    return Run(tmp_path, ledgers, studies(sites=SITES))


def rules(found: Reconciliation, severity: str = "error") -> set[tuple[str, str | None]]:
    return {(f.rule, f.site) for f in found.findings if f.severity == severity}


def test_a_true_card_holds_and_its_receipts_prove_the_ledgers(run: Run) -> None:
    folder, ledgers = run.publish(), run.ledgers()
    for path in (folder, folder / "README.md", folder.parent):
        found = reconcile(path, ledgers)
        assert found.valid
        assert not found.findings
    assert {row.site for row in found.rows} == set(SITES)
    assert all(said.startswith("complete up to line 7 of 7") for said in found.proven.values())
    row = found.rows[0]
    assert (row.steps_claimed, row.steps_charged) == (15, 15)
    assert row.train_charged <= row.train_claimed <= row.train_charged + 0.001


def test_a_lost_answer_is_a_warning(run: Run) -> None:
    """The site charged four rounds; the last answer never arrived."""
    folder = run.publish()
    run.scribes[0].wait(hours=1).release(run.study)
    found = reconcile(folder, run.ledgers())
    assert found.valid
    assert rules(found, "warning") == {("charged-more", "north"), ("epsilon-charged-more", "north")}
    assert found.proven["north"] == "complete up to line 7 of 8 against 1 receipt"


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("δ", "1e-07", "delta-differs"),
        ("ε training", "0.100", "epsilon-flattered"),
        ("ε validation", "0.100", "epsilon-flattered"),
        ("ε at most, spare rounds included", "0.500", "epsilon-passed"),
        ("σ", "9.999", "noise-differs"),
        ("q", "0.5", "sample-rate-differs"),
        ("steps", "500", "work-uncharged"),
        ("evaluations", "7", "work-uncharged"),
    ],
)
def test_each_false_claim_is_found(run: Run, column: str, value: str, rule: str) -> None:
    path = run.publish() / "README.md"
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| site | δ"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for i in range(start + 2, start + 4):
        cells = [cell.strip() for cell in lines[i].strip("|").split("|")]
        if cells[0] == "north":
            cells[names.index(column)] = value
            lines[i] = "| " + " | ".join(cells) + " |"
    path.write_text("\n".join(lines))
    found = reconcile(path, run.ledgers())
    assert not found.valid
    assert (rule, "north") in rules(found)
    assert {site for _, site in rules(found)} == {"north"}


def test_a_missing_ledger_and_a_surplus_one(run: Run, ledgers: Makers) -> None:
    folder, paths = run.publish(), run.ledgers()
    assert rules(reconcile(folder, paths[:1])) == {("ledger-missing", "st-clara")}
    other = ledgers["small"]("elsewhere").save(folder.parent / "elsewhere.jsonl")
    found = reconcile(folder, [*paths, other])
    assert found.valid
    assert rules(found, "warning") == {("ledger-unasked", "elsewhere")}
    with pytest.raises(FedwardError, match="both ledgers of site 'north'"):
        reconcile(folder, [*paths, paths[0]])


def test_a_ledger_without_the_cards_head_was_cut_or_replaced(run: Run, ledgers: Makers) -> None:
    folder = run.publish()
    run.scribes[0].raws.pop()
    found = reconcile(folder, run.ledgers())
    assert ("ledger-cut", "north") in rules(found)
    assert ("work-uncharged", "north") in rules(found)

    run.scribes[0] = Run(folder.parent, ledgers, run.study, key="forger").scribes[0]
    found = reconcile(folder, run.ledgers())
    assert {("site-foreign", "north"), ("ledger-forked", "north")} <= rules(found)


def test_a_broken_ledger_and_an_unknown_study_are_errors(
    run: Run, studies: Callable[..., Study]
) -> None:
    folder = run.publish()
    raws = run.scribes[0].raws
    raws[3] = raws[3].replace(b'"steps":5', b'"steps":1')
    assert ("line-changed", "north") in rules(reconcile(folder, run.ledgers()))

    path = folder / "README.md"
    path.write_text(path.read_text().replace(run.study.hash, "f" * 64))
    assert ("study-unapproved", "st-clara") in rules(reconcile(path, run.ledgers()))


def test_simulations_must_be_called_so_and_seeded_ones_never_hold(
    tmp_path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    run = Run(tmp_path, ledgers, studies(sites=SITES), virtual=True)
    assert ("simulation-unsaid", "north") in rules(reconcile(run.publish(), run.ledgers()))
    assert reconcile(run.publish(simulated=True), run.ledgers()).valid
    seeded = Run(tmp_path, ledgers, studies(sites=SITES), virtual=True, entropy="seeded")
    found = reconcile(seeded.publish(simulated=True), seeded.ledgers())
    assert rules(found) == {("entropy-seeded", site) for site in SITES}


def test_a_card_without_privacy_claims_nothing(
    tmp_path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    run = Run(tmp_path, ledgers, studies("open", private=False, sites=SITES), virtual=True)
    folder = run.publish(simulated=True)
    assert not read_card(folder).private
    found = reconcile(folder, run.ledgers())
    assert found.valid
    assert ("unprotected-as-said", "north") in rules(found, "note")


@pytest.mark.parametrize(
    ("pattern", "new", "why"),
    [
        ("## Privacy statement", "## Other", "no model card with a privacy statement"),
        (r"study `\w+`", "study", "no model card with a privacy statement"),
        (r"\| 15 \|", "| many |", "'many' is no count"),
        (r"\| north \| 1e-06", "| north | nan", "'nan' is no figure"),
        (r"\| q \|", "| r |", "cannot be read"),
        (r"\n\| (north|st-clara) \| 1e.*", "", "names no site"),
        (r"\| st-clara \| 1e", "| north | 1e", "names a site twice"),
    ],
)
def test_what_is_no_card_is_refused(run: Run, pattern: str, new: str, why: str) -> None:
    path = run.publish() / "README.md"
    path.write_text(re.sub(pattern, new, path.read_text()))
    with pytest.raises(FedwardError, match=why):
        reconcile(path, run.ledgers())

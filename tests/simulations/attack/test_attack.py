"""The shipped engine survives; every planted bug is found by the check that is named for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from client.site.training.optimizer import NoisedSumOptimizer
from common.errors import StudyError
from common.study import Study
from simulations.attack.audit import CHECKS, attack, canary_game
from simulations.attack.bugs import BUGS
from simulations.attack.checks import (
    CAMPAIGN_CHECKS,
    FALSE_ALARM,
    campaign,
    leave_one_out,
    noise_chi2,
    sampler_rate,
)
from simulations.attack.cli import attack as command
from simulations.attack.engine import Parts
from simulations.attack.power import Power, exact

REQUIRED = {
    "stay_level_clipping",
    "noise_third",
    "sampler_2q",
    "noise_seeded_from_run",
    "sampler_seeded_from_run",
    "seed_hash_run_site",
    "reused_batch",
    "gram_cancellation",
    "fp32_norms",
}


def test_the_shipped_engine_passes_every_exact_check() -> None:
    report = attack(seed=1, only=[name for name in CHECKS if name != "canary_game"])
    assert report.verdict == "consistent", report.findings
    assert [f.check for f in report.findings] == list(CHECKS[:-1])
    assert report.engine == "shipped"
    assert 1.99 < report.claimed_epsilon <= 2.0
    sensitivity = report.findings[0]
    assert 0.9999 < sensitivity.statistic <= sensitivity.threshold < 1.0001


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_refuted_by_its_check(bug: str) -> None:
    report = attack(seed=2, bug=bug, only=[BUGS[bug].found_by])
    assert report.verdict == "refuted"
    assert report.refuted_by == (BUGS[bug].found_by,)
    assert report.engine == bug


def test_what_must_be_found_can_be_planted() -> None:
    assert BUGS.keys() >= REQUIRED
    assert {bug.found_by for bug in BUGS.values()} <= set(CHECKS)


@pytest.mark.parametrize("name", [*CHECKS, *BUGS])
def test_everything_is_documented(name: str) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "attack.md").read_text()
    assert f"`{name}`" in text or f"`{name.replace('participation', '')}`" in text


def test_a_bug_fails_no_check_that_it_does_not_concern(study: Study) -> None:
    """A third of the noise is no matter of participation, and participation none of clipping."""
    recorded = campaign(study, 3, BUGS["noise_third"].parts)
    failed = [name for name, check in CAMPAIGN_CHECKS.items() if not check(recorded).passed]
    assert failed == ["noise_chi2"]
    assert leave_one_out(study, 3, BUGS["reused_batch"].parts).passed


@pytest.mark.parametrize(("share", "found"), [(1.01, True), (0.99, True), (1.0001, False)])
def test_one_percent_of_the_noise_is_seen(study: Study, share: float, found: bool) -> None:
    class Slightly(NoisedSumOptimizer):
        def __init__(self, base, plan, clipper, entropy) -> None:
            other = replace(plan, noise_multiplier=share * plan.noise_multiplier)
            super().__init__(base, other, clipper, entropy)

    finding = noise_chi2(campaign(study, 4, Parts(optimizer=Slightly)))
    assert finding.passed is not found
    assert finding.p_value is not None
    assert (finding.p_value < FALSE_ALARM) is found


def test_judgement_is_by_the_p_value(study: Study) -> None:
    finding = sampler_rate(campaign(study, 5))
    assert finding.p_value is not None
    assert finding.passed
    assert finding.statistic <= finding.threshold == pytest.approx(6)
    assert finding.p_value == pytest.approx(10**-finding.statistic)


# -- the canary game, at the size that is claimed -----------------------------------------------


def test_canaries_bound_the_shipped_engine_below_its_claim_but_above_nothing(study: Study) -> None:
    finding = canary_game(study, 2000, 6)
    assert finding.passed
    assert 0.2 < finding.statistic < finding.threshold == pytest.approx(2.0, abs=0.01)
    assert "Steinke" in finding.detail


@pytest.mark.parametrize("bug", ["noise_third", "stay_level_clipping"])
def test_canaries_refute_it_with_less_noise_or_larger_contributions(study: Study, bug: str) -> None:
    finding = canary_game(study, 2000, 7, BUGS[bug].parts)
    assert not finding.passed
    assert finding.statistic > 2.0


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_says_what_it_found_and_exits_by_the_verdict(run, tmp_path: Path) -> None:
    kept = tmp_path / "reports" / "attack.json"
    good = run("--only", "noise_chi2", "--only", "sampler_rate", "--json", kept)
    assert good.exit_code == 0, good.output
    assert "Consistent" in good.output
    assert "no proof" in good.output
    report = json.loads(kept.read_text())
    assert report["verdict"] == "consistent"
    assert report["refuted_by"] == []
    assert [f["check"] for f in report["findings"]] == ["noise_chi2", "sampler_rate"]

    bad = run("--plant", "noise_third", "--only", "noise_chi2", "--json", kept)
    assert bad.exit_code == 1
    assert "REFUTED" in bad.output
    assert "with noise_third planted" in bad.output
    report = json.loads(kept.read_text())
    assert (report["engine"], report["refuted_by"]) == ("noise_third", ["noise_chi2"])


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(StudyError, match="did you mean 'noise_third'"):
        attack(bug="noise_thrid", only=["noise_chi2"])
    with pytest.raises(StudyError, match="did you mean 'sampler_rate'"):
        attack(only=["sampler_rat"])


# -- power --------------------------------------------------------------------------------------


def test_power_counts_runs() -> None:
    power = exact("sampler_2q", 2)
    assert (power.named, power.refuted, power.runs) == ("sampler_rate", 2, 2)
    assert power.all_refuted["sampler_rate"] == 2
    assert exact("shipped", 1).refuted == 0


@pytest.mark.parametrize(
    ("refuted", "lower", "upper"), [(300, 0.99, 1.0), (0, 0.0, 0.01), (150, 0.45, 0.55)]
)
def test_power_has_an_interval(refuted: int, lower: float, upper: float) -> None:
    power = Power(
        engine="x", named="y", runs=300, refuted=refuted, all_refuted={},
        least=None, median=None, most=None, seconds=1.0,
    )  # fmt: skip
    low, high = power.interval
    assert low == pytest.approx(lower, abs=0.006)
    assert high == pytest.approx(upper, abs=0.006)
    if refuted == 300:
        assert low >= 0.99

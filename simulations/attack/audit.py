"""The whole attack: every exact check and the canary game, against one engine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from common.privacy.events import PoissonGaussian
from common.privacy.pricing import epsilon as price
from common.study import Study, unknown
from simulations.attack.bounds import f_dp_bound, guess, steinke_bound
from simulations.attack.bugs import planted
from simulations.attack.canaries import play
from simulations.attack.checks import CAMPAIGN_CHECKS, Finding, campaign, leave_one_out
from simulations.attack.engine import SITES, Parts, audit_study

ERROR = 0.05  # chance that a bound of the canary game lies above the truth
CHECKS = ("leave_one_out", *CAMPAIGN_CHECKS, "canary_game")

# (what is at work, share of it that is done)
Progress = Callable[[str, float], None]


class AttackReport(BaseModel):
    """What came of an attack.

    Attributes:
        engine: "shipped", or the bug that was planted.
        study: Hash of the study that was trained.
        claimed_epsilon: The price of its training, at `delta`.
        seed: Of patients and coins; participation and noise are never a function of it.
        findings: In the order of `CHECKS`.
    """

    model_config = ConfigDict(frozen=True)

    engine: str
    study: str
    claimed_epsilon: float
    delta: float
    canaries: int
    seed: int
    findings: tuple[Finding, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def refuted_by(self) -> tuple[str, ...]:
        """Names of the checks that the engine failed."""
        return tuple(f.check for f in self.findings if not f.passed)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["consistent", "refuted"]:
        """Whether what was seen is consistent with the claim. It never proves it."""
        return "refuted" if self.refuted_by else "consistent"


def attack(
    *,
    canaries: int = 2000,
    epsilon: float = 2.0,
    seed: int = 0,
    bug: str | None = None,
    only: Collection[str] = (),
    on_progress: Progress = lambda what, share: None,
) -> AttackReport:
    """Attacks the training engine.

    Args:
        canaries: m of the canary game; below 2,000 it loses power.
        epsilon: What the training under attack shall claim. The game is sharpest near 2.
        seed: Of synthetic patients and canary coins.
        bug: Plant this one.
        only: Names of `CHECKS`; empty runs all.

    Raises:
        StudyError: No such bug or check.
        PrivacyError: No noise gives this epsilon.
    """
    for name in only:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    parts, wanted = planted(bug), set(only or CHECKS)
    study = audit_study(epsilon, patients_declared=max(1, canaries // 2))
    findings: list[Finding] = []
    if "leave_one_out" in wanted:
        on_progress("leave one out", 0.0)
        findings.append(leave_one_out(study, seed, parts))
        on_progress("leave one out", 1.0)
    if wanted & CAMPAIGN_CHECKS.keys():
        on_progress("noise and participation", 0.0)
        recorded = campaign(study, seed, parts)
        findings += [check(recorded) for name, check in CAMPAIGN_CHECKS.items() if name in wanted]
        on_progress("noise and participation", 1.0)
    if "canary_game" in wanted:
        findings.append(canary_game(study, canaries, seed, parts, on_progress))
    return AttackReport(
        engine=bug or "shipped",
        study=study.hash,
        claimed_epsilon=price([training_event(study)], study.privacy.delta),
        delta=study.privacy.delta,
        canaries=canaries,
        seed=seed,
        findings=tuple(findings),
    )


def canary_game(
    study: Study,
    count: int,
    seed: int,
    parts: Parts | None = None,
    on_progress: Progress = lambda what, share: None,
) -> Finding:
    """Plays the game and holds its bounds against the price of what was trained."""
    on_progress("canary game", 0.0)
    game = play(study, count, seed, parts, lambda n, of: on_progress("canary game", n / of))
    guesses, delta = guess(game.scores, game.included), study.privacy.delta
    event = training_event(study)
    steinke = steinke_bound(guesses, delta, ERROR / 2)
    f_dp = f_dp_bound(guesses, event, delta, ERROR / 2)
    best = max(steinke, f_dp, key=lambda bound: bound.epsilon)
    claimed = price([event], delta)
    return Finding(
        check="canary_game",
        passed=best.epsilon <= claimed,
        statistic=best.epsilon,
        threshold=claimed,
        p_value=None,
        detail=f"ε ≥ {steinke.epsilon:.2f} (Steinke), ≥ {f_dp.epsilon:.2f} (f-DP) at "
        f"{1 - ERROR:.0%}: {best.guesses.right} of {best.guesses.made} guesses right, "
        f"AUC {game.auc:.3f}",
    )


def training_event(study: Study) -> PoissonGaussian:
    """What all rounds of the study together release at a site."""
    event = study.round_event(SITES[0])
    assert isinstance(event, PoissonGaussian), "the audited study is private"
    return event.model_copy(update={"steps": event.steps * study.federation.rounds})

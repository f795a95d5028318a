"""What the hospital's policy demands of a study: one list of conditions.

The guard refuses by the first that fails; a review (`review`) shows them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.errors import Refusal
from common.privacy.events import ReleaseEvent
from common.privacy.policy import Policy
from common.privacy.pricing import epsilon_by_population
from common.roster import Roster
from common.study import Study

_ROUNDING = 1.001  # a study's own calibration rounds its noise to 4 digits


@dataclass(frozen=True)
class Demand:
    """A condition of the hospital on a study.

    Attributes:
        code: Of the refusal where it fails.
        holds: Whether it is met.
        text: The condition in plain words.
        why: What is wrong where it fails; stays inside.
        cure: What to do about it.
    """

    code: str
    holds: bool
    text: str
    why: str = ""
    cure: str = ""

    def insist(self) -> None:
        """Raises the refusal where the demand fails."""
        if not self.holds:
            raise Refusal(self.code, self.why, cure=self.cure)


def demands(
    policy: Policy,
    site: str,
    public_key: str,
    study: Study,
    committed: Mapping[ReleaseEvent, int],
    roster: Roster | None = None,
) -> Iterator[Demand]:
    """The policy on a study, in the order in which the guard asks; touches no data.

    Args:
        committed: All that the study released here, and may still release if it is let run.
        roster: Who may take part, signed by all of them; None where the hospital keeps none.
    """
    named = study.federation.sites.get(site)
    yield Demand(
        "site-unknown",
        named is not None and named.public_key in (None, public_key),
        "it names this site, and no other key than its own",
        f"study '{study.name}' does not name site '{site}' with the key {public_key}",
        "tell the coordinator the site's name and `fedward site key`",
    )
    if roster is not None:
        strangers = [
            name
            for name, other in study.federation.sites.items()
            if roster.sites.get(name, "") != other.public_key
        ]
        yield Demand(
            "roster-mismatch",
            not strangers,
            "all its sites are on the roster, with the keys that they signed it with",
            f"study '{study.name}' names sites that are not on roster '{roster.name}' with these "
            f"keys: {', '.join(strangers)}",
            "ask for a roster with them, compare the keys, and sign it: `fedward site roster`",
        )
    yield Demand(
        "study-invalid",
        study.resolved,
        "its noise and reserve are settled",
        f"study '{study.name}' leaves its noise open",
        "send a resolved study",
    )
    mode = study.privacy.mode
    yield Demand(
        "mode-forbidden",
        policy.allows(mode),
        f"the policy allows mode '{mode}'",
        f"study '{study.name}' has mode '{mode}', which site '{site}' does not allow",
        "policy.without_privacy, word for word, lets everything about the patients leave"
        if mode == "none"
        else f"add '{mode}' to policy.modes",
    )
    extra = sorted(set(study.tasks) - set(policy.tasks)) if policy.tasks is not None else []
    yield Demand(
        "task-forbidden",
        not extra,
        f"the policy allows its tasks: {', '.join(study.tasks)}",
        f"the policy of site '{site}' does not name: {', '.join(extra)}",
        "add them to policy.tasks, or ask for a study without them",
    )
    if mode == "none":
        return
    yield Demand(
        "privacy-refused",
        not study.privacy.batch_slack or policy.allow_batch_slack,
        "its sensitivity is proven, or the policy allows a measured one",
        f"study '{study.name}' charges for kernels that mix patients by a measure, not a proof, "
        f"which site '{site}' does not allow",
        "privacy.batch_slack = 0: where kernels mix, patients then train one per pass",
    )
    if named is None or not study.resolved:
        return
    delta = study.privacy.delta
    promised = {
        "train": study.privacy.epsilon,
        "validation": study.evaluation.epsilon or study.privacy.epsilon,
    }
    once = epsilon_by_population(study.reserved_events(site), delta)
    broken = [p for p in sorted(once) if once[p] > promised[p] * _ROUNDING]
    yield Demand(
        "privacy-refused",
        not broken,
        "its releases cost no more than it promises",
        "; ".join(
            f"study '{study.name}' promises epsilon {promised[p]:g} to its {p} patients, but its "
            f"releases price at {once[p]:.3f}"
            for p in broken
        ),
        "resolve the study again",
    )
    if policy.study is not None:
        price = max(epsilon_by_population(committed, delta).values(), default=0.0)
        yield Demand(
            "study-too-costly",
            price <= policy.study.epsilon and delta <= policy.study.delta,
            f"one study may cost ε {policy.study.epsilon:g} at δ {policy.study.delta:g}",
            f"study '{study.name}' costs epsilon {price:.3f} at delta {delta:g}, with all that it "
            f"released before; the policy allows one study {policy.study.epsilon:g} at "
            f"{policy.study.delta:g}",
            "ask for a smaller epsilon, delta or number of runs",
        )


def model_demands(policy: Policy, encoders: Mapping[str, str], slm: str) -> Iterator[Demand]:
    """The policy on the models that a study would run here.

    Args:
        encoders: SHA-256 by source; a source of precomputed vectors runs none and has "".
        slm: SHA-256 of the language model; "" where the system has none.
    """
    if policy.encoders is not None:
        other = sorted(n for n, sha in encoders.items() if sha and sha not in policy.encoders)
        yield Demand(
            "encoder-forbidden",
            not other,
            "the policy names its encoders by hash",
            "the policy does not name the encoders of "
            + ", ".join(f"{name} ({encoders[name]})" for name in other),
            "add their hashes to policy.encoders once they are trusted",
        )
    if policy.slms is not None:
        yield Demand(
            "slm-forbidden",
            not slm or slm in policy.slms,
            "the policy names its language model by hash",
            f"the policy does not name the language model {slm}",
            "add its hash to policy.slms once it is trusted",
        )


def enough_patients(policy: Policy, site: str, declared: int, patients: int) -> Demand:
    """The number of training patients, which never leaves, against what was declared."""
    least = max(declared, policy.min_patients)
    return Demand(
        "patients-too-few",
        patients >= least,
        f"at least {least} training patients are here ({declared} declared, "
        f"{policy.min_patients} by policy)",
        f"{patients} training patients at site '{site}', {least} are needed ({declared} declared, "
        f"{policy.min_patients} by policy)",
        "declare fewer patients in the study, or leave the site out",
    )

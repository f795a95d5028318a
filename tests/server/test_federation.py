"""The round loop against sites and a grid that fail on demand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from common.messages import Envelope, Request
from common.study import Study
from server.checkpoint import Checkpoint, CheckpointError
from server.exchange import FederationError
from server.optimizer import weighted_mean


def lines(world: Any, out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(x) for x in (world.folder / out / "rounds.jsonl").read_text().splitlines()]


def with_federation(study: Study, **changes: Any) -> Study:
    raw = study.model_dump(mode="json")
    raw["federation"] |= changes
    return Study.model_validate(raw)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_every_site_is_served_by_two_nodes(world: Any) -> None:
    finished = world.federation().run()
    trained = [c for c in world.sites.calls if c[0] == "train"]
    assert {c[1] for c in trained} == set(world.study.federation.sites)
    assert len(trained) == 16
    assert all(count == 1 for count in world.sites.charged.values())
    by_node = [node for node, e in world.grid.pushed if b'"kind":"train"' in e.header]
    assert by_node.count(11) == by_node.count(12) == 8
    rows = lines(world)
    assert [r["kind"] for r in rows] == ["train"] * 4 + ["evaluate"]
    assert rows[0]["sites"] == list(world.study.federation.sites)
    assert rows[0]["bytes_up"] > 0
    assert rows[0]["bytes_down"] > 0
    assert finished.progress.completed == 4
    assert finished.adapter["bias"].dtype == np.float32


def test_one_node_is_enough(world: Any) -> None:
    world.grid.nodes = [5]
    assert world.federation().run().progress.completed == 4


def test_average_uses_declared_weights_in_roster_order(world: Any, study: Study) -> None:
    one = with_federation(study, rounds=1)
    got = world.federation(study=one).run().adapter
    start = {"projectors.age.weight": np.zeros((4, 3), np.float32), "bias": np.ones(2, np.float32)}
    answers = []
    for index, name in enumerate(one.federation.sites):
        rng = np.random.default_rng(index * 1000 + 1)
        moved = {
            n: (0.9 * a + rng.normal(size=a.shape)).astype(np.float32)
            for n, a in sorted(start.items())
        }
        answers.append((one.federation.sites[name].patients_declared / 1000, moved))
    expected = weighted_mean(answers)
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float32))


def test_arrival_order_and_node_ids_do_not_matter(world: Any, fake_sites: Any) -> None:
    first = world.federation("a").run().adapter
    world.grid.nodes = [900, 3, 77]
    world.grid.fate = lambda node, envelope: (
        float(Request.model_validate_json(envelope.header).nonce[0] < "8") + node % 7
    )
    assert same(first, world.federation("b", run="r2").run().adapter)


def test_lost_node_is_routed_around(world: Any) -> None:
    """A dead worker fails each request at once; no site is lost and none is charged twice."""
    world.grid.fate = lambda node, envelope: (
        "dead" if node == 12 and b'"kind":"train"' in envelope.header else None
    )
    world.federation().run()
    assert all(not r["lost"] and not r["refused"] for r in lines(world))
    assert set(world.sites.charged.values()) == {1}


def test_a_dead_worker_beside_a_slow_one(world: Any) -> None:
    """The only living node is busy longer than the patience for unreachable sites."""

    def fate(node: int, envelope: Any) -> Any:
        if b'"kind":"train"' not in envelope.header:
            return None
        busy = world.busy_until > world.clock.now
        if node == 12 or busy:
            return "dead"
        world.busy_until = world.clock.now + 95
        return 95.0

    world.busy_until = 0.0
    world.grid.fate = fate
    study = with_federation(world.study, rounds=1, deadline_seconds=1000)
    assert world.federation(study=study).run().progress.steps == dict.fromkeys(
        study.federation.sites, 5
    )


def test_node_that_vanishes_between_rounds(world: Any) -> None:
    def behave(request: Request) -> None:
        if request.kind == "train" and request.round == 2:
            world.grid.nodes = [11]

    world.sites.behave = behave
    world.federation().run()
    assert all(not r["lost"] for r in lines(world))


def test_quorum_goes_on_without_a_silent_site(world: Any) -> None:
    world.grid.fate = lambda node, envelope: (
        "lost"
        if (r := Request.model_validate_json(envelope.header)).kind == "train"
        and r.site == "alpha"
        and r.round == 2
        else None
    )
    world.federation().run()
    row = lines(world)[1]
    assert row["sites"] == ["beta", "gamma", "delta"]
    assert row["lost"] == {"alpha": "no-answer"}
    assert row["aggregated"]


def seconds_between_rounds(world: Any, absent: set[str], until: int, takes: float) -> list[float]:
    """Of a run in which some sites are silent before round `until`, and an answer takes so long."""
    began: dict[int, float] = {}

    def fate(node: int, envelope: Envelope) -> Any:
        asked = Request.model_validate_json(envelope.header)
        if asked.kind != "train":
            return None
        began.setdefault(asked.round, world.clock())
        return "lost" if asked.site in absent and asked.round < until else takes

    world.grid.fate = fate
    world.federation().run()
    return [began[number + 1] - began[number] for number in sorted(began)[:-1]]


def test_a_lost_site_delays_the_others_once(world: Any) -> None:
    """It is asked in every round, briefly, and may come back."""
    took = seconds_between_rounds(world, {"alpha"}, until=4, takes=40.0)
    assert took[0] == pytest.approx(100, abs=1)  # the deadline
    assert took[1:] == pytest.approx([80, 80], abs=1)
    silent = [bool(row["lost"]) for row in lines(world) if row["kind"] == "train"]
    assert silent == [True, True, True, False]


def test_who_is_needed_for_the_quorum_is_waited_for(world: Any) -> None:
    took = seconds_between_rounds(world, {"alpha", "beta"}, until=3, takes=95.0)
    assert took[1] == pytest.approx(200, abs=1)  # two attempts of 100 s each


def test_missed_quorum_asks_again_with_the_same_request_and_charges_once(world: Any) -> None:
    """Two sites answer after the deadline: the repeated request gets their stored bytes."""
    late: set[str] = set()

    def fate(node: int, envelope: Any) -> Any:
        request = Request.model_validate_json(envelope.header)
        slow = request.kind == "train" and request.round == 1 and request.site in ("alpha", "beta")
        if slow and request.site not in late:
            late.add(request.site)
            return 150.0
        return None

    world.grid.fate = fate
    world.federation().run()
    assert lines(world)[0]["sites"] == list(world.study.federation.sites)
    assert set(world.sites.charged.values()) == {1}
    assert {c[3] for c in world.sites.calls} == {0}


def test_a_lost_round_is_replaced_by_a_spare_one(world: Any) -> None:
    world.sites.behave = lambda request: (
        "budget-exhausted"
        if request.kind == "train" and request.round == 2 and request.site != "delta"
        else None
    )
    finished = world.federation().run()
    assert (finished.progress.round, finished.progress.completed) == (5, 4)
    lost = lines(world)[1]
    assert not lost["aggregated"]
    assert lost["refused"] == dict.fromkeys(["alpha", "beta", "gamma"], "budget-exhausted")


def test_no_spare_round_left(world: Any) -> None:
    world.sites.behave = lambda request: "data-problem" if request.kind == "train" else None
    with pytest.raises(FederationError, match="no spare round is left"):
        world.federation().run()
    assert len(lines(world)) == world.study.priced_rounds


def test_attempt_rises_only_when_the_site_lost_its_answer(world: Any) -> None:
    world.sites.behave = lambda request: (
        "answer-lost"
        if (request.kind, request.site, request.round, request.attempt) == ("train", "beta", 1, 0)
        else None
    )
    world.federation().run()
    attempts = [c for c in world.sites.calls if c[:3] == ("train", "beta", 1)]
    assert [c[3] for c in attempts] == [0, 1]
    assert lines(world)[0]["refused"] == {}


def test_a_restarted_daemon_prepares_again(world: Any) -> None:
    forgotten = {"gamma"}

    def behave(request: Request) -> str | None:
        if request.kind == "prepare":
            forgotten.discard(request.site)
        if request.kind == "train" and request.round == 3:
            if not hasattr(world, "restarted"):
                world.restarted = True
                forgotten.add("gamma")
            if request.site in forgotten:
                return "not-prepared"
        return None

    forgotten.clear()
    world.sites.behave = behave
    world.federation().run()
    assert all(r["refused"] == {} for r in lines(world))
    assert len([c for c in world.sites.calls if c[:2] == ("prepare", "gamma")]) == 2


def test_startup_counts_against_no_round(world: Any, study: Study) -> None:
    quick = with_federation(study, deadline_seconds=5, startup_seconds=5000)
    world.grid.fate = lambda node, envelope: (
        4000.0 if b'"kind":"prepare"' in envelope.header else 3.0
    )
    finished = world.federation(study=quick).run()
    assert finished.progress.completed == 4
    assert finished.progress.seconds["encode"] > 3900
    assert finished.progress.seconds["train"] < 30


def test_late_nodes_are_waited_for(world: Any) -> None:
    ids = world.grid.get_node_ids
    world.grid.get_node_ids = lambda: ids() if world.clock.now > 30 else []
    assert world.federation().run().progress.completed == 4


def test_too_few_sites_appear(world: Any) -> None:
    world.grid.nodes = []
    with pytest.raises(FederationError, match="only 0 of 4 sites appeared in 50 s"):
        world.federation().run()


def test_refusals_at_prepare(world: Any) -> None:
    world.sites.behave = lambda request: (
        "study-unapproved" if request.kind == "prepare" and request.site == "beta" else None
    )
    finished = world.federation().run()
    assert finished.progress.refused == {"beta": "study-unapproved"}
    assert not any(c[:2] == ("train", "beta") for c in world.sites.calls)
    world.sites.behave = lambda request: "patients-too-few" if request.kind == "prepare" else None
    with pytest.raises(FederationError, match="alpha patients-too-few"):
        world.federation("other").run()


def test_error_texts_of_nodes_do_not_reach_files(world: Any) -> None:
    world.grid.fate = lambda node, envelope: (
        "dead"
        if b'"kind":"train"' in envelope.header and b'"site":"alpha"' in envelope.header
        else None
    )
    world.federation().run()
    text = (world.folder / "out" / "rounds.jsonl").read_text()
    assert "flower-5" in text
    assert "patient7" not in text


@pytest.mark.parametrize("damage", ["shape", "nan", "name"])
def test_an_adapter_that_does_not_fit_is_left_out(world: Any, damage: str) -> None:
    act = world.sites._act

    def broken(request: Request, arrays: Any) -> Any:
        body, out = act(request, arrays)
        if request.kind == "train" and request.site == "alpha":
            if damage == "shape":
                out["bias"] = out["bias"][:1]
            elif damage == "nan":
                out["bias"][0] = np.nan
            else:
                out["bia"] = out.pop("bias")
        return body, out

    world.sites._act = broken
    world.federation().run()
    assert lines(world)[0]["refused"] == {"alpha": "adapter-invalid"}


def test_an_answer_signed_by_another_key_is_no_answer(world: Any, tmp_path: Any) -> None:
    from common.identity import Identity

    federation = world.federation()
    federation.exchange.discover(seconds=5)
    world.sites.keys["gamma"] = Identity.open(tmp_path / "thief.key")
    outcome = federation.exchange.ask("prepare", ["gamma", "delta"], seconds=1000)
    assert outcome.lost == {"gamma": "answer-invalid"}
    assert set(outcome.answers) == {"delta"}


def test_a_pinned_key_is_not_replaced(world: Any, study: Study) -> None:
    raw = study.model_dump(mode="json")
    raw["federation"]["sites"]["alpha"]["public_key"] = "ab" * 32
    raw["federation"]["startup_seconds"] = 5
    exchange = world.federation(study=Study.model_validate(raw)).exchange
    exchange.discover(seconds=5)
    assert sorted(exchange.hosts) == ["beta", "delta", "gamma"]


def test_evaluations_are_spread_and_the_last_is_last(world: Any, study: Study) -> None:
    raw = study.model_dump(mode="json")
    raw["evaluation"]["releases"] = 2
    raw["federation"]["rounds"] = 5
    progress = world.federation(study=Study.model_validate(raw)).run().progress
    assert [e["round"] for e in progress.evaluations] == [3, 5]
    assert progress.releases == dict.fromkeys(study.federation.sites, 2)
    auroc = progress.evaluations[-1]["metrics"]["tasks"]["death"]["auroc"]
    assert auroc == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
@pytest.mark.parametrize("stop", [("train", 3), ("evaluate", 1), ("train", 1)])
def test_resume_is_bit_identical(
    world: Any, study: Study, optimizer: str, stop: tuple[str, int]
) -> None:
    """The coordinator dies within a round; what sites had answered by then is not charged again."""
    chosen = with_federation(study, server_optimizer=optimizer, server_learning_rate=0.5)
    whole = world.federation("whole", study=chosen).run().adapter
    world.sites.charged.clear()

    def die(request: Request) -> None:
        if (request.kind, request.round) == stop and request.site == "gamma":
            raise KeyboardInterrupt

    world.sites.behave = die
    with pytest.raises(KeyboardInterrupt):
        world.federation("torn", run="r2", study=chosen).run()
    world.sites.behave = lambda request: None
    world.grid.nodes = [99]
    resumed = world.federation("torn", run="ignored", study=chosen, resume=True).run()
    assert same(whole, resumed.adapter)
    assert set(world.sites.charged.values()) == {1}
    assert [r["round"] for r in lines(world, "torn") if r["kind"] == "train"] == [1, 2, 3, 4]
    last = [
        Checkpoint.latest(world.folder / run / "checkpoint", study_hash=chosen.hash)
        for run in ("whole", "torn")
    ]
    assert same(last[0].adapter, last[1].adapter)
    assert same(last[0].average, last[1].average)


def test_resume_of_another_study_is_refused(world: Any, study: Study) -> None:
    world.federation().run()
    other = with_federation(study, rounds=9)
    with pytest.raises(CheckpointError, match="belongs to study"):
        world.federation(study=other, resume=True).run()
    with pytest.raises(FederationError, match="earlier run"):
        world.federation().run()

"""What holds a daemon back beside policy and budget: pause, roster, and nobody waiting."""

from __future__ import annotations

import grp
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.site.daemon import guard
from client.site.daemon.config import SiteConfig
from client.site.daemon.service import CALL, Daemon, SocketError
from client.site.daemon.state import PAUSED
from client.site.model import slm
from common.identity import Identity
from common.roster import Roster, RosterError


@pytest.fixture
def world(ward_module: Any, tmp_path: Path) -> Any:
    return ward_module.Ward(tmp_path)


def test_a_paused_site_charges_nothing_and_goes_on_afterwards(ward_module: Any, world: Any) -> None:
    study = ward_module.make_study()
    start = world.prepared(study)
    request = world.request("train", study, 1)
    first, _ = world.ask(request, start)
    paused = world.hospitals["a"].state / PAUSED
    paused.write_text("{}")
    answer, arrays = world.ask(world.request("train", study, 2), start)
    assert (answer.refusal, arrays) == ("site-paused", {})
    evaluated, _ = world.ask(world.request("evaluate", study, 1), start)
    assert evaluated.refusal == "site-paused"
    assert len(world.charges()) == 1
    # What was released may still be fetched: it costs nothing more.
    again, _ = world.ask(request, start)
    assert again == first
    paused.unlink()
    assert world.ask(world.request("train", study, 2), start)[0].refusal is None


def test_a_pause_while_a_round_is_made_ready_still_comes_in_time(
    ward_module: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = ward_module.make_study()
    start = world.prepared(study)
    ready = guard.ready

    def paused_meanwhile(*parts: Any) -> Any:
        work = ready(*parts)
        (world.hospitals["a"].state / PAUSED).write_text("{}")
        return work

    monkeypatch.setattr(guard, "ready", paused_meanwhile)
    assert world.ask(world.request("train", study, 1), start)[0].refusal == "site-paused"
    assert world.charges() == []


def test_what_nobody_waits_for_is_not_charged(ward_module: Any, world: Any) -> None:
    study = ward_module.make_study()
    start = world.prepared(study)
    packed = world.coordinator.seal(world.request("train", study, 1), start).pack()
    world.guard.call(packed, lambda: False)
    assert world.charges() == []
    assert "request-late" in world.log()
    assert world.ask(world.request("train", study, 1), start)[0].refusal is None


def test_a_caller_that_left_while_it_waited_in_line_is_noticed(
    ward_module: Any, world: Any
) -> None:
    study = ward_module.make_study()
    start = world.prepared(study)
    packed = world.coordinator.seal(world.request("train", study, 1), start).pack()
    world.daemon._lock.release()
    with Daemon(world.config) as daemon:
        ward_prepare = world.coordinator.seal(world.request("prepare", study)).pack()
        with (
            grpc.insecure_channel(f"unix:{world.config.socket}") as channel,
            ThreadPoolExecutor(1) as pool,
        ):
            ask = channel.unary_unary(CALL)
            ask(ward_prepare, timeout=60)
            (hospital,) = daemon.hospitals.values()
            with hospital.bench.lock:  # another site's round is at work
                late = pool.submit(ask, packed, timeout=0.5)
                with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                    late.result()
            until = threading.Event()
            for _ in range(100):
                if hospital.status.refusal == "request-late":
                    break
                until.wait(0.1)
            assert hospital.status.refusal == "request-late"
            assert world.charges() == []
            ask(packed, timeout=60)
            assert len(world.charges()) == 1


def with_roster(world: Any, roster: Roster) -> None:
    path = world.folder / "roster.json"
    roster.write(path)
    sites: tuple[SiteConfig, ...] = tuple(
        s.model_copy(update={"roster": path}) for s in world.config.sites
    )
    world.config = world.config.model_copy(update={"sites": sites})
    world.restart()


def test_a_study_with_a_stranger_is_refused(ward_module: Any, world: Any, tmp_path: Path) -> None:
    own, other = world.hospitals["a"].identity, Identity.open(tmp_path / "b.key")
    keys = {"a": own.public, "b": other.public}
    roster = Roster(name="f", sites=keys).signed("a", own).signed("b", other)
    with_roster(world, roster)

    def asked(**pinned: str | None) -> str | None:
        sites = {n: {"patients_declared": 30, "public_key": k} for n, k in pinned.items()}
        study = ward_module.make_study(federation={"sites": sites})
        refusal: str | None = world.ask(world.request("prepare", study))[0].refusal
        return refusal

    assert asked(**keys) is None
    assert asked(a=own.public) is None  # fewer than the roster's are no strangers
    assert asked(a=own.public, b=own.public) == "roster-mismatch"
    assert asked(a=own.public, b=None) == "roster-mismatch"
    assert asked(**keys, c=other.public) == "roster-mismatch"


def test_a_roster_that_somebody_has_not_signed_does_not_count(world: Any, tmp_path: Path) -> None:
    own, other = world.hospitals["a"].identity, Identity.open(tmp_path / "b.key")
    roster = Roster(name="f", sites={"a": own.public, "b": other.public}).signed("a", own)
    with pytest.raises(RosterError, match="not signed by b"):
        with_roster(world, roster)


def test_the_socket_is_opened_to_the_group_that_is_named(world: Any) -> None:
    world.daemon._lock.release()
    group = grp.getgrgid(os.getgid()).gr_name
    config = world.config.model_copy(update={"socket_group": group})
    with Daemon(config):
        found = config.socket.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    unknown = world.config.model_copy(update={"socket_group": "no-such-group"})
    with pytest.raises(SocketError, match="no-such-group"), Daemon(unknown):
        pass


def test_the_language_model_is_loaded_once_in_a_daemons_life(
    ward_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = slm._load

    def counted(name: str, revision: str | None, device: str) -> slm.Slm:
        loads.append(name)
        return load(name, revision, device)

    monkeypatch.setattr(slm, "_load", counted)
    slm._resident.cache_clear()
    world = ward_module.Ward(tmp_path, ("a", "b"))
    for study in (ward_module.make_study(("a", "b")), ward_module.make_study(("a", "b"), seed=1)):
        for site in ("a", "b"):
            start = world.prepared(study, site)
            for kind in ("train", "evaluate"):
                answer, _ = world.ask(world.request(kind, study, 1, site=site), start)
                assert answer.refusal is None
    assert len(loads) == 1

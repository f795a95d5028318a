"""The roster: what a coordinator cannot make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.identity import Identity
from common.roster import Roster, RosterError


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Identity]:
    return {name: Identity.open(tmp_path / f"{name}.key") for name in "abc"}


@pytest.fixture
def roster(keys: dict[str, Identity]) -> Roster:
    return Roster(name="ward", sites={name: key.public for name, key in keys.items()})


def test_it_counts_when_all_have_signed(roster: Roster, keys: dict[str, Identity]) -> None:
    assert roster.unsigned() == ["a", "b", "c"]
    for name in "ab":
        roster = roster.signed(name, keys[name])
    assert roster.unsigned() == ["c"]
    assert roster.signed("c", keys["c"]).unsigned() == []


def test_signatures_come_together_from_several_files(
    roster: Roster, keys: dict[str, Identity], tmp_path: Path
) -> None:
    for name in "abc":
        roster.signed(name, keys[name]).write(tmp_path / f"{name}.json")
    merged = roster
    for name in "abc":
        merged = merged.merged(Roster.load(tmp_path / f"{name}.json"))
    assert merged.unsigned() == []
    assert merged.digest == roster.digest


def test_a_site_is_not_signed_for_by_others(roster: Roster, keys: dict[str, Identity]) -> None:
    with pytest.raises(RosterError, match="does not list site 'a'"):
        roster.signed("a", keys["b"])
    with pytest.raises(RosterError, match="does not list site 'x'"):
        roster.signed("x", keys["b"])
    own = roster.signed("b", keys["b"]).signatures["b"]
    borrowed = roster.model_copy(update={"signatures": {"a": own, "b": own}})
    assert borrowed.unsigned() == ["a", "c"]


def test_a_changed_roster_has_lost_its_signatures(
    roster: Roster, keys: dict[str, Identity], tmp_path: Path
) -> None:
    """One more site, one less, another key, another name: nobody has signed that."""
    for name, key in keys.items():
        roster = roster.signed(name, key)
    sybil = Identity.open(tmp_path / "sybil.key").public
    fewer = {name: key for name, key in roster.sites.items() if name != "c"}
    for change in (
        {"sites": {**roster.sites, "d": sybil}},
        {"sites": fewer},
        {"sites": {**roster.sites, "c": sybil}},
        {"name": "another"},
    ):
        changed = roster.model_copy(update=change)
        assert set(changed.unsigned()) == set(changed.sites)
        with pytest.raises(RosterError, match="another roster"):
            roster.merged(changed)


def test_merging_keeps_only_valid_signatures(roster: Roster, keys: dict[str, Identity]) -> None:
    signed = roster.signed("a", keys["a"])
    spoiled = roster.model_copy(update={"signatures": {"a": "0" * 128, "x": "0" * 128}})
    for one, other in ((signed, spoiled), (spoiled, signed)):
        assert one.merged(other).unsigned() == ["b", "c"], "a bad signature displaced a good one"
        assert set(one.merged(other).signatures) == {"a"}


def test_the_order_of_sites_is_not_signed_but_their_keys_are(
    roster: Roster, keys: dict[str, Identity], tmp_path: Path
) -> None:
    signed = roster.signed("a", keys["a"])
    backwards = signed.model_copy(update={"sites": dict(reversed(roster.sites.items()))})
    assert backwards.unsigned() == ["b", "c"]
    backwards.write(tmp_path / "roster.json")
    assert Roster.load(tmp_path / "roster.json").digest == roster.digest


def test_two_sites_with_one_key_are_refused(roster: Roster, tmp_path: Path) -> None:
    twins = roster.model_copy(update={"sites": {**roster.sites, "d": roster.sites["a"]}})
    twins.write(tmp_path / "roster.json")
    with pytest.raises(RosterError, match="one key"):
        Roster.load(tmp_path / "roster.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"name": "ward", "sites": {}}',
        '{"name": "", "sites": {"a": "KEY"}}',
        '{"name": "ward\\u001b[2J", "sites": {"a": "KEY"}}',  # would rewrite what is compared
        '{"name": "ward\\u202e", "sites": {"a": "KEY"}}',
        '{"name": "ward\\n", "sites": {"a": "KEY"}}',
        '{"name": "[/ward]", "sites": {"a": "KEY"}}',
        '{"name": "ward", "sites": {"a": "short"}}',
        '{"name": "ward", "sites": {"../a": "KEY"}}',
        '{"name": "ward", "sites": {"a": "KEY"}, "admin": true}',
        '{"name": "ward", "sites": {"a": "KEY"}, "signatures": {"a": "00"}}',
    ],
)
def test_a_file_that_is_no_roster_is_refused(
    text: str, keys: dict[str, Identity], tmp_path: Path
) -> None:
    path = tmp_path / "roster.json"
    path.write_text(text.replace("KEY", keys["a"].public))
    with pytest.raises(RosterError):
        Roster.load(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RosterError):
        Roster.load(path)
    with pytest.raises(RosterError, match="cannot read"):
        Roster.load(tmp_path / "absent.json")


def test_a_site_named_twice_counts_once(keys: dict[str, Identity], tmp_path: Path) -> None:
    """JSON lets a name stand twice. Whoever reads must see what was signed, not the first one."""
    path = tmp_path / "roster.json"
    a, b = keys["a"].public, keys["b"].public
    path.write_text(f'{{"name": "ward", "sites": {{"a": "{b}", "a": "{a}"}}}}')
    assert Roster.load(path).signed("a", keys["a"]).sites == {"a": a}


def test_writing_leaves_no_half(roster: Roster, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    roster.write(path)
    roster.write(path)
    assert json.loads(path.read_text())["name"] == "ward"
    assert [p.name for p in tmp_path.glob("*roster*")] == ["roster.json"]

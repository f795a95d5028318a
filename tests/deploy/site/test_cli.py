"""`fedward site …` as the hospital's IT types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from common.cli import build
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.ledger import Ledger
from common.roster import Roster
from deploy.enrolment import fingerprint
from deploy.site.layout import SiteFolder

WORDS = "correct horse battery staple"


def fedward(*words: object, keys: str = "", code: int = 0) -> str:
    """Output of a command; its errors come out as they are."""
    result: Result = CliRunner().invoke(
        build(), [str(w) for w in words], input=keys, catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text(WORDS + "\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("init", "accept", "doctor", "join", "roster", "pause", "unpause"),
        *("backup", "restore", "upgrade", "serve", "status"),
    ],
)
def test_every_command_belongs_to_the_site(name: str) -> None:
    group = typer.main.get_command(build()).commands["site"]  # type: ignore[attr-defined]
    assert name in group.commands
    assert group.commands[name].help


def test_from_invite_to_a_site_that_is_well(coordinator: Any, shard: Path, tmp_path: Path) -> None:
    with coordinator.server() as server:
        site = SiteFolder(tmp_path / "site")
        invite = coordinator.invite(port=server.port)
        said = fedward("site", "init", site.root, "--invite", invite, "--shard", shard)
        own = Identity.open(site.state / "site.key").public
        assert fingerprint(coordinator.identity.public) in said
        assert fingerprint(own) in said
        assert "request.json" in said

        said = fedward("site", "doctor", site.root, code=1)
        assert "FAIL certificate" in said
        assert "skip mutual TLS waits for 'certificate'" in said

        said = fedward("site", "accept", site.root, coordinator.admit(site))
        assert re.search(r"good until \d{4}-\d\d-\d\d", said)
        said = fedward("site", "doctor", site.root)
        assert "FAIL" not in said
        assert "pass mutual TLS" in said
        assert "name the officer's key under [approvers]" in said
        found = json.loads(_json(fedward("site", "doctor", site.root, "--json")))
        assert {"check", "verdict", "text", "cure"} == set(found[0])


def _json(text: str) -> str:
    return text[text.index("[") :]


def test_doctor_is_plain_where_there_is_no_terminal(site: SiteFolder) -> None:
    result = CliRunner().invoke(build(), ["site", "doctor", str(site.root)], color=True)
    assert "\x1b" not in result.output
    assert result.exit_code == 1


def test_a_roster_is_shown_and_signed_after_a_question(site: SiteFolder, tmp_path: Path) -> None:
    north, south = Identity.open(site.state / "site.key"), Identity.open(tmp_path / "south.key")
    file = tmp_path / "roster.json"
    roster = Roster(name="Test", sites={"north": north.public, "south": south.public})
    roster.signed("south", south).write(file)
    said = fedward("site", "roster", "show", file)
    assert f"north {fingerprint(north.public)} no" in said
    assert f"south {fingerprint(south.public)} yes" in said

    sign = ("site", "roster", "sign", file, "--folder", site.root)
    said = fedward(*sign, keys="n\n", code=1)
    assert "nothing was signed" in said
    assert not (tmp_path / "roster-north.json").exists()
    said = fedward(*sign, keys="y\n")
    assert "in force" in said
    assert Roster.load(tmp_path / "roster-north.json").unsigned() == []
    assert Roster.load(site.root / "roster.json").unsigned() == []
    assert "--folder" in fedward("site", "roster", "sign", file, code=2)

    Roster(name="Test", sites={"north": north.public}).write(file)
    assert "south leaves" in fedward(*sign, "--yes")


def test_backup_and_restore(site: SiteFolder, passphrase: Path, tmp_path: Path) -> None:
    ledger = Ledger.open(
        site.state / "ledger.jsonl", "north", Identity.open(site.state / "site.key")
    )
    archive, words = tmp_path / "north.backup", ("--passphrase-file", passphrase)
    assert "read back" in fedward("site", "backup", site.root, archive, *words)
    said = fedward("site", "restore", archive, tmp_path / "there", *words)
    assert "fedward audit verify" in said
    assert "ledger-cut" in said
    ledger.give_receipt("a board")
    (site.state / "ledger.jsonl").unlink()
    said = fedward("site", "restore", archive, site.root, "--replace", *words)
    assert "lacks line 2" in said
    assert "reconcile" in said
    assert "must never run again" in said
    (site.state / "site.key").unlink()
    said = fedward("site", "restore", archive, site.root, "--only", "state/site.key", *words)
    assert (site.state / "site.key").exists()


def test_a_passphrase_is_asked_for_twice(site: SiteFolder, tmp_path: Path) -> None:
    archive = tmp_path / "b"
    said = fedward("site", "backup", site.root, archive, keys=f"{WORDS}\nother\n{WORDS}\n{WORDS}\n")
    assert "do not match" in said
    assert WORDS not in said
    fedward("site", "restore", archive, tmp_path / "there", keys=f"{WORDS}\n")


def test_a_passphrase_that_others_can_read_is_refused(
    site: SiteFolder, passphrase: Path, tmp_path: Path
) -> None:
    passphrase.chmod(0o644)
    with pytest.raises(FedwardError, match="can be read by others"):
        fedward("site", "backup", site.root, tmp_path / "b", "--passphrase-file", passphrase)


def test_a_passphrase_that_is_no_text_is_refused(site: SiteFolder, passphrase: Path) -> None:
    passphrase.write_bytes(b"\xff\xfe")
    archive = site.root.parent / "b"
    with pytest.raises(FedwardError, match="is no text"):
        fedward("site", "backup", site.root, archive, "--passphrase-file", passphrase)


def test_upgrade_asks(site: SiteFolder) -> None:
    assert "nothing to do" in fedward("site", "upgrade", site.root)
    right = site.relay.config()
    site.relay.configure(right.model_copy(update={"bundle": "0" * 64}))
    said = fedward("site", "upgrade", site.root, keys="n\n", code=1)
    assert "0" * 64 in said
    assert right.bundle in said
    assert "coordinator must run the same version" in said
    assert site.relay.config().bundle == "0" * 64
    fedward("site", "upgrade", site.root, "--yes")
    assert site.relay.config() == right


def test_pause_and_unpause(site: SiteFolder) -> None:
    fedward("site", "pause", site.root, "--reason", "maintenance")
    assert json.loads((site.state / "paused").read_text())["reason"] == "maintenance"
    assert "goes on" in fedward("site", "unpause", site.root)
    assert "was not paused" in fedward("site", "unpause", site.root)


def test_join_runs_the_relay_of_a_folder(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.site import join

    joined: list[Path] = []
    monkeypatch.setattr(join, "run", joined.append)
    fedward("site", "join", site.relay.root)
    assert joined == [site.relay.root]

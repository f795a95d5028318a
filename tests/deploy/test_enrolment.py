"""The files of the enrolment, changed by those who carry them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.identity import Identity
from deploy import pki
from deploy.enrolment import (
    Admission,
    Document,
    EnrolmentError,
    EnrolmentRequest,
    Invite,
    StudySignature,
    fingerprint,
)

NONCE = "0123456789abcdef" * 2


@pytest.fixture
def coordinator(tmp_path: Path) -> Identity:
    return Identity.open(tmp_path / "coordinator.key")


@pytest.fixture
def stranger(tmp_path: Path) -> Identity:
    return Identity.open(tmp_path / "stranger.key")


@pytest.fixture
def invite(coordinator: Identity) -> Invite:
    return Invite(
        site="a",
        host="coordinator.example",
        port=8443,
        authority="-----BEGIN CERTIFICATE-----",
        coordinator=coordinator.public,
        version="0.1.0",
        bundle="0" * 64,
        nonce=NONCE,
        expires=datetime.now(UTC) + timedelta(days=14),
    )


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., EnrolmentRequest]:
    identity = Identity.open(tmp_path / "site.key")
    key = pki.new_key()
    fields = {
        "site": "a",
        "nonce": NONCE,
        "identity": identity.public,
        "signing_request": pki.signing_request(key, "a"),
        "node_key": pki.openssh_public(pki.new_key()),
    }
    return lambda **other: EnrolmentRequest.model_validate({**fields, **other})


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def test_each_document_survives_the_journey(
    invite: Invite, request_of: Any, coordinator: Identity, tmp_path: Path
) -> None:
    site = Identity.open(tmp_path / "site.key")
    asked = request_of()
    admission = Admission(
        site="a", request=asked.digest, certificate="PEM", coordinator=coordinator.public
    )
    for document, identity in ((invite, coordinator), (asked, site), (admission, coordinator)):
        path = tmp_path / "document.json"
        document.write(path, identity)
        assert type(document).read(path) == document
        assert type(document).read(path, signer=identity.public).digest == document.digest


def test_every_field_is_under_the_signature(
    invite: Invite, coordinator: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "invite.json"
    other = {
        "site": "b",
        "host": "evil.example",
        "port": 9,
        "authority": "another",
        "version": "9",
        "bundle": "1" * 64,
        "nonce": "f" * 32,
        "expires": "2199-01-01T00:00:00Z",
    }
    assert set(other) == set(Invite.model_fields) - {"coordinator"}
    for key, value in other.items():
        invite.write(path, coordinator)
        rewritten(path, lambda raw, k=key, v=value: raw["content"].update({k: v}))  # type: ignore[misc]
        with pytest.raises(EnrolmentError, match="was changed"):
            Invite.read(path)


def test_a_stranger_who_signs_under_a_known_name_is_found(
    invite: Invite, coordinator: Identity, stranger: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "invite.json"
    invite.write(path, stranger)
    with pytest.raises(EnrolmentError, match="somebody else"):
        Invite.read(path)
    # A consistent forgery is a valid file of the stranger's: only the known key tells.
    forged = invite.model_copy(update={"coordinator": stranger.public, "host": "evil.example"})
    forged.write(path, stranger)
    assert Invite.read(path) == forged
    with pytest.raises(EnrolmentError, match="somebody else"):
        Invite.read(path, signer=coordinator.public)
    assert fingerprint(forged.coordinator) != fingerprint(invite.coordinator)


def test_one_kind_is_not_read_as_another(
    invite: Invite, coordinator: Identity, tmp_path: Path
) -> None:
    """Not even where the fields fit: the kind is signed."""
    path = tmp_path / "document.json"
    invite.write(path, coordinator)
    with pytest.raises(EnrolmentError, match="is no admission but 'invite'"):
        Admission.read(path)
    signature = StudySignature(study="0" * 64, coordinator=coordinator.public)

    class Lookalike(StudySignature):
        kind = "lookalike"

    signature.write(path, coordinator)
    rewritten(path, lambda raw: raw.update(kind="lookalike"))
    with pytest.raises(EnrolmentError, match="was changed"):
        Lookalike.read(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"invite"', "null", "[" * 100_000, '{"kind": "invite"}', "\udcff"],
    ids=["empty", "torn", "list", "string", "null", "deep", "bare", "binary"],
)
@pytest.mark.parametrize("kind", [Invite, EnrolmentRequest, Admission])
def test_rubbish_is_refused(kind: type[Document], text: str, tmp_path: Path) -> None:
    path = tmp_path / "rubbish.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EnrolmentError):
        kind.read(path)
    with pytest.raises(EnrolmentError, match="cannot read"):
        kind.read(tmp_path / "absent.json")


def test_unknown_keys_and_missing_signatures_are_refused(
    invite: Invite, coordinator: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "invite.json"
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "unknown key": lambda raw: raw["content"].update(extra=1),
        "is not signed": lambda raw: raw.update(signature="no hex"),
        "was changed": lambda raw: raw.update(signature=""),
    }
    for said, change in changes.items():
        invite.write(path, coordinator)
        with pytest.raises(EnrolmentError, match=said):
            Invite.read(rewritten(path, change))
    invite.write(path, coordinator)
    rewritten(path, lambda raw: raw.pop("signature"))
    with pytest.raises(EnrolmentError):
        Invite.read(path)


def test_the_form_of_the_file_does_not_matter(
    invite: Invite, coordinator: Identity, tmp_path: Path
) -> None:
    """What is signed is the meaning: white space, order and spelling of dates are free."""
    path = tmp_path / "invite.json"
    invite.write(path, coordinator)
    raw = json.loads(path.read_text())
    raw["content"] = dict(reversed(raw["content"].items()))
    raw["content"]["expires"] = invite.expires.isoformat()
    path.write_text(json.dumps(raw, indent=7))
    assert Invite.read(path) == invite


def test_what_a_terminal_obeys_is_shown_not_done(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"kind": "\x1b[2Jsite a; fingerprint of its key: ..."}))
    with pytest.raises(EnrolmentError, match="is no enrolment request") as told:
        EnrolmentRequest.read(path)
    assert "\x1b" not in str(told.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "c.example:8443"),
        ("host", "192.0.2.1:8443"),
        ("host", "::1::"),
        ("expires", "2199-01-01T00:00:00"),  # of no zone: compared with now, it raised a TypeError
    ],
)
def test_a_port_is_no_part_of_a_host_and_a_date_has_a_zone(
    invite: Invite, field: str, value: str
) -> None:
    said = invite.model_dump(mode="json")
    assert Invite.model_validate({**said, "host": "2001:db8::1"}).host == "2001:db8::1"
    with pytest.raises(ValueError, match=field):
        Invite.model_validate({**said, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site", "../a"),
        ("site", 'a"; deny all; "'),
        ("site", "a\n"),
        ("nonce", "short"),
        ("nonce", "A" * 32),
        ("identity", "0" * 63),
        ("identity", "0" * 64 + "\n"),
        ("node_key", "ssh-ed25519 AAAA"),
        ("node_key", "ecdsa-sha2-nistp256 AAAA"),
        ("node_key", "ecdsa-sha2-nistp384 AAAA comment"),
        ("node_key", "ecdsa-sha2-nistp384 AAAA\n"),
    ],
)
def test_fields_that_others_write_into_files_are_narrow(
    request_of: Any, field: str, value: str
) -> None:
    with pytest.raises(ValueError):
        request_of(**{field: value})


def test_the_admission_names_the_request_that_it_answers(request_of: Any) -> None:
    assert request_of().digest == request_of().digest
    assert request_of().digest != request_of(nonce="f" * 32).digest


def test_a_fingerprint_is_for_the_telephone() -> None:
    assert fingerprint("00" * 32) == "6668 7aad f862 bd77 6c8f c18b 8e9f 8e20"  # sha256sum's

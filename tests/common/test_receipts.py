"""What a coordinator, or another hospital, keeps of the ledgers that it heard of."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import FedwardError
from common.identity import Identity
from common.privacy.receipts import Receipt, Receipts, read_receipts


def make(key: Identity, lines: int, site: str = "a") -> Receipt:
    return Receipt(
        site=site,
        public_key=key.public,
        lines=lines,
        head=f"{lines:064x}",
        approvals=1,
        approvals_hash="0" * 64,
    ).sealed(key)


@pytest.fixture
def key(tmp_path: Path) -> Identity:
    return Identity.open(tmp_path / "site.key")


def test_the_furthest_genuine_receipt_of_each_site_is_kept_over_runs(
    tmp_path: Path, key: Identity
) -> None:
    path = tmp_path / "coordinator.receipts.json"
    receipts = Receipts(path)
    for lines in (3, 7, 5):
        receipts.take("a", key.public, make(key, lines).model_dump(mode="json"))
    receipts.take("b", key.public, make(key, 2, "b").model_dump(mode="json"))
    again = Receipts(path)
    latest = again.latest("a")
    assert latest is not None
    assert latest.lines == 7
    assert [r["site"] for r in again.of(["a"])] == ["a"]
    assert len(again.of(["a", "b", "c"])) == 2
    assert again.latest("c") is None
    assert {r.site for r in read_receipts([path])} == {"a", "b"}


def test_after_a_reconciled_loss_the_later_epoch_is_the_further_one(key: Identity) -> None:
    receipts = Receipts()
    for epoch, lines in ((0, 50), (1, 20), (0, 60)):
        receipt = make(key, lines).model_copy(update={"epoch": epoch}).sealed(key)
        receipts.take("a", key.public, receipt.model_dump(mode="json"))
    latest = receipts.latest("a")
    assert latest is not None
    assert latest.place == (1, 20)


def test_a_receipt_that_is_not_the_sites_own_is_not_kept(tmp_path: Path, key: Identity) -> None:
    other = Identity.open(tmp_path / "other.key")
    receipts = Receipts()
    endless = make(key, 9).model_copy(update={"ancestors": ((1, "0" * 64),) * 65}).sealed(key)
    for fields in (
        endless.model_dump(mode="json"),  # kept for ever, and sent to every site
        make(other, 9).model_dump(mode="json"),
        make(key, 9, "b").model_dump(mode="json"),
        {**make(key, 9).model_dump(mode="json"), "lines": 10},
        {"lines": 1},
        None,
        "x",
    ):
        receipts.take("a", key.public, fields)
    assert receipts.latest("a") is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.receipts.json"
    path.write_text("[{}]")
    with pytest.raises(FedwardError, match=r"coordinator\.receipts\.json holds no receipts"):
        Receipts(path)


@pytest.mark.parametrize(
    "text", ['{"sites": [1]}', "[" * 5000, "[1]", "null", "7", "", "{", "[[]]"]
)
def test_a_file_without_receipts_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "receipts.json"
    path.write_text(text)
    with pytest.raises(FedwardError, match=r"receipts\.json holds no receipt"):
        read_receipts([path])

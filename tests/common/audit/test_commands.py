"""The commands: exit codes, JSON, and that no rubbish of any kind makes them stumble."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from common.audit.cli import app
from common.audit.prices import planned
from common.errors import FedwardError

Makers = dict[str, Callable[..., Any]]
CARD = """study `{hash}`.

## Privacy statement

| site | δ | ε training | ε validation | ε at most, spare rounds included | σ | q | steps | evaluations |
|---|---|---|---|---|---|---|---|---|
| st-clara | 1e-06 | 1.9 | 2.0 | 2.0 | 1.3 | 0.05 | 15 | 1 |
"""  # noqa: E501
SCHEMA_1 = Path(__file__).parent.parent / "ledgers" / "schema1.jsonl"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def clean(result: Result) -> bool:
    """An exit code with an outcome, or one clear message."""
    if isinstance(result.exception, FedwardError):
        return bool(str(result.exception))
    return result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None)


@pytest.fixture(scope="module")
def folder(ledgers: Makers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's ledger with its receipt and a card."""
    folder = tmp_path_factory.mktemp("audit")
    scribe = ledgers["small"]()
    scribe.save(folder / "ledger.jsonl")
    (folder / "receipt.json").write_text(scribe.receipt().model_dump_json())
    (folder / "key").write_text(scribe.identity.public)
    (folder / "card.md").write_text(CARD.format(hash=next(iter(scribe.book.studies))))
    return folder


def test_verify_exits_by_its_outcome(folder: Path, tmp_path: Path) -> None:
    ledger, key = folder / "ledger.jsonl", (folder / "key").read_text()
    good = run("verify", ledger, "--receipts", folder / "receipt.json", "--public-key", key)
    assert good.exit_code == 0
    assert "VALID" in good.stdout
    assert "complete up to line 8 of 8" in good.stdout
    assert run("verify", folder).exit_code == 0, "a state folder does as well"

    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    bad = run("verify", cut, "--receipts", folder / "receipt.json")
    assert bad.exit_code == 1
    assert "NOT VALID" in bad.stdout
    assert "ledger-cut" in bad.stdout


def test_json_is_all_that_is_printed(folder: Path, tmp_path: Path) -> None:
    ledger = folder / "ledger.jsonl"
    found = json.loads(run("verify", ledger, "--json").stdout)
    assert found["valid"] is True
    assert found["proven"].startswith("a valid prefix only")
    assert found["findings"][0]["rule"] == "key-untrusted"
    prices = json.loads(run("price", ledger, "--quick", "--json").stdout)
    assert prices["rows"][0]["spent"]["pld"] > 0
    result = run("reconcile", folder / "card.md", ledger, "--json")
    assert result.exit_code == 1, "the card's sigma is made up"
    assert {f["rule"] for f in json.loads(result.stdout)["findings"]} >= {"noise-differs"}


def test_prices_are_a_table_of_a_terminals_width(folder: Path) -> None:
    shown = run("price", folder / "ledger.jsonl", "--what-if", "demo", "--quick").stdout
    for part in ("sepsis", "all together", "DP-SGD", "histogram", "Rényi 4", "too much"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown.replace("head " + shown.partition("head ")[2][:13], "")


def test_report_writes_both_files_and_exits_by_the_outcome(folder: Path, tmp_path: Path) -> None:
    page, record = tmp_path / "new" / "page.html", tmp_path / "record.json"
    result = run("report", folder / "ledger.jsonl", "-o", page, "--record", record, "--quick")
    assert result.exit_code == 0
    assert page.read_text().lstrip().startswith("<!doctype html>")
    assert json.loads(record.read_text())["site"] == "st-clara"


def test_seeded_entropy_fails_every_command(path: Path, tmp_path: Path, ledgers: Makers) -> None:
    ledgers["small"](virtual=True, entropy="seeded").save(path)
    for arguments in (
        ("verify", path),
        ("price", path, "--quick"),
        ("report", path, "--quick", "-o", tmp_path / "page.html"),
    ):
        assert run(*arguments).exit_code == 1, arguments[0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("verify", "{}/none.jsonl"), "cannot read the ledger"),
        (("verify", "{}/ledger.jsonl", "--public-key", "abc"), "64 hex digits"),
        (("verify", "{}/ledger.jsonl", "--receipts", "{}/none"), "cannot read the receipt"),
        (("verify", "{}/ledger.jsonl", "--receipts", "{}/card.md"), "holds no receipt"),
        (("verify", "{}/ledger.jsonl", "--policy", "{}/card.md"), "is not valid TOML"),
        (("price", "{}/ledger.jsonl", "--at", "soon"), "is no date"),
        (("price", "{}/ledger.jsonl", "--what-if", "none"), "no study at"),
        (("reconcile", "{}/none.md", "{}/ledger.jsonl"), "cannot read the model card"),
        (("reconcile", "{}/key", "{}/ledger.jsonl"), "no model card"),
    ],
)
def test_each_wrong_argument_has_a_clear_error(
    arguments: Sequence[str], why: str, folder: Path
) -> None:
    result = run(*(a.format(folder) for a in arguments))
    assert isinstance(result.exception, FedwardError)
    assert why in str(result.exception)


def test_names_cannot_steer_a_terminal(path: Path, ledgers: Makers) -> None:
    ledgers["bare"]("\x1b[31m[red]st\x07", virtual=True).save(path)
    for command in (("verify", path), ("price", path, "--quick")):
        shown = run(*command).stdout
        assert "\x1b[31m" not in shown
        assert "\x07" not in shown
        assert "[red]st" in shown


# -- rubbish --------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@st.composite
def mutated(draw: st.DrawFn, raws: list[bytes]) -> bytes:
    """Lines of real ledgers, some of their values replaced, in any order."""
    lines = []
    for raw in draw(st.lists(st.sampled_from(raws), min_size=1, max_size=6)):
        fields = json.loads(raw)
        for key in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
            fields[key] = draw(values | st.sampled_from([fields[key]]))
        lines.append(json.dumps(fields).encode())
    return b"\n".join(lines) + draw(st.sampled_from([b"", b"\n"]))


def rubbish(raws: list[bytes]) -> st.SearchStrategy[bytes]:
    as_json = values.map(lambda v: json.dumps(v).encode())
    return (
        st.binary(max_size=200)
        | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
        | st.lists(as_json, max_size=4).map(b"\n".join)
        | mutated(raws)
    )


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=SLOW)
def test_rubbish_for_a_ledger(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    raws = [
        *SCHEMA_1.read_bytes().splitlines(),
        *(folder / "ledger.jsonl").read_bytes().splitlines(),
    ]
    file = tmp_path / "rubbish"
    file.write_bytes(data.draw(rubbish(raws)))
    assert clean(run("verify", file, "--receipts", folder / "receipt.json"))
    assert clean(run("price", file, "--quick"))
    assert clean(run("reconcile", folder / "card.md", file))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_rubbish_for_what_goes_with_it(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    ledger, file = folder / "ledger.jsonl", tmp_path / "rubbish"
    texts = [(folder / "receipt.json").read_bytes()]
    file.write_bytes(data.draw(rubbish(texts)))
    assert clean(run("verify", ledger, "--receipts", file))
    assert clean(run("verify", ledger, "--policy", file))
    assert clean(run("reconcile", file, ledger))
    with pytest.raises(FedwardError):
        planned(str(file), "st-clara")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_rubbish_in_a_card(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    text = (folder / "card.md").read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    file = tmp_path / "card.md"
    file.write_text(
        text[:start] + data.draw(st.text("|`0123456789.ε∞e-\n# ", max_size=9)) + text[end:]
    )
    assert clean(run("reconcile", file, folder / "ledger.jsonl"))


@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=SLOW)
def test_rubbish_in_a_report(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    raws = SCHEMA_1.read_bytes().splitlines()
    file = tmp_path / "rubbish"
    kept = data.draw(st.integers(0, len(raws)))
    file.write_bytes(b"".join(raw + b"\n" for raw in raws[:kept]) + data.draw(rubbish(raws)))
    page = tmp_path / "page.html"
    assert clean(run("report", file, "--quick", "-o", page))

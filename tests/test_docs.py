"""Documentation that can be checked against the code is."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from client.site.daemon.config import DaemonConfig, SiteConfig
from common import study
from common.audit.report.risk import accuracy, advantage
from common.cli import build
from common.privacy.events import PoissonGaussian
from common.privacy.lifetime import Cap, Commitment, Lifetime, spending
from common.privacy.lines import Line
from common.privacy.policy import SENTENCE, PerStudy, Policy
from common.privacy.pricing import epsilon
from common.privacy.receipts import Receipt
from common.systems.adacomed import AdaCoMed
from common.systems.llama_fusion import LlamaFusion
from common.systems.m_llm import MLlm

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
REFUSALS = DOCS / "refusals"
PAGES = [*sorted(DOCS.rglob("*.md")), REPOSITORY / "README.md"]
HEADINGS = ["What happened", "How to resolve", "What it says outside"]
PARTS = [
    study.Study,
    study.Source,
    study.Task,
    study.Model,
    AdaCoMed,
    LlamaFusion,
    MLlm,
    study.Lora,
    study.Training,
    study.Privacy,
    study.Evaluation,
    study.Federation,
    study.Site,
    study.Start,
]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language, dedented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


# -- the study file ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.__name__)
def test_every_key_of_a_study_is_documented(part: type[study.Part]) -> None:
    text = (DOCS / "study.md").read_text()
    for name in part.model_fields:
        assert (
            f"`{name}`" in text
            or f"[{name}]" in text
            or f"[{name}.<name>]" in text
            or f".{name}" in text
        ), f"{part.__name__}.{name} is not in docs/study.md"


def test_the_example_study_can_be_resolved() -> None:
    example = study.Study.from_toml(blocks(DOCS / "study.md", "toml")[0])
    settled = study.resolve(example, sites={"north": None, "south": None})
    assert settled.resolved
    assert settled.federation.sites["south"].patients_declared == 200


@pytest.mark.parametrize("encoder", study.EMBEDDED_ENCODERS)
def test_every_embedded_encoder_is_documented(encoder: str) -> None:
    assert f"`{encoder}`" in (DOCS / "study.md").read_text()


# -- refusals ---------------------------------------------------------------------------------


def strings(node: ast.expr | None) -> list[str]:
    """Strings that an expression may be."""
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    if isinstance(node, ast.JoinedStr):  # Flower's codes: one page for all its numbers
        first = node.values[0]
        return ["flower-n"] if isinstance(first, ast.Constant) and first.value == "flower-" else []
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def trees() -> Iterator[tuple[str, ast.Module]]:
    for room in ("common", "client", "server"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def answered_codes() -> set[str]:
    """Every code with which a site, relay or coordinator can stand in for an answer."""
    found: set[str] = set()
    bases: dict[str, set[str]] = {}
    own: dict[str, str] = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if called in ("Refusal", "Demand", "error_record"):
                    found |= {code for arg in node.args[:1] for code in strings(arg)}
                elif called in ("_missed", "leave_out"):
                    found |= {code for arg in node.args[1:] for code in strings(arg)}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                if getattr(node.targets[0].value, "attr", "") in ("lost", "refused"):
                    found |= set(strings(node.value))
            elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "code":
                found |= set(strings(node.value)) if path == "server/exchange.py" else set()
            elif isinstance(node, ast.ClassDef):
                bases[node.name] = {getattr(base, "id", "") for base in node.bases}
                for item in node.body:
                    if (
                        isinstance(item, ast.Assign)
                        and getattr(item.targets[0], "id", "") == "code"
                    ):
                        own[node.name] = strings(item.value)[0]
            elif isinstance(node, ast.FunctionDef):
                if path == "common/envelope.py" and node.name == "error_code":
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Return):
                            found |= set(strings(inner.value))
                if path == "client/site/daemon/guard.py" and node.name == "_code":
                    found |= _of_guard(node, bases, own)
    return found


def _of_guard(
    function: ast.FunctionDef, bases: dict[str, set[str]], own: dict[str, str]
) -> set[str]:
    """What the guard makes of an exception: constants, or the code of a class of errors."""
    found: set[str] = set()
    for case in (
        case for node in function.body if isinstance(node, ast.Match) for case in node.cases
    ):
        answer = case.body[0]
        assert isinstance(answer, ast.Return)
        if strings(answer.value):
            found |= set(strings(answer.value))
            continue
        family = {
            getattr(n.cls, "id", "")
            for n in ast.walk(case.pattern)
            if isinstance(n, ast.MatchClass)
        }
        family -= {"Refusal"}  # carries the code it is raised with
        assert family <= set(own), "the errors' module was read before the guard's"
        while more := {name for name in bases if bases[name] & family} - family:
            family |= more
        found |= {own[name] for name in family if name in own}
    return found


CODES = sorted(answered_codes())


def test_the_codes_are_found() -> None:
    """One of every kind, so that a change of the code's form does not blind the tests below."""
    assert {
        "study-unapproved",  # a refusal
        "task-forbidden",  # a demand of the policy
        "daemon-late",  # the relay's
        "flower-n",
        "no-answer",  # the coordinator's own
        "node-unavailable",
        "not-connected",
        "data-problem",  # the guard's, in place of any error
        "model-invalid",  # of a class of errors
    } <= set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_every_refusal_has_its_page(code: str) -> None:
    page = REFUSALS / f"{code}.md"
    assert page.exists(), f"docs/refusals/{code}.md is missing"
    text = prose(page)
    assert text.startswith(f"# {code}\n")
    assert re.findall(r"^## (.+)$", text, flags=re.M) == HEADINGS
    assert "charge" in text.partition(f"## {HEADINGS[2]}")[2], "says whether anything was charged"
    index = (REFUSALS / "README.md").read_text()
    assert f"]({code}.md)" in index, f"{code} is not in the index"


def test_no_page_stands_for_a_code_that_is_gone() -> None:
    assert sorted({page.stem for page in REFUSALS.glob("*.md")} - {"README"}) == CODES


# -- policy -----------------------------------------------------------------------------------


def row(page: str, key: str) -> list[str]:
    """Cells of the table row that begins with `key`."""
    found = re.findall(rf"^\| `{re.escape(key)}` \|(.*)\|$", (DOCS / page).read_text(), flags=re.M)
    assert found, f"docs/{page} has no row for {key}"
    return [cell.strip() for cell in found[0].split("|")]


SHOWN = {None: "none", (): "empty", False: "`false`", ("local",): '`["local"]`', "rdp": "`rdp`"}


@pytest.mark.parametrize("part", [Policy, PerStudy, Cap], ids=lambda p: p.__name__)
def test_every_key_of_a_policy_is_documented_with_its_default(part: type) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (DOCS / "policy.md").read_text(), flags=re.M)
    for name, field in part.model_fields.items():  # type: ignore[attr-defined]
        if field.is_required():
            shown = "required"
        elif field.default_factory is not None:
            shown = "computed"
        elif field.default == {}:
            shown = "empty"
        elif isinstance(field.default, float):
            shown = f"{field.default:g}".replace("e-0", "e-")
        elif field.default in SHOWN:
            shown = SHOWN[field.default]
        else:
            shown = str(field.default)
        assert (name, shown) in rows, f"{part.__name__}.{name} = {shown}"


def test_every_other_key_of_a_hospital_is_documented() -> None:
    text = (DOCS / "policy.md").read_text()
    for name in Lifetime.model_fields:
        assert f"[lifetime.{name}]" in text
    for name in (*DaemonConfig.model_fields, *SiteConfig.model_fields):
        assert f"`{name}`" in text, name


def test_the_example_policy_and_configuration_load(tmp_path: Path) -> None:
    policy, sentence, config = blocks(DOCS / "policy.md", "toml")
    (tmp_path / "policy.toml").write_text(policy)
    loaded = Policy.load(tmp_path / "policy.toml")
    assert loaded.coordinators
    assert loaded.approvers
    assert loaded.lifetime
    assert loaded.study
    (tmp_path / "site.toml").write_text(config)
    assert DaemonConfig.load(tmp_path / "site.toml").sites[0].policy == loaded
    (tmp_path / "none.toml").write_text(sentence)
    assert Policy.load(tmp_path / "none.toml").without_privacy == SENTENCE


CAPPED = re.findall(
    r"^\| ε = (\d+) \(σ ([\d.]+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$",
    (DOCS / "policy.md").read_text(),
    flags=re.M,
)


def steps(noise_multiplier: float, count: int = 220) -> PoissonGaussian:
    return PoissonGaussian(
        sample_rate=0.1,
        noise_multiplier=noise_multiplier,
        steps=count,
        max_grad_norm=1,
        denominator=100,
    )


@pytest.mark.parametrize("figures", CAPPED, ids=lambda f: f"epsilon {f[0]}")
def test_what_studies_spend_of_a_cap(figures: tuple[str, ...]) -> None:
    target, sigma, *spent, fit = map(float, figures)
    one, cap = Commitment(1e-5, {steps(sigma): 1}), Cap(epsilon=10, delta=1e-5)
    assert target - 2e-3 < epsilon(one.events, one.delta) <= target
    assert cap.order == 4
    for count, shown in enumerate(spent, 1):
        assert spending([one] * count, "train", cap).epsilon == pytest.approx(shown, abs=6e-4)
    assert spending([one] * int(fit), "train", cap).within
    assert not spending([one] * (int(fit) + 1), "train", cap).within


def test_a_cap_needs_headroom_as_the_page_says() -> None:
    text = (DOCS / "policy.md").read_text()
    assert len(CAPPED) == 4
    said = " ".join(text.split())
    found = re.search(r"spends \*\*([\d.]+)\*\*; the cap would end it after (\d+) of 220", said)
    least = re.search(r"least cap that admits it is (\d+\.\d+)", said)
    assert found
    assert least
    whole, cap = Commitment(1e-5, {steps(1.1632): 1}), Cap(epsilon=8)
    assert spending([whole], "train", cap).epsilon == pytest.approx(float(found[1]), abs=6e-4)
    for count, within in ((int(found[2]), True), (int(found[2]) + 1, False)):
        part = Commitment(1e-5, {steps(1.1632, count): 1})
        assert spending([part], "train", cap).within is within
    for admitted, within in ((float(least[1]), True), (float(least[1]) - 0.01, False)):
        assert spending([whole], "train", Cap(epsilon=admitted)).within is within
    orders = [
        cell.strip() for cell in text.partition("\n| order |")[2].partition("|\n")[0].split("|")
    ]
    caps = [
        cell.strip() for cell in text.partition("\n| cap ε |")[2].partition("|\n")[0].split("|")
    ]
    for size, order in zip(caps, orders, strict=True):
        assert Cap(epsilon=float(size)).order == int(order)


# -- ledger and audit -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", typing.get_args(Line), ids=lambda k: k.__name__)
def test_every_kind_of_line_and_its_fields_are_documented(kind: typing.Any) -> None:
    fields = row("ledger.md", kind.model_fields["line"].default)[1]
    for name in set(kind.model_fields) - {"previous", "at", "line"}:
        assert f"`{name}`" in fields, f"{kind.__name__}.{name}"


def test_the_example_receipt_has_the_fields_of_one() -> None:
    (example,) = blocks(DOCS / "ledger.md", "json")
    assert list(json.loads(example)) == list(Receipt.model_fields)


def finding_rules() -> set[str]:
    """Codes of everything that an audit can find."""
    found: set[str] = set()
    for path, tree in trees():
        if not path.startswith(("common/audit/", "common/privacy/")):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", "")
                if called == "LedgerError" or (
                    called in ("error", "warning", "note") and path.startswith("common/audit/")
                ):
                    found |= {rule for arg in node.args[:1] for rule in strings(arg)}
            elif path == "common/audit/tampering.py" and isinstance(node, ast.Return):
                found |= (
                    set(strings(node.value.elts[0])) if isinstance(node.value, ast.Tuple) else set()
                )
    return found


@pytest.mark.parametrize("rule", sorted(finding_rules() | {"clock-back", "lifetime-raised"}))
def test_every_finding_is_documented(rule: str) -> None:
    findings = (DOCS / "audit.md").read_text().partition("## Findings")[2]
    assert f"`{rule}`" in findings


def test_no_finding_is_documented_that_cannot_be_found() -> None:
    findings = (DOCS / "audit.md").read_text().partition("## Findings")[2]
    cells = re.findall(r"^\| (`[^|]+`) \|", findings, flags=re.M)
    documented = {rule for cell in cells for rule in re.findall(r"`([a-z-]+)`", cell)}
    assert documented - finding_rules() == {"clock-back", "lifetime-raised"}


def test_what_epsilon_means_is_computed() -> None:
    text = (DOCS / "officer-guide.md").read_text()
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) in 100 \| [\d.]+ \|$", text, flags=re.M
    )
    assert [float(cells[0]) for cells in rows] == [0.5, 1, 2, 4, 8]
    for value, right, gain, suspected in rows:
        e = float(value)
        odds = math.exp(e) / 99
        for shown, exact in (
            (right, 100 * accuracy(e, 1e-5)),
            (gain, advantage(e, 1e-5)),
            (suspected, 100 * odds / (1 + odds)),
        ):
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(math.ceil(exact * 10**digits) / 10**digits)


def test_pitfalls_are_ranked_and_say_what_leaks_what_is_done_and_how_to_check() -> None:
    page = prose(DOCS / "privacy-pitfalls.md")
    assert re.findall(r"^## (.+)$", page, flags=re.M) == [
        "Critical",
        "Serious",
        "Moderate",
        "Subtle",
    ]
    numbers = [int(n) for n in re.findall(r"^### (\d+)\. ", page, flags=re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    for entry in re.split(r"^### ", page, flags=re.M)[1:]:
        assert re.findall(r"^\* \*\*(\w+)\*\*:", entry, flags=re.M) == ["Leaks", "Here", "Check"], (
            entry
        )


# -- everything -------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is missing"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page: Path) -> None:
    there = list((REPOSITORY / "tests").rglob("test_*.py"))
    for path, name in re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        meant = [p for p in there if (p == REPOSITORY / path if "/" in path else p.name == path)]
        assert meant, path
        assert not name or any(f"def {name}(" in p.read_text() for p in meant), (path, name)


COMMANDS = typer.main.get_command(build())


def shown(page: Path) -> Iterator[list[str]]:
    """The `fedward` commands that a page's code blocks show."""
    for text in blocks(page, "(?:sh|console|bash)?"):
        for line in re.sub(r"\\\n", " ", text).splitlines():
            if re.match(r"(\$ )?fedward ", line.strip()):
                yield shlex.split(line.strip().removeprefix("$ "), comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    for words in shown(page):
        command: click.Command = COMMANDS
        context, rest = click.Context(command), list(words)
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            found = command.get_command(context, rest[0])
            assert found is not None, f"no command {' '.join(words)}"
            command, rest = found, rest[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in rest:
            if word.startswith("-"):
                assert word.partition("=")[0] in known | {"--help", "-h"}, f"{words}: {word}"

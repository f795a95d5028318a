"""What the audit's commands print."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from common.audit.findings import Finding
from common.audit.prices import CapRow, Figures, Prices, Row
from common.audit.reconcile import Reconciliation
from common.audit.verify import NAMES, Verification

MECHANISMS = {
    "poisson_gaussian": "DP-SGD",
    "gaussian_histogram": "histogram",
    "noisy_count": "count",
    "unprotected": "no noise",
}
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def printable(text: str) -> str:
    """Without what could steer a terminal: a ledger's names are written by others."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def eps(value: float | None) -> str:
    """Epsilon, rounded up: an audit may not flatter either."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    if value >= 1000:
        return f"{math.ceil(value):,}"
    return f"{math.ceil(value * 1000 - 1e-9) / 1000:.3f}"


def verification(found: Verification) -> Group:
    """The outcome of `verify`."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    beyond = found.lines_in_file - found.lines
    below = f", of {found.lines_in_file} in the file" if beyond > 0 else ""
    for name, value in (
        ("site", found.site or "–"),
        ("key", found.public_keys[-1] if found.public_keys else "none: schema 1, not signed"),
        ("lines", f"{found.lines} that hold{below}"),
        ("from – to", f"{found.first_at[:19]} – {found.last_at[:19]}" if found.lines else "–"),
        ("head", found.head if found.lines else "–"),
        ("policy", found.policy_sha256 or "none recorded"),
        ("holds", ", ".join(f"{n} {kind}" for kind, n in sorted(found.counts.items())) or "–"),
        ("proven", found.proven if found.valid else "nothing, see above"),
    ):
        facts.add_row(name, printable(value))
    verdict = ("VALID", "bold green") if found.valid else ("NOT VALID", "bold red")
    head = Text.assemble(verdict, f"  {printable(found.ledger)}\n")
    return Group(head, *_findings(found.findings), facts)


def prices(found: Prices) -> Group:
    """The outcome of `price`."""
    parts: list[Table | Text] = [
        Text(
            f"site {printable(found.site)}, {found.lines} lines up to {found.at[:19] or '–'}, "
            f"head {found.head[:12]}…\n"
        ),
        *_findings(found.findings),
        _rows(found),
    ]
    if found.caps:
        parts.append(_caps(found.caps))
    if found.what_if:
        what_if = found.what_if
        table = _table(
            f"with study '{printable(what_if.name)}' on top: ε of all set aside, by PLD",
            ("patients", "the study", "at δ", "all now", "then", "at δ"),
        )
        for population, name in NAMES.items():
            table.add_row(
                name,
                eps(what_if.alone[population]),
                f"{what_if.delta:g}",
                eps(what_if.now[population]),
                eps(what_if.then[population]),
                f"{what_if.delta_together:g}",
            )
        parts.append(table)
    table = _table(
        "the events behind it",
        ("study", "patients", "mechanism", "q", "σ", "steps", "released", "aside"),
        left=3,
        caption="steps: noised sums of a release. aside: releases set aside, those made included.",
    )
    for event in found.events:
        table.add_row(
            printable(event.name),
            NAMES[event.population],
            MECHANISMS[event.kind],
            *("–" if v is None else f"{v:g}" for v in (event.sample_rate, event.noise_multiplier)),
            *(f"{n:,}" for n in (event.mechanisms, event.released, event.reserved)),
        )
    return Group(*parts, table)


def reconciliation(found: Reconciliation) -> Group:
    """The outcome of `reconcile`."""
    table = _table(
        f"study {found.study_hash[:12]}…: claimed by the card / charged in the ledger",
        ("site", "steps", "evaluations", "ε training", "ε validation", "at most / set aside"),
    )
    for row in found.rows:
        table.add_row(
            printable(row.site),
            f"{row.steps_claimed} / {row.steps_charged}",
            f"{row.evaluations_claimed} / {row.evaluations_charged}",
            f"{eps(row.train_claimed)} / {eps(row.train_charged)}",
            f"{eps(row.validation_claimed)} / {eps(row.validation_charged)}",
            f"{eps(row.at_most)} / {eps(row.reserved)}",
        )
    holds = ("THE CARD HOLDS", "bold green")
    verdict = holds if found.valid else ("THE CARD DOES NOT HOLD", "bold red")
    proven = [Text(f"{printable(site)}: {said}", "dim") for site, said in found.proven.items()]
    head = Text.assemble(verdict, f"  {printable(found.card)}\n")
    return Group(head, *_findings(found.findings), *([table] if found.rows else []), *proven)


def _findings(findings: Iterable[Finding]) -> list[Table | Text]:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        place = [f"site {finding.site}"] if finding.site else []
        place += [f"line {finding.line}"] if finding.line else []
        where = f"{', '.join(place)}: " if place else ""
        text = Text(printable(f"{where}{finding.text} ({finding.rule})"))
        if finding.cure:
            text.append(f"\ncure: {printable(finding.cure)}", "dim")
        table.add_row(Text(finding.severity, STYLES[finding.severity]), text)
    return [table, Text()] if table.rows else []


def _rows(found: Prices) -> Table:
    table = _table(
        "ε, rounded up",
        ("study", "patients", "δ", "n", "spent", "aside", "Rényi", "PRV", ""),
        left=2,
        caption="n: releases. spent; aside: set aside, spent included; both by PLD.\n"
        "Rényi, PRV: of what is spent.\n"
        f"✓ {found.tolerance}\n"
        "* Rényi's bound; PLD was not composed   † approved more than once\n"
        "'all together' and † are information only: studies were chosen one after another.",
    )
    for row in (*found.rows, *found.together):
        table.add_row(
            printable(row.name),
            NAMES[row.population],
            f"{row.delta:g}",
            f"{row.releases:,}",
            _pld(row.spent),
            _pld(row.reserved) + ("" if row.preset or row.study is None else " †"),
            eps(row.spent.rdp),
            "–" if row.spent.prv is None else "–".join(f"{v:.3f}" for v in row.spent.prv),
            _agree(row),
            style="bold" if row.study is None else "",
        )
    return table


def _caps(caps: tuple[CapRow, ...]) -> Table:
    what_if = any(cap.after is not None for cap in caps)
    columns = ("patients", "rule", "ε", "δ", "cap ε", "cap δ", "left")
    table = _table(
        "lifetime: all that is spent or set aside, under the policy's rule",
        (*columns, "then", "") if what_if else columns,
        left=2,
        caption="\n".join(sorted({_theorem(cap) for cap in caps})),
    )
    for cap in caps:
        row = [
            NAMES[cap.population],
            f"Rényi {cap.order}" if cap.rule == "rdp" else "sum",
            eps(cap.epsilon),
            f"{cap.delta:g}",
            f"{cap.cap_epsilon:g}",
            f"{cap.cap_delta:g}",
            f"{math.floor(cap.remaining * 1000) / 1000:.3f}",
        ]
        if what_if:
            row += [eps(cap.after), "fits" if cap.fits else "too much"]
        table.add_row(*row, style="" if cap.within else "red")
    return table


def _theorem(cap: CapRow) -> str:
    name = f"Rényi at order {cap.order}" if cap.rule == "rdp" else "sum"
    return f"{name}: {cap.theorem}"


def _pld(figures: Figures) -> str:
    return eps(figures.pld) + (" *" if figures.bounded else "")


def _agree(row: Row) -> str:
    known = [f.agree for f in (row.spent, row.reserved) if f.agree is not None]
    if not known:
        return ""
    return "✓" if all(known) else "[red]✗[/red]"


def _table(
    title: str, columns: tuple[str, ...], *, left: int = 1, caption: str | None = None
) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(columns):
        # Where a terminal is narrow, the name in the first column gives way, never a figure.
        table.add_column(
            name,
            justify="left" if index < left else "right",
            no_wrap=index > 0,
            overflow="ellipsis",
        )
    return table


def show(console: Console, what: Group) -> None:
    """Prints without guessing at markup or numbers."""
    console.print(what, markup=False, highlight=False)

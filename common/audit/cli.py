"""`fedward audit`: what a data-protection officer or auditor can prove with the ledger file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console, Group

from common.audit import tables
from common.audit.findings import Finding, wrong
from common.audit.prices import price as priced
from common.audit.reading import end_of, read
from common.audit.reconcile import reconcile as reconciled
from common.audit.verify import verify as verified
from common.errors import FedwardError
from common.privacy.policy import Policy
from common.privacy.receipts import read_receipts

M = TypeVar("M", bound=BaseModel)

app = typer.Typer(
    no_args_is_help=True,
    help="Check, price and print a hospital's privacy ledger, with nothing but the file.",
)

LedgerFile = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="ledger.jsonl of a site, or its state folder.")
]
PublicKey = Annotated[
    str | None, typer.Option(help="The site's public key, 64 hex digits, from where you trust.")
]
Receipts = Annotated[
    list[Path] | None,
    typer.Option(help="Receipts that others kept: a file, or a run's report.json. Repeatable."),
]
PolicyFile = Annotated[Path | None, typer.Option(help="The hospital's policy file, to compare.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.callback()
def _group() -> None:
    """Check, price and print a hospital's privacy ledger, with nothing but the file."""
    # Renyi DP tries orders at which its series does not converge, and says so each time.
    logging.getLogger("absl").setLevel(logging.ERROR)


@app.command()
def verify(
    ledger: LedgerFile,
    public_key: PublicKey = None,
    receipts: Receipts = None,
    policy: PolicyFile = None,
    as_json: Json = False,
) -> None:
    """Verifies chain, signatures, order and budgets; against receipts, that nothing was cut off.

    Exit code 0: every claim holds; 1: one does not, or a file cannot be read.
    """
    found = verified(
        ledger,
        public_key=_key(public_key),
        receipts=read_receipts(receipts or ()),
        policy=Policy.load(policy) if policy else None,
    )
    _print(found, tables.verification, as_json)
    _leave(found.findings)


@app.command()
def price(
    ledger: LedgerFile,
    at: Annotated[
        str | None, typer.Option(metavar="DATE", help="Price what was spent up to then (UTC).")
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(metavar="STUDY", help="A study's file or ready name: price it on top."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave PRV out, which takes seconds per study.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Computes ε again from the ledger's events: per study, population and in all.

    Three accountants: PLD (the price), Rényi DP, and PRV of another package.
    """
    with _waiting("pricing …"):
        found = priced(read(ledger), at=end_of(at) if at else None, what_if=what_if, quick=quick)
    _print(found, tables.prices, as_json)
    _leave(found.findings)


@app.command()
def report(
    ledger: LedgerFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    public_key: PublicKey = None,
    receipts: Receipts = None,
    policy: PolicyFile = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Also write the record for DPIA and Article 30."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave PRV out, which takes seconds per study.")
    ] = False,
) -> None:
    """Writes one page for people: spending, budgets, decisions, what ε means, and a DPIA record.

    The page needs no network and prints on A4. An invalid ledger yields a page that says so.
    """
    from common.audit.report import collect, write_page, write_record

    with _waiting("pricing and drawing …"):
        facts = collect(
            read(ledger),
            public_key=_key(public_key),
            receipts=read_receipts(receipts or ()),
            policy=Policy.load(policy) if policy else None,
            quick=quick,
        )
        write_page(facts, out)
    console = Console()
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
    if record is not None:
        write_record(facts, record)
        console.print(f"wrote {record}", markup=False, highlight=False, soft_wrap=True)
    if not facts.verification.valid:
        console.print("The ledger is not valid; the page says why.", style="bold red")
    _leave(facts.verification.findings)


@app.command()
def reconcile(
    card: Annotated[
        Path,
        typer.Argument(metavar="CARD", help="An adapter's folder or README.md, or a run's folder."),
    ],
    ledgers: Annotated[
        list[Path], typer.Argument(metavar="LEDGER…", help="Ledgers of the card's sites.")
    ],
    as_json: Json = False,
) -> None:
    """Compares the privacy statement published with an adapter with its sites' ledgers."""
    found = reconciled(card, ledgers)
    _print(found, tables.reconciliation, as_json)
    _leave(found.findings)


def _key(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[0-9a-f]{64}", text):
        raise FedwardError(
            "--public-key is 64 hex digits, as `fedward site key` prints it",
            cure="copy it from the study's [federation.sites.<name>] public_key",
        )
    return text


def _print(found: M, form: Callable[[M], Group], as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        tables.show(Console(), form(found))


def _leave(findings: tuple[Finding, ...]) -> None:
    if wrong(findings):
        raise typer.Exit(1)


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    with Console(stderr=True).status(text):
        yield

"""`fedward site`: run a hospital's daemon and look at what only the hospital may see."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from client.site.daemon import persons
from common.errors import FedwardError
from common.identity import Identity
from common.privacy.book import Book

app = typer.Typer(
    no_args_is_help=True, help="A hospital's daemon, decisions, keys and own metrics."
)
persons.register(app)

_POPULATIONS = ("train", "validation")
StateFolder = Annotated[Path, typer.Argument(help="State folder of the site.")]


@app.callback()
def _group() -> None:
    """A hospital's daemon, decisions, keys and own metrics."""


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="TOML file; see client/site/daemon/config.py.")],
) -> None:
    """Runs the daemon until it is told to end (SIGTERM, Ctrl-C) or idle for long enough."""
    from client.site.daemon.config import DaemonConfig
    from client.site.daemon.service import serve as run  # imports torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run(DaemonConfig.load(config))


@app.command()
def status(
    socket: Annotated[Path, typer.Argument(help="The daemon's Unix socket.")],
) -> None:
    """Shows what the daemon's sites are doing."""
    with grpc.insecure_channel(f"unix:{socket.absolute()}") as channel:
        try:
            sites = json.loads(channel.unary_unary("/fedward.Site/Status")(b"", timeout=5))
        except grpc.RpcError as error:
            raise FedwardError(
                f"no daemon answers on {socket} ({error.code().name})",
                cure="start one with `fedward site serve CONFIG`",
            ) from None
    table = Table(box=SIMPLE)
    for name in ("site", "phase", "study", "encoded", "round", "step", "ε so far", "last refusal"):
        table.add_column(name)
    for site in sites:
        spent = site["epsilon"].items()
        table.add_row(
            site["site"],
            site["phase"],
            site["study"],
            f"{site['done']} %",
            str(site["round"]),
            f"{site['step']}/{site['steps']}",
            ", ".join(f"{name} {'∞' if e is None else f'{e:.2f}'}" for name, e in spent),
            site["refusal"] or "",
        )
    Console().print(table)


@app.command()
def metrics(state: StateFolder) -> None:
    """Shows the exact metrics of the latest evaluation. They must stay in the hospital."""
    releases = sorted(
        (p for p in (state / "exact").glob("release-*.json") if p.stem[8:].isdigit()),
        key=lambda p: int(p.stem[8:]),
    )
    if not releases:
        raise FedwardError(
            f"no exact metrics in {state}", cure="they appear after the first evaluation"
        )
    try:
        _show_metrics(releases[-1])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FedwardError(
            f"{releases[-1]} holds no metrics", cure="remove it; the next evaluation writes anew"
        ) from None


def _show_metrics(path: Path) -> None:
    found = json.loads(path.read_text())
    names = ("auroc", "auprc", "precision", "recall", "f1")
    table = Table(
        title=f"evaluation {path.stem.partition('-')[2]}: {found['patients']} patients, "
        f"{found['records']} records",
        title_justify="left",
        caption="below each value its 95 % interval",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("task", "AUROC", "AUPRC", "precision", "recall", "F1", "known", "true"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, values in found["tasks"].items():
        shown = [_with_interval(values[n], values["interval"].get(n)) for n in names]
        table.add_row(task, *shown, str(values["support"]), str(values["positives"]))
    console = Console()
    console.print(table)
    console.print(
        "These numbers are exact and not private: they must stay in this hospital.",
        style="bold yellow",
    )


@app.command()
def key(state: StateFolder) -> None:
    """Prints the site's public key, which a study may pin; creates the key on first use."""
    print(Identity.open(state / "site.key").public)


@app.command()
def ledger(
    state: StateFolder,
    delta: Annotated[
        float | None,
        typer.Option(help="Probability at which to price all [default: each its own]."),
    ] = None,
) -> None:
    """Shows what was released and what it cost; `fedward audit` says more.

    A study is priced at its own δ, everything together at the largest of these.
    """
    path = state / "ledger.jsonl"
    if not path.exists():
        raise FedwardError(f"no ledger in {state}", cure="start the daemon once: it begins one")
    book = Book.read(path)
    title = f"site {book.site}: {len(book.lines)} lines, chain whole"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("study", "hash", "releases", "δ", "ε train", "ε validation"):
        table.add_column(name, justify="left" if name in ("study", "hash") else "right")
    rows: list[tuple[str, str | None, float]] = [
        (account.name, hash_, delta or account.delta) for hash_, account in book.studies.items()
    ]
    largest = delta or max((account.delta for account in book.studies.values()), default=1e-5)
    for name, hash_, at in [*rows, ("all together", None, largest)]:
        spent = book.epsilon(at, hash_)
        count = book.events(study_hash=hash_).total()
        figures = ("∞" if math.isinf(e) else f"{e:.3f}" for e in (spent[p] for p in _POPULATIONS))
        table.add_row(name, (hash_ or "")[:12], str(count), f"{at:g}", *figures)
    console = Console()
    console.print(table)
    console.print(f"head {book.head}", highlight=False, soft_wrap=True)
    if book.simulated:
        console.print("simulated: the randomness was seeded, nothing here is private", style="red")


def _with_interval(value: float | None, interval: Any) -> str:
    if value is None:
        return "–"
    shown = f"{value:.3f}"
    ends = "–".join(f"{end:.2f}".removeprefix("0") for end in interval or ())
    return f"{shown}\n{ends}" if ends else shown

"""The data report: what a data steward and a researcher look at before a shard is trained on.

One HTML page without network, scripts or other files. It holds counts, quantiles and pictures of
them; no identifier, no text of a note, no file name of an image. It is exact, not differentially
private: it stays in the hospital.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from client.site.shard.report import facts as _facts
from client.site.shard.report import leakage as _leakage
from client.site.shard.report import plots, words
from client.site.shard.report.facts import Missingness, Range, Summary, Task
from client.site.shard.report.findings import Finding, findings, label_problem
from client.site.shard.report.history import History, history
from client.site.shard.report.inputs import Inputs
from client.site.shard.report.leakage import Leakage
from client.site.shard.report.pictures import Pictures, pictures
from client.site.shard.report.texts import Texts, texts
from client.site.shard.shard import Shard
from common.errors import ShardError
from common.files import write_atomically

__all__ = ["Facts", "Finding", "collect", "findings", "render", "write_report"]


@dataclass(frozen=True)
class Facts:
    """All that the page says; None where the shard has nothing of the kind."""

    summary: Summary
    tasks: tuple[Task, ...]
    missingness: Missingness
    ranges: tuple[Range, ...]
    pictures: Pictures | None
    texts: Texts | None
    leakage: Leakage
    history: History | None


def collect(shard: Shard) -> Facts:
    """Looks at a shard: its tables whole, its image files by a sample."""
    inputs = Inputs.of(shard)
    return Facts(
        summary=_facts.summary(shard, inputs),
        tasks=_facts.tasks(inputs),
        missingness=_facts.missingness(inputs),
        ranges=_facts.ranges(inputs),
        pictures=pictures(shard),
        texts=texts(shard),
        leakage=_leakage.leakage(shard, inputs),
        history=history(shard.path),
    )


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": words.count,
        "percent": words.percent,
        "value": words.value,
    }
    return environment.get_template("page.html.j2").render(
        facts=facts,
        findings=findings(facts),
        label_problem=label_problem,
        phrases_of=_leakage.phrases_of,
        plots=plots,
        words=words,
        fewest=_leakage.FEWEST,
        outside=_facts.OUTSIDE,
        separates=_leakage.SEPARATES,
        written=datetime.now().strftime("%-d %B %Y, %H:%M"),
        fedward=version("fedward"),
    )


def write_report(shard: Shard, path: Path) -> None:
    """Writes the report of a shard: complete, readable by its owner only, or not at all.

    Raises:
        ShardError: The file cannot be written.
    """
    page = render(collect(shard))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise ShardError(
            f"{path}: cannot write the report ({error.strerror})",
            cure="name another place with --out",
        ) from None

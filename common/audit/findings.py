"""What an audit found: one form for every command."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Severity = Literal["error", "warning", "note"]


class Finding(BaseModel):
    """Something that a person should know.

    Attributes:
        rule: Stable code.
        severity: `error`: the claim does not hold; `warning`: it holds, but not for what one might
            take it for; `note`: good to know.
        site: Whose ledger it is about, where several are.
        line: Of the ledger, from 1.
    """

    model_config = ConfigDict(frozen=True)

    rule: str
    severity: Severity
    text: str
    cure: str = ""
    site: str | None = None
    line: int | None = None


def error(rule: str, text: str, cure: str = "", *, line: int | None = None) -> Finding:
    """A claim that does not hold."""
    return Finding(rule=rule, severity="error", text=text, cure=cure, line=line)


def warning(rule: str, text: str, cure: str = "", *, line: int | None = None) -> Finding:
    """A claim that holds for less than one might think."""
    return Finding(rule=rule, severity="warning", text=text, cure=cure, line=line)


def note(rule: str, text: str, *, line: int | None = None) -> Finding:
    """Good to know."""
    return Finding(rule=rule, severity="note", text=text, line=line)


def wrong(findings: tuple[Finding, ...]) -> bool:
    """Whether any claim does not hold."""
    return any(finding.severity == "error" for finding in findings)

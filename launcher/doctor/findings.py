"""The finding of a check, in words, as JSON, and as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

from starling.core.errors import StarlingError

Status = Literal["ok", "warning", "failure"]

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its status, what was found, and the remedy."""

    check: str
    status: Status
    text: str
    remedy: str = ""

    @classmethod
    def of_error(cls, check: str, error: StarlingError, where: str = "") -> Finding:
        """Return the failure that an error describes; the remedy follows the first semicolon of its message."""
        text, _, remedy = str(error).partition("; ")
        return cls(check, "failure", where + text, remedy)

    def as_dict(self) -> dict[str, str]:
        """Return plain values for `--json`."""
        return {"check": self.check, "status": self.status, "text": self.text, "remedy": self.remedy}


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """Return a line per finding, with the remedy below each warning or failure, and a last line with the counts."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        status = click.style(f"{finding.status:<7}", fg=_COLOURS[finding.status])
        lines.append(f"{status}  {finding.check:<{width}}  {finding.text}")
        if finding.remedy and finding.status != "ok":
            lines.append(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    counts = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    lines.append(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failure']} failures")
    return lines


def as_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as plain values."""
    return {"checks": [finding.as_dict() for finding in findings], "exit_code": exit_code(findings)}


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 5 if a check failed, else 0, also with warnings."""
    return 5 if any(finding.status == "failure" for finding in findings) else 0

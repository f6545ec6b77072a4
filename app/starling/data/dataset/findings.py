"""Problems of a dataset: one finding for each image, label file or row, and the report of all findings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from starling.core.files.atomic import write_atomic

REPORT = "labels_report.csv"
"""Name of the report in a run folder."""


class Finding(NamedTuple):
    """One problem, its place, and the remedy. As text: `file:line: problem; remedy`."""

    file: str
    line: int | None
    """Line of a label file, counted from 1; None if the finding concerns the whole file."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        """Return the finding as one line of text."""
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.problem}; {self.remedy}"


def write_report(path: Path, findings: Iterable[Finding]) -> int:
    """Write the columns file, line, problem, remedy as CSV, and return the number of rows below the header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Finding._fields)
    count = 0
    for count, finding in enumerate(findings, start=1):  # noqa: B007 - the last value is the number of rows
        writer.writerow(finding)
    # A file name may contain bytes that are not valid text; the report shows them escaped.
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
    return count

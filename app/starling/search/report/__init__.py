"""report.html: everything that a search found, on one page that needs nothing else."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from starling.core.files.atomic import write_atomic
from starling.search.report.facts import read_facts
from starling.search.report.page import build_page
from starling.search.study import SearchStudy

REPORT = "report.html"


def write_report(study: SearchStudy, now: datetime | None = None) -> Path:
    """Replace the study's report by what the study says now, and return its path. Raises OSError where the disk refuses."""
    path = study.directory / REPORT
    write_atomic(path, build_page(read_facts(study, now or datetime.now())))
    return path

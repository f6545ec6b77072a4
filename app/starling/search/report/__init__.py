"""report.html: all results of a search on one self-contained page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from starling.core.files.atomic import write_atomic
from starling.search.report.facts import read_facts
from starling.search.report.page import build_page
from starling.search.study import SearchStudy

REPORT = "report.html"


def write_report(study: SearchStudy, now: datetime | None = None) -> Path:
    """Write the study's report anew, and return its path. Raises OSError if the disk refuses."""
    path = study.directory / REPORT
    write_atomic(path, build_page(read_facts(study, now or datetime.now())))
    return path

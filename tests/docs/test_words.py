"""How the pages are written, as far as a pattern can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted([*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md")])
CODE = re.compile(r"`[^`]*`|^    .*$", re.MULTILINE)
BARE_POINT = re.compile(r"(?<![\w.:/@\\-])\.\d")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_number_below_one_begins_with_a_zero(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    wrong = [line for line in text.splitlines() if BARE_POINT.search(line)]
    assert wrong == []

"""How the pages are written, as far as a pattern can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted([*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md")])
CODE = re.compile(r"`[^`]*`|^    .*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SMALL_NAMES = ("optuna-dashboard", "pycocotools", "yolov5n")
"""Names that begin with a small letter, also at the beginning of a sentence."""
BARE_POINT = re.compile(r"(?<![\w.:/@\\-])\.\d")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_number_below_one_begins_with_a_zero(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    wrong = [line for line in text.splitlines() if BARE_POINT.search(line)]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_paragraph_is_whole_sentences_and_continues_neither_a_heading_nor_an_example(page: Path) -> None:
    paragraphs = re.split(r"\n\s*\n", FENCED.sub("", page.read_text()))
    wrong = [
        text[:60] for text in paragraphs if re.match(r"[a-z]", text) and not text.startswith(SMALL_NAMES)
    ]
    assert wrong == []

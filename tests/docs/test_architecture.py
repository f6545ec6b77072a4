"""Paths and names that docs/architecture.md and CONTRIBUTING.md give are there: the pages do not outlive a move."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PLACES = [REPOSITORY, REPOSITORY / "app", REPOSITORY / "app/starling", REPOSITORY / "launcher"]
ROOMS = [*PLACES, *(place for top in PLACES[2:] for place in top.rglob("*") if place.is_dir())]
MAP = (REPOSITORY / "CONTRIBUTING.md").read_text()


def named(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text()
    return sorted(set(re.findall(r"`([\w./-]+(?:\.(?:py|toml|yaml|md)|/))`", text)) - {"starling.yaml"})


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_and_folder_that_a_page_names_is_there(page: str) -> None:
    assert len(named(page)) > 10
    missing = [
        path
        for path in named(page)
        if not path.startswith("runs") and not any((place / path).exists() for place in ROOMS)
    ]
    assert missing == []


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TOP = "app|bench|datasets|deploy|examples|launcher|scripts|tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_from_the_root_that_a_page_names_is_there(page: Path) -> None:
    paths = re.findall(rf"`((?:{TOP})/[\w./-]*)`", page.read_text())
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_the_map_gives_every_path_in_full() -> None:
    paths = set(re.findall(r"`([\w.-]+/[\w./-]+)`", MAP))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists()] == []


def test_every_name_that_the_map_gives_with_a_file_stands_in_that_file() -> None:
    names = re.findall(r"`(\w+)`\s+\(`([\w./-]+)`\)", MAP)
    assert len(names) > 8
    missing = [
        (name, path)
        for name, path in names
        if not re.search(rf"\b{name}\b", (REPOSITORY / path).read_text(encoding="utf-8"))
    ]
    assert missing == []


@pytest.mark.parametrize(
    "part",
    [
        "a sampler", "a tracker", "an engine", "a layout", "a head", "a dataset converter", "an export format",
        "a command of `starling`", "a command of `launcher`", "a flag of `launcher up`",
    ],
)  # fmt: skip
def test_the_map_says_where_a_part_is_added(part: str) -> None:
    assert re.search(rf"^\| {re.escape(part)} \|", MAP, re.MULTILINE)

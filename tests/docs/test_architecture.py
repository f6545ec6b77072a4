"""Paths that docs/architecture.md and CONTRIBUTING.md name are there: the pages do not outlive a move."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

PLACES = [REPOSITORY, REPOSITORY / "app", REPOSITORY / "app/starling", REPOSITORY / "launcher"]
ROOMS = [*PLACES, *(place for top in PLACES[2:] for place in top.rglob("*") if place.is_dir())]


def named(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text()
    return sorted(set(re.findall(r"`([a-z_./-]+(?:\.py|/))`", text)))


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_and_folder_that_a_page_names_is_there(page: str) -> None:
    assert len(named(page)) > 10
    missing = [
        path
        for path in named(page)
        if not path.startswith("runs") and not any((place / path).exists() for place in ROOMS)
    ]
    assert missing == []

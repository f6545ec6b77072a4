"""The page of faults lists every fault once, for its users; faults.toml names the tests of each, and they exist."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "faults.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+ \|", line)
]
TESTED: dict[str, list[str]] = tomllib.loads((REPOSITORY / "tests" / "docs" / "faults.toml").read_text())
TESTS = {
    node.name
    for path in (REPOSITORY / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def test_every_fault_is_listed_once_and_in_order() -> None:
    assert len(ROWS) >= 64
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_fault_says_what_happens_and_what_to_do(row: list[str]) -> None:
    assert len(row) == 4
    assert all(row)


def test_the_page_names_no_tests() -> None:
    assert "test_" not in PAGE


def test_every_fault_has_tests_and_no_tests_are_of_a_fault_that_is_not_listed() -> None:
    assert list(TESTED) == [row[0] for row in ROWS]


@pytest.mark.parametrize("number", TESTED)
def test_every_named_test_exists(number: str) -> None:
    assert TESTED[number]
    assert [name for name in TESTED[number] if name not in TESTS] == []

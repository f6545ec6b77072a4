"""The page of faults names tests that exist, and every fault once."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import REPOSITORY

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (REPOSITORY / "docs" / "faults.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]
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
def test_every_named_test_exists(row: list[str]) -> None:
    named = re.findall(r"`(\w+)`", row[-1])
    assert named or row[-1] == "later"
    assert [name for name in named if name not in TESTS] == []

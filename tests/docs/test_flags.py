"""The page of flags is whole: every flag of the four commands, none besides, and tests that exist."""

from __future__ import annotations

import argparse
import ast
import re
from functools import cache

import pytest

from starling.core.settings import detect, export, train, val
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "flags.md").read_text()
PARSERS: dict[str, argparse.ArgumentParser] = {
    "train.py": train.COMMAND.parser(),
    "val.py": val.COMMAND.parser(),
    "detect.py": detect.COMMAND.parser(),
    "export.py": export.COMMAND.parser(),
}
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def table(command: str) -> list[tuple[tuple[str, ...], str, str]]:
    """Return (flag and aliases, what it does, tests) of each row below the command's heading."""
    section = re.search(rf"^## {re.escape(command)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"no heading {command}"
    lines = [line for line in section[1].splitlines() if line.startswith("| `--")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row for row in rows if len(row) != 3] == []
    return [(tuple(re.findall(r"`(--[\w-]+)`", flags)), does, tests) for flags, does, tests in rows]


def actions(command: str) -> list[tuple[str, ...]]:
    """Return every flag of a command with its aliases, --help left out."""
    return [tuple(action.option_strings) for action in PARSERS[command]._actions if action.dest != "help"]


@cache
def defined_in(file: str) -> frozenset[str]:
    """Return the names of the tests that a file defines; empty where there is no such file."""
    path = REPOSITORY / file
    nodes = ast.walk(ast.parse(path.read_text())) if path.is_file() else ()
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_and_alias_has_one_row(command: str) -> None:
    rows = [flags for flags, _, _ in table(command)]
    assert len(rows) == len(set(rows))
    assert [flags for flags in actions(command) if flags not in rows] == []


@pytest.mark.parametrize("command", PARSERS)
def test_no_row_is_of_a_flag_that_the_command_does_not_know(command: str) -> None:
    known = set(actions(command))
    assert [flags for flags, _, _ in table(command) if flags not in known] == []


@pytest.mark.parametrize("command", PARSERS)
def test_every_row_says_what_the_flag_does_and_names_a_test(command: str) -> None:
    assert [flags for flags, does, tests in table(command) if not does or not TEST.search(tests)] == []


def test_every_named_test_exists() -> None:
    named = TEST.findall(PAGE)
    assert len(named) > 100
    assert PAGE.count("tests/") == len(named), "a test is written otherwise than `tests/file.py::test_name`"
    missing = [f"{file}::{test}" for file, test in named if test not in defined_in(file)]
    assert missing == []

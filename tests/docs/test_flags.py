"""The page of flags is what the declarations say, and flags.toml names tests of every flag that exist."""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from starling.core.settings import detect, export, hpo, train, val
from starling.core.settings.parser import Command
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "flags.md").read_text()
COMMANDS: dict[str, Command] = {
    f"{module.COMMAND.name}.py": module.COMMAND for module in (train, val, detect, export, hpo)
}
TESTED: dict[str, dict[str, list[str]]] = tomllib.loads(
    (REPOSITORY / "tests" / "docs" / "flags.toml").read_text()
)


def script() -> ModuleType:
    """Return scripts/flags as a module."""
    loader = SourceFileLoader("flags_script", str(REPOSITORY / "scripts" / "flags"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def table(command: str) -> list[tuple[tuple[str, ...], str, str]]:
    """Return (flag and aliases, what it does, default) of each row below the command's heading."""
    section = re.search(rf"^## {re.escape(command)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"no heading {command}"
    lines = [line for line in section[1].splitlines() if line.startswith("| `--")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row for row in rows if len(row) != 3] == []
    return [(tuple(re.findall(r"`(--[\w-]+)`", flags)), does, default) for flags, does, default in rows]


def actions(command: str) -> list[argparse.Action]:
    """Return what the command line takes, --help left out."""
    return [action for action in COMMANDS[command].parser()._actions if action.dest != "help"]


@cache
def defined_in(file: str) -> frozenset[str]:
    """Return the names of the tests that a file defines; empty where there is no such file."""
    path = REPOSITORY / file
    nodes = ast.walk(ast.parse(path.read_text())) if path.is_file() else ()
    return frozenset(
        node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def test_the_page_is_what_the_declarations_say() -> None:
    assert script().page() == PAGE, "docs/flags.md differs from the declarations: run scripts/flags"


def test_a_page_that_differs_is_told_by_check_and_written_by_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = script()
    other = tmp_path / "flags.md"
    other.write_text(PAGE.replace("show tracebacks", "show nothing"))
    monkeypatch.setattr(flags, "PAGE", other)
    monkeypatch.setattr("sys.argv", ["flags", "--check"])
    assert flags.main() == 1
    assert capsys.readouterr().err == f"{other}: differs from the declarations; run scripts/flags\n"
    monkeypatch.setattr("sys.argv", ["flags"])
    assert flags.main() == 0
    assert other.read_text() == PAGE
    monkeypatch.setattr("sys.argv", ["flags", "--check"])
    assert flags.main() == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_and_alias_has_one_row_and_no_row_is_of_another(command: str) -> None:
    rows = [flags for flags, _, _ in table(command)]
    assert rows == [tuple(action.option_strings) for action in actions(command)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_row_says_what_the_flag_does_and_its_default(command: str) -> None:
    assert [flags for flags, does, default in table(command) if not does or not default] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_that_a_flag_chooses_from_is_named(command: str) -> None:
    unnamed = {
        declared.flag: choice
        for declared in COMMANDS[command].settings
        for choice in declared.choices
        if not re.search(rf"\b{choice}\b", declared.help)
    }
    assert unnamed == {}


def test_the_page_names_no_tests() -> None:
    assert "test_" not in PAGE
    assert "tests/" not in PAGE


def test_every_command_is_tested() -> None:
    assert list(TESTED) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_test_and_no_test_is_of_a_flag_that_the_command_does_not_know(command: str) -> None:
    assert list(TESTED[command]) == [declared.flag for declared in COMMANDS[command].settings]
    assert [flag for flag, tests in TESTED[command].items() if not tests] == []


def test_every_named_test_exists() -> None:
    named = [test for flags in TESTED.values() for tests in flags.values() for test in tests]
    assert len(named) > 100
    missing = [test for test in named if test.partition("::")[2] not in defined_in(test.partition("::")[0])]
    assert missing == []

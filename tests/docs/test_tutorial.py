"""The tutorial's command lines are understood, its images are there and small, and the README leads to every page."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from PIL import Image

from launcher.cli.main import cli as launcher
from starling.cli import data, plots, search, track
from starling.core.settings import detect, export, train, val
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "tutorial.md"
IMAGES = REPOSITORY / "docs" / "tutorial"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAX_BYTES = 150_000
MAX_WIDTH = 1000
OTHERS = {".", "cd", "cp", "mkdir", "mv", "rm", "ls", "cat", "echo", "git", "python3", "pip"}
"""Commands of the system that the tutorial uses."""

SUBPARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "data": data.build_parser,
    "plots": plots.build_parser,
    "search": search.build_parser,
    "track": track.build_parser,
}
CONFIGURED = {"train": train, "val": val, "detect": detect, "export": export}


def command_lines() -> list[str]:
    """Return the command lines of the page's indented blocks, each with its continuation lines joined."""
    blocks = re.findall(r"^(?:    .*\n)+", re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL), re.M)
    return [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def parse_starling(words: Sequence[str]) -> None:
    """Raise for words that the command `starling` does not take."""
    command, *arguments = words
    if command in CONFIGURED:
        declared = CONFIGURED[command].COMMAND
        declared.config(**declared.given(arguments))
    else:
        SUBPARSERS[command]().parse_args(arguments)


def parse_launcher(words: Sequence[str]) -> None:
    """Raise for words that the command `launcher` does not take, training arguments after `--` included."""
    own, training = list(words), list[str]()
    if "--" in own:
        cut = own.index("--")
        own, training = own[:cut], own[cut + 1 :]
        parse_starling(["train", *training])
    root = launcher.make_context("launcher", own)
    assert isinstance(launcher, click.Group)
    _, command, rest = launcher.resolve_command(root, [*root._protected_args, *root.args])
    assert command is not None
    assert command.make_context(command.name, [*rest, *(["--", *training] if training else [])], parent=root)


def shown() -> list[str]:
    """Return the images that the page shows, as paths from docs/."""
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text())


def test_the_tutorial_goes_from_the_installation_to_cleaning_up() -> None:
    said = "\n".join(command_lines())
    needed = (
        "pip install", "starling train", "starling val", "starling detect", "launcher up --engine local --cpu 2",
        "--evolve", "launcher status", "starling search show", "--task test", "starling export", "launcher clean",
    )  # fmt: skip
    assert [step for step in needed if step not in said] == []


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_of_the_tutorial_is_understood(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "starling":
        parse_starling(words)
    elif program == "launcher":
        parse_launcher(words)
    else:
        assert program in OTHERS


@pytest.mark.parametrize("line", ["starling train --imgg 160", "launcher up --cpus 2 -- --data x.yaml"])
def test_a_command_line_with_a_wrong_flag_is_not_understood(line: str) -> None:
    program, *words = shlex.split(line)
    parse = {"starling": parse_starling, "launcher": parse_launcher}[program]
    with pytest.raises((Exception, SystemExit)):
        parse(words)


@pytest.mark.parametrize("image", shown())
def test_every_image_of_the_tutorial_is_there_and_small(image: str) -> None:
    path = PAGE.parent / image
    assert path.is_file()
    assert path.stat().st_size < MAX_BYTES
    with Image.open(path) as opened:
        assert opened.width <= MAX_WIDTH


def test_every_image_of_the_tutorial_is_tracked_and_every_tracked_one_is_shown() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "docs/tutorial"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no git repository here")
    assert set(listed.stdout.split()) == {f"docs/{image}" for image in shown()}
    assert len(shown()) >= 8


def test_the_readme_leads_to_the_tutorial_in_its_first_screen() -> None:
    assert "docs/tutorial.md" in "\n".join(README.splitlines()[:30])


def test_the_readme_lists_every_page_under_one_kind() -> None:
    section = README.split("## Documentation")[1]
    kinds = [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")]
    assert [kind for kind in kinds[2:] if kind] == ["tutorial", "how-to", "reference", "explanation"]
    pages = {f"docs/{path.name}" for path in Path(REPOSITORY / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\]\((docs/[\w-]+\.md)\)", section.split("\n\n")[1]))

"""The docs name every flag, setting, variable and hyperparameter; and no flag that does not exist."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from launcher.cli.main import cli as launcher
from starling import settings
from starling.cli import plots as plots
from starling.cli import track
from starling.cli.data import build_parser as data_parser
from starling.cli.search import build_parser as search_parser
from starling.config.hyp import Hyp
from starling.config.shipped import SHIPPED
from starling.core.settings import detect, export, hpo, train, val
from tests.conftest import REPOSITORY

DOCS = {
    path.name: path.read_text() for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
}
ALL = "\n".join(DOCS.values())


COMMANDS = {
    page: module.COMMAND.parser()
    for page, module in {
        "train.md": train,
        "val.md": val,
        "detect.md": detect,
        "export.md": export,
        "clearml.md": hpo,
    }.items()
}
"""The command lines that docs/flags.md lists, by the page that says more about each."""


def command_flags() -> list[str]:
    return sorted({flag for parser in COMMANDS.values() for flag in flags_of(parser)})


def plots_flags() -> list[str]:
    return flags_of(plots.build_parser())


def launcher_flags() -> list[str]:
    assert isinstance(launcher, click.Group)
    found = set()
    commands: list[click.Command] = [launcher]
    while commands:
        command = commands.pop()
        if isinstance(command, click.Group):
            ctx = click.Context(command)
            commands += filter(None, (command.get_command(ctx, name) for name in command.list_commands(ctx)))
        for parameter in command.params:
            found.update(flag for flag in parameter.opts if flag.startswith("--"))
    return sorted(found)


def track_flags() -> list[str]:
    return flags_of(track.build_parser())


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    found = set()
    parsers = [parser]
    while parsers:
        for action in parsers.pop()._actions:
            found.update(flag for flag in action.option_strings if flag.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
    return sorted(found)


@pytest.mark.parametrize("flag", sorted(set(command_flags()) - {"--help"}))
def test_every_flag_of_the_commands_is_in_the_page_of_flags(flag: str) -> None:
    assert f"`{flag}`" in DOCS["flags.md"]


@pytest.mark.parametrize("page", COMMANDS)
def test_the_page_of_a_command_leads_to_its_flags(page: str) -> None:
    command = COMMANDS[page].prog
    assert f"(flags.md#{command.replace('.', '')})" in DOCS[page]
    assert f"\n## {command}\n" in DOCS["flags.md"]


def test_the_flags_of_plots_are_in_the_validating_page() -> None:
    assert plots_flags() == ["--help", "--out"]
    assert "--out" in DOCS["val.md"]


@pytest.mark.parametrize("flag", sorted(set(launcher_flags()) - {"--help"}))
def test_every_flag_of_the_launcher_is_in_the_launching_page(flag: str) -> None:
    assert flag in DOCS["launch.md"]


@pytest.mark.parametrize("flag", sorted(set(track_flags()) - {"--help"}))
def test_every_flag_of_track_is_in_the_tracking_page(flag: str) -> None:
    assert flag in DOCS["track.md"]


@pytest.mark.parametrize("flag", sorted(set(flags_of(data_parser())) - {"--help"}))
def test_every_flag_of_the_data_command_is_in_the_data_page(flag: str) -> None:
    assert f"`{flag}" in DOCS["data.md"]


@pytest.mark.parametrize("flag", sorted(set(flags_of(search_parser())) - {"--help"}))
def test_every_flag_of_the_search_command_is_in_the_search_page(flag: str) -> None:
    assert f"`{flag}" in DOCS["search.md"]


@pytest.mark.parametrize("command", ["show", "report", "import"])
def test_every_search_command_is_in_the_search_page(command: str) -> None:
    assert f"starling search {command} " in DOCS["search.md"]


@pytest.mark.parametrize("path", sorted((SHIPPED / "datasets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_dataset_is_in_the_data_page(path: Path) -> None:
    assert f"`{path.name}`" in DOCS["data.md"]


@pytest.mark.parametrize("name", [field.name for field in fields(Hyp)])
def test_every_hyperparameter_is_in_the_training_page(name: str) -> None:
    assert f"`{name}`" in DOCS["train.md"]


@pytest.mark.parametrize("name", [field.name for field in fields(settings.Settings)])
def test_every_setting_is_in_the_tracking_page(name: str) -> None:
    assert f"`{name}" in DOCS["track.md"]


def test_every_variable_of_the_compose_file_is_in_the_example_environment() -> None:
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    example = (REPOSITORY / ".env.example").read_text()
    missing = [name for name in set(re.findall(r"\$\{(\w+)", compose)) if f"{name}=" not in example]
    assert not missing


def test_no_page_names_a_flag_that_no_command_has() -> None:
    known = {*command_flags(), *launcher_flags(), *track_flags(), *plots_flags()}
    known |= {
        *export.COMMAND.refused,
        *flags_of(data_parser()),
        *flags_of(search_parser()),
    }
    known |= {"--env-manager", "--model-uri", "--logdir"}  # of mlflow and tensorboard
    known |= {
        "--no-X",
        *(f"--no-{flag[2:]}" for flag in launcher_flags()),
    }  # take back what starling.yaml says
    known |= {"--sig-proxy", "--ipc", "--build-arg", "--show"}  # of docker
    known |= {"--always", "--dirty", "--abbrev", "--exclude"}  # of git
    known |= {"--cpu-only"}  # of clearml-agent
    known |= {"--real", "--journal", "--landscape", "--plot"}  # of bench/search_*.py
    known |= {"--folder", "--search-epochs"}  # of examples/clearml_pipeline.py
    known |= {
        "--files",
        "--create-queue",
        "--cpu-only",
        "--docker",
        "--run",
    }  # of ClearML's own commands, and Serving's:
    known |= {"--id", "--framework", "--path", "--engine", "--endpoint", "--model-id", "--env-file"}
    known |= {f"--{side}-{what}" for side in ("input", "output") for what in ("name", "type", "size")}
    known |= {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--standalone"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", ALL))
    unknown = {flag for flag in named - known if not any(full.startswith(flag) for full in known)}
    assert not unknown


def test_every_link_between_pages_leads_somewhere() -> None:
    for page, text in DOCS.items():
        folder = REPOSITORY if page == "README.md" else REPOSITORY / "docs"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{page}: {target}"


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    text = re.sub(r"^```.*?^```", "", DOCS[page], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_anchor_of_a_link_is_a_heading() -> None:
    links = [
        (page, target or page, anchor)
        for page, text in DOCS.items()
        for target, anchor in re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", text)
    ]
    assert len(links) > 30
    assert [link for link in links if link[2] not in anchors(link[1])] == []

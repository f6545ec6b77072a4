"""Print the script that completes `starling` in a shell: `starling completion bash`.

eval "$(starling completion bash)"      # in ~/.bashrc
eval "$(starling completion zsh)"       # in ~/.zshrc, after compinit
starling completion fish > ~/.config/fish/completions/starling.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from starling.core.settings.completion import offers
from starling.core.settings.parser import Command, PathParser

VARIABLE = "_STARLING_COMPLETE"
"""The variable with which a shell asks `starling` for completions."""
SHELLS = ("bash", "zsh", "fish")
_DECLARED = ("train", "val", "detect", "export", "hpo")
"""Commands with settings declared in core, which can be read without importing the command's packages."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `starling completion`."""
    parser = PathParser(
        prog="starling completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the script, and return the exit code."""
    made = get_completion_class(build_parser().parse_args(arguments).shell)
    assert made is not None
    print(made(click.Group(), {}, "starling", VARIABLE).source())
    return 0


def answer(instruction: str, commands: Sequence[str]) -> int:
    """Print the completions that the script of `main` asks for; return the exit code."""
    group = click.Group(commands={name: _Asked(name) for name in commands})
    return shell_complete(group, {}, "starling", VARIABLE, instruction)


class _Asked(click.Command):
    """A click command that represents a command of `starling` during completion: all its words are arguments."""

    def __init__(self, name: str) -> None:
        words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, shell_complete=self._complete)
        super().__init__(
            name,
            params=[words],
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            add_help_option=False,
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return completions for a word that begins like an option; click asks the command for these."""
        return self._complete(ctx, self.params[0], incomplete)

    def _complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        parser = _parser_of(self.name or "")
        if parser is None:
            return []
        given = offers(parser, ctx.params.get("words") or (), incomplete)
        if given.files:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word, help=text) for word, text in given.words]


def _parser_of(name: str) -> argparse.ArgumentParser | None:
    """Return the parser of a command; None for a command without a parser, or without its packages."""
    if name in _DECLARED:
        command: Command = import_module(f"starling.core.settings.{name}").COMMAND
        return command.parser()
    try:
        module = import_module(f"starling.cli.{name}")
    except ModuleNotFoundError:  # only the launcher is installed
        return None
    made: argparse.ArgumentParser | None = module.build_parser() if hasattr(module, "build_parser") else None
    return made

"""Shell completion of the next word of a command line, from the command's parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class Offers(NamedTuple):
    """Words with their help that begin with the incomplete word; or names of files."""

    words: tuple[tuple[str, str], ...] = ()
    files: bool = False


def offers(parser: argparse.ArgumentParser, typed: Sequence[str], incomplete: str) -> Offers:
    """Return the possible words after `typed`: subcommands, flags, a flag's choices, or names of files."""
    typed = [word for word in typed if word != "="]  # bash splits --flag=value into three words
    while (commands := _subcommands(parser)) is not None:
        named = next((at for at, word in enumerate(typed) if word in commands.choices), None)
        if named is None:
            if incomplete.startswith("-"):
                break
            helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
            return _beginning([(name, helps.get(name, "")) for name in commands.choices], incomplete)
        parser, typed = commands.choices[typed[named]], typed[named + 1 :]
    if incomplete.startswith("-"):
        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        return _beginning(
            [(name, _line(action)) for action in actions for name in action.option_strings], incomplete
        )
    if typed and typed[-1].startswith("-"):
        return _values_of(parser, typed[-1], incomplete)
    places = [action for action in parser._actions if not action.option_strings and action.choices]
    return _values(places[0], incomplete) if places else Offers(files=True)


def _values_of(parser: argparse.ArgumentParser, flag: str, incomplete: str) -> Offers:
    action = parser._option_string_actions.get(flag)
    if action is None or action.nargs == 0:
        return Offers(files=True)
    return _values(action, incomplete)


def _values(action: argparse.Action, incomplete: str) -> Offers:
    if action.choices is not None:
        return _beginning([(str(choice), "") for choice in action.choices], incomplete)
    return Offers(files=action.type not in (int, float))


def _subcommands(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    return next(
        (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None
    )


def _line(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").splitlines()[0] if action.help else ""


def _beginning(words: Sequence[tuple[str, str]], incomplete: str) -> Offers:
    return Offers(tuple((word, text) for word, text in words if word.startswith(incomplete)))

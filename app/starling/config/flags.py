"""What every command line here shares: one flag of a table, and a parser whose errors are ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, Self

from starling.core.errors import suggest
from starling.core.paths import impossible
from starling.errors import UsageError


class Flag:
    """One flag; its type, default and place come from the configuration's field that its first name means."""

    def __init__(self, *names: str, help: str, **options: Any) -> None:
        self.names, self.help, self.options = names, help, options
        self.field = names[0].lstrip("-").replace("-", "_")

    def add_to(self, group: argparse._ArgumentGroup, default: Any) -> None:
        """Add the flag to a group of the parser."""
        options: dict[str, Any] = {"dest": self.field, "help": self.help, "default": default}
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, int | float):
            options["type"] = type(default)
        group.add_argument(*self.names, **{**options, **self.options})


CONSOLE = "starling "
"""How `sys.argv[0]` begins where a command was called as `starling COMMAND`, not as `COMMAND.py`."""


class PathParser(argparse.ArgumentParser):
    """A parser that refuses words which no path can be, before anything looks for them."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a word that no path can be is an error of the command line."""
        words = sys.argv[1:] if args is None else list(args)
        problem = impossible(words)
        if problem:
            self.error(problem)
        return super().parse_known_args(words, namespace)


class CommandParser(PathParser):
    """A parser whose errors are ours: one message, with the flag that may have been meant."""

    refused: Mapping[str, str] = {}
    """Flags that users know from elsewhere, and why they are not here."""

    @classmethod
    def of(
        cls,
        prog: str,
        description: str,
        examples: str,
        flags: Mapping[str, Sequence[Flag]],
        default: Any,
        refused: Mapping[str, str] | None = None,
    ) -> Self:
        """Return the parser of one command: its flags by heading, with a configuration's values as defaults."""
        parser = cls(
            prog=sys.argv[0] if sys.argv[0].startswith(CONSOLE) else prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.refused = refused or {}
        parser.add_flags(flags, default)
        return parser

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing the usage and exiting."""
        flag = next((word.split("=", 1)[0] for word in message.split() if word.startswith("--")), "")
        if flag in self.refused and "unrecognized" in message:
            raise UsageError(f"{flag}: {self.refused[flag]}")
        hint = suggest(flag, self._option_string_actions) if "unrecognized" in message else ""
        raise UsageError(f"{message}{hint}; see {self.prog} --help")

    def add_flags(self, flags: Mapping[str, Sequence[Flag]], default: Any) -> None:
        """Add a table of flags by heading; defaults are the fields of `default`, a configuration."""
        for heading, rows in flags.items():
            group = self.add_argument_group(heading)
            for flag in rows:
                flag.add_to(group, getattr(default, flag.field))

    def parse_given(self, argv: Sequence[str] | None, config: type) -> dict[str, Any]:
        """Return what `argv` sets, by field of `config`, lists as tuples; what it leaves alone is absent."""
        unset = object()
        names = [field.name for field in fields(config)]
        values = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
        given = {key: value for key, value in values.items() if value is not unset}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

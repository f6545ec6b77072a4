"""The command line of a configuration: a parser made from its declarations, which raises UsageError."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, NoReturn

from starling.core.errors import UsageError, suggest
from starling.core.paths import impossible
from starling.core.settings.declaration import Config, Setting, settings_of

CONSOLE = "starling "
"""The beginning of `sys.argv[0]` if a command was called as `starling COMMAND`, not as `COMMAND.py`."""


class PathParser(argparse.ArgumentParser):
    """A parser that refuses words that cannot be paths, before any file is accessed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a word that cannot be a path is a usage error."""
        words = sys.argv[1:] if args is None else list(args)
        problem = impossible(words)
        if problem:
            self.error(problem)
        return super().parse_known_args(words, namespace)


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command whose flags are the settings of its configuration."""

    name: str
    description: str
    examples: str
    config: type[Config]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Flags of other trainers that this command does not have, with the reason."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings, in the order of `--help`."""
        return settings_of(self.config)

    def parser(self) -> CommandParser:
        """Return the parser of the command line."""
        return CommandParser(self)

    def setting_of(self, flag: str) -> Setting | None:
        """Return the setting of a flag, given in any spelling or as an unambiguous prefix; None for any other word."""
        if not flag.startswith("--"):
            return None
        begin = [item for item in self.settings if any(name.startswith(flag) for name in item.flags)]
        exact = [item for item in begin if flag in item.flags]
        return next(iter(exact or (begin if len(begin) == 1 else ())), None)

    def given(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the values that the words [the process's arguments] set, by field; other fields are missing.

        Raises UsageError for an unknown flag, and for a value of the wrong type.
        """
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(self.parser().parse_args(words)).items()
        }


class CommandParser(PathParser):
    """A parser that raises UsageError: one message, with a suggestion for a misspelt flag."""

    def __init__(self, command: Command) -> None:
        super().__init__(
            prog=sys.argv[0] if sys.argv[0].startswith(CONSOLE) else f"{command.name}.py",
            description=command.description,
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        self._command = command
        groups: dict[str, Any] = {}
        for declared in command.settings:
            group = groups.get(declared.heading)
            if group is None:
                group = groups[declared.heading] = self.add_argument_group(declared.heading)
            group.add_argument(*declared.flags, **_options(declared))

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and exiting."""
        flag = next((word.split("=", 1)[0] for word in message.split() if word.startswith("--")), "")
        if flag in self._command.refused and "unrecognized" in message:
            raise UsageError(f"{flag}: {self._command.refused[flag]}")
        hint = suggest(flag, self._option_string_actions) if "unrecognized" in message else ""
        raise UsageError(f"{message}{hint}; see {self.prog} --help")


def _options(declared: Setting) -> dict[str, Any]:
    """Return argparse's options for a setting."""
    options: dict[str, Any] = {"dest": declared.field, "help": help_line(declared).replace("%", "%%")}
    if declared.kind is bool:
        return {**options, "action": "store_true"}
    if declared.kind is not str:
        options["type"] = declared.kind
    if declared.choices:
        options["choices"] = declared.choices
    if declared.metavar:
        options["metavar"] = declared.metavar
    if declared.several:
        options["nargs"] = "+"
    if declared.bare is not MISSING:
        options |= {"nargs": "?", "const": declared.bare}
    return options


def help_line(declared: Setting) -> str:
    """Return the help of a setting with its default."""
    default = f"[{declared.default_words}]" if declared.default_words else ""
    return " ".join(part for part in (declared.help, default) if part)

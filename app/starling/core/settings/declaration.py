"""One declaration per setting, the source of its flag, its check, its help and its row in the docs.

A command's configuration is a frozen dataclass whose fields are made by `setting`. The command line, the check of a
value, shell completion, docs/flags.md and the launcher's check of training arguments all read the declarations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from starling.core.errors import ConfigError

_KEY = "setting"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A rule for one value: `holds` returns whether a value keeps the rule, `problem` describes the rule."""

    holds: Callable[[Any], bool]
    problem: str


def at_least(least: float, words: str = "", *, besides: tuple[Any, ...] = ()) -> Check:
    """Return the rule that a number is at least `least`, or one of `besides`; NaN is refused."""
    return Check(
        holds=lambda value: value >= least or value in besides,
        problem=words or f"must be at least {least}",
    )


UNIT = Check(holds=lambda value: 0 <= value <= 1, problem="must be from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A field's declaration, completed by the field's name and type."""

    field: str
    flags: tuple[str, ...]
    """The spellings on a command line, the field's own first."""
    help: str
    heading: str
    """The heading that `--help` shows the setting under."""
    default: Any
    default_words: str
    """The default in `--help` and the docs; empty: no default is shown."""
    kind: type
    """bool, int, float or str: the type of the value, or of each value of a list."""
    several: bool
    """Whether the flag takes a list of values."""
    choices: tuple[str, ...]
    """The allowed values; empty: any."""
    metavar: str | None
    bare: Any
    """The value that the flag means without a value; MISSING: the flag needs a value."""
    checks: tuple[Check, ...]
    resumable: bool
    """Whether a resumed training may have another value."""

    @property
    def flag(self) -> str:
        """The flag's first spelling."""
        return self.flags[0]

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value that breaks a rule."""
        if self.choices and not self.several and value not in self.choices:
            raise ConfigError(self.flag, value, f"must be one of {', '.join(self.choices)}")
        for rule in self.checks:
            if not rule.holds(value):
                raise ConfigError(self.flag, value, rule.problem)


def setting(
    default: Any,
    help: str,
    *flags: str,
    heading: str | None = None,
    shown: str | None = None,
    metavar: str | None = None,
    bare: Any = MISSING,
    choices: tuple[str, ...] = (),
    check: Check | tuple[Check, ...] = (),
    resumable: bool = False,
) -> Any:
    """Declare a field of a configuration.

    `flags` are spellings besides the field's name with dashes; `heading` begins a part of `--help`, which also contains
    the fields after it; `shown` is the default in words, if the value itself says little; `bare` is the value that the
    flag means without a value.
    """
    declared = {
        "help": help,
        "flags": flags,
        "heading": heading,
        "shown": shown,
        "metavar": metavar,
        "bare": bare,
        "choices": choices,
        "checks": check if isinstance(check, tuple) else (check,),
        "resumable": resumable,
    }
    return field(default=default, metadata={_KEY: declared})


class Config:
    """Base of every configuration: checks each value by its declaration, and then combinations of values."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise UsageError for invalid values, as far as they can be checked without reading files."""
        for declared in settings_of(type(self)):
            declared.check(getattr(self, declared.field))
        self.check_together()

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other."""


def settings_of(config: type) -> tuple[Setting, ...]:
    """Return the declarations of a configuration, in the order of its fields."""
    return _settings_of(config)


@cache
def _settings_of(config: Any) -> tuple[Setting, ...]:
    types = get_type_hints(config)
    made = []
    heading = ""
    for item in fields(config):
        heading = item.metadata[_KEY]["heading"] or heading
        made.append(_made(item, types[item.name], heading))
    return tuple(made)


def _made(item: Field[Any], annotation: Any, heading: str) -> Setting:
    declared = item.metadata[_KEY]
    kind, several, choices = _kind(annotation)
    choices = declared["choices"] or choices
    own = f"--{item.name.replace('_', '-')}"
    flags = declared["flags"]
    if own not in [flag.replace("_", "-") for flag in flags]:
        flags = (own, *flags)
    return Setting(
        field=item.name,
        flags=flags,
        help=declared["help"],
        heading=heading,
        default=item.default,
        default_words=_words(item.default) if declared["shown"] is None else declared["shown"],
        kind=kind,
        several=several,
        choices=choices,
        metavar=declared["metavar"],
        bare=declared["bare"],
        checks=declared["checks"],
        resumable=declared["resumable"],
    )


def _kind(annotation: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Return the type of one value, whether the setting is a list, and the values of a Literal."""
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    if get_origin(annotation) is Literal:
        return str, False, tuple(parts)
    if get_origin(annotation) is tuple:
        kind, _, choices = _kind(parts[0])
        return kind, True, choices
    return _kind(parts[0]) if parts else (annotation, False, ())


def _words(default: Any) -> str:
    """Return a default as written on a command line."""
    if default is None or isinstance(default, bool):
        return ""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "''" if default == "" else str(default)

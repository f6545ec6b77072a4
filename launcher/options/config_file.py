"""Settings from `starling.yaml`: the flags of `up` in a file. Flags win over variables, variables over the file.

The keys are the names of click's parameters, so a new flag is a new key. Values enter through click's default map and
are checked like flags; the file can express nothing that a command line cannot.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from launcher.options.completion import ReplicaName
from starling.core.errors import UsageError, suggest
from starling.core.paths import at_home
from starling.core.words import shown

if TYPE_CHECKING:
    from starling.core.plain_yaml import Value

NAME = "starling.yaml"
TRAIN = "train"
"""The key of the training arguments, the only key that is no flag."""

SHARED = frozenset({"engine", "runs", "host", "image"})
"""Parameters that every command takes from the file; only `up` takes the others."""

_EXCLUSIVE = (("gpus", "cpus"),)
"""Pairs of parameters: if the command line gives one, the file's value of the other is ignored."""

_GIVEN, _SETTINGS = f"{__name__}.given", f"{__name__}.settings"


class FileSettings(NamedTuple):
    """The checked contents of a file: values by click's parameter names, and the training arguments as words."""

    path: Path
    values: Mapping[str, Any]
    train: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder that the file's relative paths start at."""
        return self.path.parent


class ConfiguredCommand(click.Command):
    """A command that takes missing flags from the file of settings, and completes names."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if any(param.name == "runs" for param in self.params):
            self.params.append(_file_option(self.params))
        for param in self.params:
            if isinstance(param, click.Argument) and param.name in ("name", "names"):
                param.type = ReplicaName()

    def make_parser(self, ctx: click.Context) -> Any:
        """Make click's parser, with a `--no-X` for each flag X of `up`, which overrides `X: true` in the file."""
        parser = super().make_parser(ctx)
        for option in keys_of(self).values() if self.name == "up" else ():
            if option.is_bool_flag and not option.secondary_opts:
                names = [f"--no-{name[2:]}" for name in option.opts if name.startswith("--")]
                parser.add_option(obj=option, opts=names, dest=option.name, action="store_const", const=False)
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words, and add the file's settings."""
        rest = super().parse_args(ctx, args)
        settings = ctx.meta.get(_SETTINGS)
        if settings is not None and not ctx.resilient_parsing:
            _complete(ctx, settings)
        return rest


def root_option(command: Any) -> Any:
    """Add `-f FILE` to the group, for all commands."""

    def keep(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
        ctx.meta[_GIVEN] = value

    return click.option(
        "-f",
        "--file",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=keep,
        help=f"The file of settings [{NAME}, if it exists].",
    )(command)


def _file_option(others: Sequence[click.Parameter]) -> click.Option:
    taken = {name for param in others for name in param.opts}
    return click.Option(
        ["--file"] if "-f" in taken else ["-f", "--file"],
        type=click.Path(path_type=Path),
        is_eager=True,  # parsed before the parameters whose values it holds
        expose_value=False,
        callback=_load,
        help=f"The file of settings [{NAME}, if it exists].",
    )


def _load(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    path = value or ctx.meta.get(_GIVEN) or _found(Path(NAME))
    if path is None:
        return
    up = _up(ctx)
    if up is None:
        return
    settings = read_settings(Path(os.path.abspath(at_home(path))), up)
    ctx.meta[_SETTINGS] = settings
    wanted = keys_of(ctx.command).values()
    names = {option.name for option in wanted} if ctx.command is up else SHARED
    ctx.default_map = {name: value for name, value in settings.values.items() if name in names}


def _up(ctx: click.Context) -> click.Command | None:
    root = ctx.find_root()
    return root.command.get_command(root, "up") if isinstance(root.command, click.Group) else None


def _found(path: Path) -> Path | None:
    """Return the file in the working directory, or None; raises UsageError if another user owns the file."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    from launcher.hosts.processes import caller_ids

    if owner not in (0, os.getuid(), caller_ids()[0]):
        raise UsageError(
            f"{path}: belongs to another user (uid {owner}), who would decide what you start; "
            f"read it, and name it if you trust it: -f {path}"
        )
    return path


def keys_of(command: click.Command) -> dict[str, click.Option]:
    """Return the keys of the file for the flags of `command`: the flags' names without the dashes."""
    keys: dict[str, click.Option] = {}
    for param in command.params:
        if isinstance(param, click.Option) and param.name != "file":
            name = next((name for name in param.opts if name.startswith("--")), None)
            if name is not None:
                keys[name[2:]] = param
    return keys


def read_settings(path: Path, up: click.Command) -> FileSettings:
    """Return the contents of the file, checked against the flags of `up`; relative paths start at the file's folder.

    Raises UsageError with file and line for an unknown key, with a suggestion, or for a value that its flag rejects.
    """
    keys = keys_of(up)
    values: dict[str, Any] = {}
    train: tuple[str, ...] = ()
    for key, value in read_mapping(path).items():
        at = f"{path}:{value.line}"
        option = keys.get(key) or keys.get(key.replace("_", "-"))
        if key == TRAIN:
            train = _train_words(value, f"{at}: {TRAIN}")
        elif option is None or option.name is None:
            known = [*keys, TRAIN]
            hint = suggest(key, known) or f"; the keys are {', '.join(sorted(known))}"
            raise UsageError(f"{at}: unknown key {key!r}{hint}")
        elif option.name in values:
            raise UsageError(f"{at}: {key} sets the same flag as another key; keep one of them")
        elif not value.empty:
            values[option.name] = _flag_value(option, key, value, at)
    return FileSettings(path=path, values=values, train=train)


def read_mapping(path: Path) -> dict[str, Value]:
    """Return the mapping in a YAML file; an empty mapping for a file of comments only.

    Raises UsageError with file and line for a file that cannot be read or is too large, for anything but one
    document with a mapping, and for tags, anchors, aliases and duplicate keys.
    """
    from starling.core.budget import BudgetExceeded
    from starling.core.files.regular import read_regular
    from starling.core.plain_yaml import MOST_BYTES, NotYaml, OtherYaml, written_mapping
    from starling.core.words import printable

    try:
        return written_mapping(read_regular(path, MOST_BYTES), path)
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: cannot be read, or is not a file ({error.strerror}); give a YAML file"
        ) from None
    except BudgetExceeded:
        raise UsageError(
            f"{path}: over {MOST_BYTES // 1024} KiB, so no file of settings; check the path"
        ) from None
    except NotYaml as error:
        what = "" if isinstance(error, OtherYaml) else "not valid YAML: "
        raise UsageError(f"{path}{error.place}: {what}{error.problem}") from None


def _flag_value(option: click.Option, key: str, value: Value, at: str) -> Any:
    """Return the value for click's default map; raises UsageError if the flag rejects the value."""
    if option.is_bool_flag:
        if value.boolean is None:
            raise UsageError(f"{at}: {key}: must be true or false, found {shown(value.text or value.kind)!r}")
        return value.boolean
    if option.multiple:
        words = _texts(value, f"{at}: {key}", f"write a list: {key}: [one, two]")
    elif option.metavar == "LIST" and value.items is not None:
        words = [",".join(_texts(value, f"{at}: {key}", f"write {key}: 0,2-4"))]
    elif value.text is None:
        raise UsageError(f"{at}: {key}: takes one value, found {value.kind}; write {key}: VALUE")
    else:
        words = [value.text]
    for word in words:
        if option.name == "env_names" and "=" in word:
            raise UsageError(
                f"{at}: {key}: {word.split('=', 1)[0]}=…: names only; export the variable, or keep it in a file that "
                "`env-file` names"
            )
        with _told_at(f"{at}: {key}"):
            option.type.convert(word, option, None)
    return words if option.multiple else words[0]


@contextlib.contextmanager
def _told_at(where: str) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        raise UsageError(f"{where}: {error.message}") from None


def _texts(value: Value, where: str, remedy: str) -> list[str]:
    """Return a list of texts; a single text becomes a list with one element."""
    items = (value,) if value.items is None else value.items
    if any(item.text is None for item in items):
        raise UsageError(f"{where}: found {value.kind}, but one of plain values is needed; {remedy}")
    return [item.text or "" for item in items]


def _train_words(value: Value, where: str) -> tuple[str, ...]:
    """Return training arguments as words, from a mapping of flags, a list of words, or a line of words."""
    if value.empty:
        return ()
    if value.text is not None:
        try:
            return tuple(shlex.split(value.text))
        except ValueError as error:
            raise UsageError(f"{where}: {error}; balance the quotes, or write a mapping") from None
    if value.items is not None:
        return tuple(_texts(value, where, f"write {TRAIN}: [--epochs, 10]"))
    words: list[str] = []
    for key, item in (value.fields or {}).items():
        flag = _training_flag(key, f"{where}.{key}")
        if item.empty or item.boolean is False:
            continue
        if item.boolean:
            words.append(flag)
            continue
        texts = _texts(item, f"{where}.{key}", f"write {key}: VALUE, or {key}: [ONE, TWO]")
        # `--flag=-x`: a separate value with a dash would be read as a flag.
        dashed = len(texts) == 1 and texts[0].startswith("-")
        words += [f"{flag}={texts[0]}"] if dashed else [flag, *texts]
    return tuple(words)


def _training_flag(key: str, where: str) -> str:
    """Return the flag of `train.py` for a key; raises UsageError if there is none."""
    from starling.core.settings.train import COMMAND

    name = key.removeprefix("--")
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        if COMMAND.setting_of(flag) is not None:
            return flag
    known = [spelling.removeprefix("--") for declared in COMMAND.settings for spelling in declared.flags]
    raise UsageError(
        f"{where}: no setting of a training is called {key!r}{suggest(name, known)}; see train.py --help"
    )


def _complete(ctx: click.Context, settings: FileSettings) -> None:
    """Make the file's relative paths absolute, and put its training arguments before the typed arguments."""
    from launcher.hosts.address import is_behind_ssh
    from launcher.options.training_words import relative_to, without_overridden

    def from_file(name: str | None) -> bool:
        return name is not None and ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP

    elsewhere = ctx.params.get("engine") == "docker" and is_behind_ssh(ctx.params.get("host"))
    for param in ctx.command.params:
        here = not (elsewhere and param.name == "runs")
        if isinstance(param.type, click.Path) and from_file(param.name) and here:
            ctx.params[param.name] = _absolute(ctx.params[param.name], settings.folder)
    for pair in _EXCLUSIVE:
        for one, other in (pair, pair[::-1]):
            if from_file(other) and ctx.get_parameter_source(one) is ParameterSource.COMMANDLINE:
                ctx.params[other] = None
    if "training_args" in ctx.params:
        click.echo(f"settings: {settings.path}", err=True)
        words = settings.train if elsewhere else relative_to(settings.train, settings.folder)
        typed = ctx.params["training_args"]
        ctx.params["training_args"] = (*without_overridden(words, typed), *typed)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_absolute(item, folder) for item in value)
    return value if value is None else folder / at_home(value)

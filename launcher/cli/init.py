"""`launcher init`: write a file of settings that lists every key, for editing by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from launcher.options.config_file import NAME, TRAIN, keys_of
from starling.core.errors import UsageError

_EXAMPLES = {
    "gpus": "all",
    "cpu": "2",
    "memory": "20g",
    "shm": "1g",
    "user": '"1000:1000"',
    "env": "[WANDB_MODE]",
    "env-file": "[secrets.env]",
    "host": "ssh://me@gpu-machine",
}
"""Example values for keys that have no default and whose type alone says too little."""

_HEAD = """\
# Settings of `launcher`, read from the folder that it is called in, or from `launcher -f FILE COMMAND`.
# Flags win over variables, variables over this file. Relative paths start at this file's folder.
# Each key is the flag of the same name; `launcher up --help` and docs/configure.md say more. No secrets here: `env`
# names variables, `env-file` a file that holds them.
"""

_TRAIN = f"""\

# What every replica trains: the flags of train.py without their dashes. `true` stands for a flag without a value, a
# list for several values. Words after `--` on the command line win over these.
{TRAIN}:
  data: bccd.yaml           # a dataset's YAML; this one comes with the trainer
  weights: ''               # from scratch; or a checkpoint, such as yolov5s.pt
  cfg: yolov5n.yaml
  img: 320
  epochs: 10
  batch: 16
  project: blood
  name: search
  evolve: 60                # trainings of the search, in all; leave it out to train once
"""


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path(NAME))
@click.pass_context
def init(ctx: click.Context, file: Path) -> None:
    """Write a commented FILE of settings [starling.yaml] with every key; `-` prints it.

    An existing file is never overwritten.
    """
    root = ctx.find_root()
    up = root.command.get_command(root, "up") if isinstance(root.command, click.Group) else None
    assert up is not None
    text = "\n".join([_HEAD, *_keys(up)]) + _TRAIN
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "w") as written:
            written.write(text)
    except FileExistsError:
        raise UsageError(
            f"{file}: exists already and is not overwritten; name another file: launcher init FILE"
        ) from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); check the folder") from None
    click.echo(
        f"wrote {file}; change it, see what it would start with `launcher up --dry-run`, then `launcher up`"
    )


def _keys(up: click.Command) -> Iterator[str]:
    for key, option in keys_of(up).items():
        yield f"# {' '.join((option.help or key).split())}"
        yield f"#{key}: {example(key, option)}\n"


def example(key: str, option: click.Option) -> str:
    """Return an example value for a key: its default if it has one, else a value of its type."""
    if key in _EXAMPLES:
        return _EXAMPLES[key]
    if option.is_bool_flag:
        return "false"
    if isinstance(option.default, (str, int, float, Path)):
        return str(option.default)
    kind = option.type
    if isinstance(kind, click.Choice):
        text = str(next(iter(kind.choices)))
    elif isinstance(kind, (click.types.IntParamType, click.types.FloatParamType)):
        text = str(getattr(kind, "min", None) or 1)
    else:
        text = option.metavar or "VALUE"
    return f"[{text}]" if option.multiple else text

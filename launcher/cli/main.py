"""The `launcher` command: parse the arguments, run one command, return its exit code.

Each command imports what it needs when it runs, which keeps `--help` fast.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from launcher.console import drop_output
from launcher.errors import disk_full
from launcher.options.config_file import root_option
from starling.core.errors import StarlingError, UsageError
from starling.core.package import VERSION
from starling.core.paths import impossible, lost_folder
from starling.core.words import shown

EXIT_CODES = """\b
Exit codes: 0 done; 1 `status` with no replica, or one that failed; 2 usage;
3 data; 4 checkpoint; 5 engine; 6 disk full; 7 GPU lost; 130 interrupted."""

COMMANDS = (
    "attach", "clean", "completion", "doctor", "init", "kill", "kill-all", "logs", "status", "stop", "track", "up",
)  # fmt: skip
"""Each name is a module of this folder, with `_` for `-`; the module holds a command of that name."""

_PROGRAM: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Launcher(click.Group):
    """The group of commands; a command's module is imported when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in alphabetical order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            name = cmd_name.replace("-", "_")
            self.add_command(getattr(importlib.import_module(f"launcher.cli.{name}"), name), cmd_name)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Launcher, context_settings=_PROGRAM, epilog=EXIT_CODES)
@root_option
@click.version_option(VERSION, prog_name="launcher")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Start one trainer on every device of this machine, watch them, and end them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a StarlingError becomes one message and its exit code, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        problem = impossible(words)
        if problem:
            raise UsageError(problem)
        code = cli.main(args=words, prog_name="launcher", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StarlingError as error:
        if "--debug" in words[:1]:
            raise
        # A name on the command line need not be UTF-8, and stderr may not encode it.
        click.echo(f"error: {error}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        drop_output()  # the reader (`head`) has closed the pipe
        sys.exit(0)
    except OSError as error:
        full: StarlingError | None = disk_full(error)
        if error.errno == errno.ENAMETOOLONG:
            full = UsageError(f"{shown(error.filename)}: {error.strerror}")
        elif problem := lost_folder():
            full = UsageError(problem)
        if full is None or "--debug" in words[:1]:
            raise
        click.echo(f"error: {full}", err=True)
        sys.exit(full.exit_code)

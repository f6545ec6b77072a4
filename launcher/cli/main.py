"""The `launcher` command. Arguments in, one call, an exit code out.

Everything but click is imported where it is needed, so that `--help` is quick.
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
"""Each is a module of this folder that holds a command of its name, with `_` for `-`."""

_PROGRAM: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Launcher(click.Group):
    """The commands, each imported when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of the alphabet."""
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
    """Run the command line; every error made on purpose is one message and its exit code."""
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
        # A name on the command line need not be UTF-8, and not every stream takes it then.
        click.echo(f"error: {error}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        drop_output()  # the reader (`head`) has gone
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

"""Run a command in the way common to all commands: one message per error, its exit code, a traceback on request."""

from __future__ import annotations

import errno
import getpass
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from starling.core.errors import StarlingError, UsageError
from starling.core.files.refusals import refusal
from starling.core.paths import lost_folder
from starling.core.words import shown
from starling.errors import is_out_of_memory, print_error

Parsed = TypeVar("Parsed")


def say_error(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print one line to stderr; among processes that train together, only rank 0 prints."""
    if speaks(environment):
        print_error(line, environment)


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints for all processes that train together: a single process, or rank 0."""
    return _alone(environment) or environment.get("RANK", "0") == "0"


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    Of several processes that train together, each skips the shutdown of the interpreter: torch's threads may
    still use the interpreter, and would abort a process that has done its work.
    """
    if _alone(os.environ):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _alone(environment: Mapping[str, str]) -> bool:
    return int(environment.get("WORLD_SIZE") or 1) < 2


def run_command(
    parse: Callable[[], Parsed],
    run: Callable[[Parsed], None],
    debug: Callable[[Parsed], bool],
    failed: Callable[[BaseException], None] = lambda error: None,
) -> int:
    """Parse, run the result, and return the exit code: 0, or the error's; unexpected exceptions keep their tracebacks.

    `debug` decides for the parsed value whether errors show tracebacks; `failed` gets every error, but not a stop.
    """
    _show_any_name()
    _have_a_name()
    try:
        if problem := lost_folder():
            raise UsageError(problem)
        parsed = parse()
    except StarlingError as error:
        failed(error)
        say_error(f"error: {error}")
        return error.exit_code
    except OSError as error:
        return _say_os_error(error)
    return _run(lambda: run(parsed), debug(parsed), failed)


def _show_any_name() -> None:
    """Allow file names that are not valid text to be printed, with bytes as `\\udcff`, which JSON can read too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _have_a_name() -> None:
    """Set a user name for a user that the system knows only by number (`docker run --user`, no directory server).

    torch names a cache after its user, and fails without a user name.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def _run(body: Callable[[], None], debug: bool, failed: Callable[[BaseException], None]) -> int:
    try:
        try:
            body()
        except Exception as error:
            if not (isinstance(error, StarlingError) and error.exit_code >= 128):
                failed(error)
            raise
    except StarlingError as error:
        if debug:
            traceback.print_exc()
        say_error(f"error: {error}" if error.exit_code < 128 else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
    except OSError as error:
        if debug:
            traceback.print_exc()
        return _say_os_error(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print_error(
            f"error: out of memory ({error}); lower --batch or --imgsz, take fewer --workers, or --cache off"
        )
        return 1
    return 0


_WRONG_KIND = "; look at what is there, move it away, or give another path"
_MISPLACED = {
    errno.ENAMETOOLONG: "",
    errno.ENOTDIR: _WRONG_KIND,
    errno.EISDIR: _WRONG_KIND,
    errno.EEXIST: _WRONG_KIND,
    errno.ELOOP: _WRONG_KIND,
}
"""Errors of a path that count as wrong usage, and the remedy."""


def _say_os_error(error: OSError) -> int:
    """Print the system's message, and the remedy if the path is wrong; return the exit code."""
    refused = refusal(error)
    where = f"{shown(error.filename)}: " if error.filename else ""
    remedy = _MISPLACED.get(error.errno or 0, "")
    print_error(f"error: {refused or f'{where}{error.strerror or error}{remedy}'}")
    if refused:
        return refused.exit_code
    return UsageError.exit_code if error.errno in _MISPLACED else 1

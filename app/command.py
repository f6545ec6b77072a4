"""Run a command the way all of them behave: one message for an error, its exit code, a traceback if asked for."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from app.errors import StarlingError


def run_command(body: Callable[[], None], *, debug: bool = False) -> int:
    """Run `body` and return the exit code: 0, or the error's; a bug keeps its traceback."""
    try:
        body()
    except StarlingError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}" if error.exit_code < 128 else str(error), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr, flush=True)
        return 1
    except MemoryError as error:
        if debug:
            traceback.print_exc()
        print(f"error: out of memory ({error}); lower --batch or --imgsz, or --cache off", file=sys.stderr)
        return 1
    return 0

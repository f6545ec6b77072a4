"""The `launcher` command as a process: `python -m launcher`, and what pip installs under its name."""

from __future__ import annotations

import gc

# A command lives for a moment: a quarter of it would go into looking for garbage among its own modules.
gc.set_threshold(50_000)

import atexit  # noqa: E402
import contextlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from launcher.cli.main import main  # noqa: E402


def run() -> None:
    """Run the command and end the process, without taking the interpreter apart: that is a tenth of `kill-all`."""
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the reader (`head`) has gone
                stream.flush()
        os._exit(end.code)


if __name__ == "__main__":
    run()

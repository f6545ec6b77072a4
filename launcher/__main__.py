"""The entry point of the `launcher` command: `python -m launcher`, and the script that pip installs."""

from __future__ import annotations

import gc

# A command is short: the default threshold spends a quarter of its time on garbage collection during imports.
gc.set_threshold(50_000)

import atexit  # noqa: E402
import contextlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from launcher.cli.main import main  # noqa: E402


def run() -> None:
    """Run the command and end the process without the interpreter's cleanup, which takes a tenth of `kill-all`."""
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the reader (`head`) has closed the pipe
                stream.flush()
        os._exit(end.code)


if __name__ == "__main__":
    run()

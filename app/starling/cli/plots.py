"""`starling plots runs/train/exp runs/train/exp2`: draw the progress of several runs in one plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from starling.core.errors import StarlingError, UsageError
from starling.core.files.refusals import refusal
from starling.core.settings.parser import PathParser

DEFAULT_OUT = Path("results_overlay.png")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `starling plots`."""
    parser = PathParser(prog="starling plots", description="Draw the progress of several runs in one plot.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a results.csv")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="PNG", help="image file to write [%(default)s, here]"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plot, print its path, and return the exit code."""
    given = build_parser().parse_args(arguments)
    try:
        if given.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UsageError(f"--out {given.out}: a plot is written as .png or .jpg")
        from starling.plots.overlay import plot_results_overlay

        plot_results_overlay(given.runs, given.out)
    except StarlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        refused = refusal(error, given.out)
        words = refused or f"{error.filename or given.out}: {error.strerror or error}"
        print(f"error: {words}", file=sys.stderr)
        return refused.exit_code if refused else 1
    print(given.out.absolute())
    return 0

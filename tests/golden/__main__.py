"""Run every golden check on a folder of vectors: `python -m tests.golden DIR`.

Prints one line for each check; exits with 0 where all pass, 1 where one fails, 2 for a wrong command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.checks import collect


def main(arguments: Sequence[str]) -> int:
    """Check the folder named by the one argument, by default the vectors kept beside this file."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m tests.golden [DIR]", file=sys.stderr)
        return 2
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "vectors"
    if not folder.is_dir():
        print(f"{folder}: no such folder", file=sys.stderr)
        return 2
    passed = failed = 0
    for check in collect(folder):
        try:
            print(f"ok    {check.name}: {check.run()}", flush=True)
            passed += 1
        except Exception as error:
            failed += 1
            reason = " ".join(str(error).split())
            print(f"FAIL  {check.name}: {reason or type(error).__name__}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

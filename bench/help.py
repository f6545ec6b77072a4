"""The cost of `--help` of every command, as a ratio to `import click` in the same run.

    python bench/help.py                # in an environment after `pip install .` or scripts/test
    python bench/help.py --rounds 15

The cost is the processor time (user and system) of a fresh process, the median of the rounds; the commands and the
import take turns.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "app")]

from launcher.cli.main import COMMANDS as LAUNCHER_COMMANDS  # noqa: E402
from starling.__main__ import COMMANDS  # noqa: E402

BINARIES = Path(sys.executable).parent
BAR = 2.5


def processor_s(command: list[str]) -> float:
    """Return the processor seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure, and print a line for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    commands = {
        f"launcher {name}": [str(BINARIES / "launcher"), name, "--help"] for name in LAUNCHER_COMMANDS
    }
    commands |= {f"starling {name}": [str(BINARIES / "starling"), name, "--help"] for name in COMMANDS}
    commands["import click"] = [sys.executable, "-c", "import click"]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):  # the first round fills caches
        for name, command in commands.items():
            took = processor_s(command)
            if turn:
                seconds[name].append(took)
    click_s = statistics.median(seconds.pop("import click"))
    print(f"import click {click_s:.3f} s of processor time")
    for name, taken in seconds.items():
        ratio = statistics.median(taken) / click_s
        print(f"{name:<22} {ratio:5.2f}  {'at most' if ratio <= BAR else 'MORE THAN'} {BAR}")


if __name__ == "__main__":
    main()

"""The console command `starling`, also as `python -m starling`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from starling import __version__
from starling.core.errors import closest
from starling.core.settings.parser import CONSOLE

COMMANDS = {
    "train": "train a detector, or search its hyperparameters (train.py)",
    "val": "measure a detector on labelled images (val.py)",
    "detect": "find objects in images, films and streams (detect.py)",
    "export": "write a detector as ONNX, TorchScript or another format (export.py)",
    "hpo": "search over clones of a ClearML task (hpo.py)",
    "search": "show a search, write its report, import older results, repair its journal",
    "data": "download, convert and version datasets; list the cache",
    "plots": "draw the progress of several runs in one plot",
    "track": "show MLflow's page, and send what a tracking server missed",
    "settings": "show or change settings for all commands",
    "completion": "print the completion script for bash, zsh or fish",
}
"""Each command, a module of the same name in `starling.cli`, with its line in the help."""

EXAMPLES = """\
  starling train --data my.yaml --weights yolov5s.pt --epochs 100
  starling train --data my.yaml --weights yolov5s.pt --epochs 10 --evolve 60
  starling val --weights runs/train/exp/weights/best.pt --data my.yaml
  starling detect --weights runs/train/exp/weights/best.pt --source images/
  starling search show runs/evolve/exp
  starling data download coco128.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first word, and return its exit code."""
    if asked := os.environ.get("_STARLING_COMPLETE"):
        from starling.cli.completion import answer

        return answer(asked, tuple(COMMANDS))
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"starling {__version__}")
        return 0
    if name not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"; did you mean {near}?" if near else f"; commands: {', '.join(COMMANDS)}"
        print(f"starling: no command {name!r}{hint}", file=sys.stderr)
        return 2
    sys.argv = [f"{CONSOLE}{name}", *words[1:]]
    try:
        code: int = import_module(f"starling.cli.{name}").main(words[1:])
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("starling", "launcher"):
            raise
        remedy = "the launcher's installation does not include the trainer's packages: pip install -r requirements.txt"
        print(f"starling {name}: needs {error.name}, which is not installed; {remedy}", file=sys.stderr)
        return 2
    return code


def run() -> None:
    """Run the command and end the process; the entry point of pip's script `starling`."""
    from starling.cli.command import leave

    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`head`) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    leave(code)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items())
    return (
        "usage: starling COMMAND [options]\n\n"
        "Train YOLOv5-family detectors, search their hyperparameters, and track both.\n\n"
        f"commands:\n{rows}\n\nexamples:\n{EXAMPLES}\n\n"
        "`starling COMMAND --help` shows a command's options. `launcher` starts trainings on every GPU of a machine."
    )


if __name__ == "__main__":
    run()

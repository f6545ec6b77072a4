"""Find objects in images, videos and streams: `python detect.py --help`."""

from __future__ import annotations

from starling.cli.command import run_command
from starling.core.settings.detect import DetectConfig, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, detect, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: DetectConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from starling.prediction.detecting import detect
    from starling.progress import Progress, on_console

    with on_console(Progress()):
        detect(config)

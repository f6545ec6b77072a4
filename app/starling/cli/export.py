"""Write a detector as TorchScript and ONNX: `python export.py --help`."""

from __future__ import annotations

from starling.cli.command import run_command
from starling.core.settings.export import ExportConfig, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, export, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: ExportConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from starling.export.exporter import export
    from starling.progress import Progress, on_console

    with on_console(Progress()):
        export(config)

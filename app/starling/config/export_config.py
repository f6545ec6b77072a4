"""What one `export.py` command asks for: parsed once, checked, frozen; and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.config.flags import CommandParser, Flag
from starling.config.sides import check_sides
from starling.errors import ConfigError

FORMATS = ("torchscript", "onnx")
OPSETS = (12, 20)
"""First and last version of ONNX's operators that the exporter is held to."""

EXAMPLES = """\
examples:
  both formats, beside the weights
      python export.py --weights runs/train/exp/weights/best.pt
  one ONNX file for pictures of any size and batches of any length
      python export.py --weights best.pt --include onnx --dynamic
  what a phone runs: small and of a fixed size
      python export.py --weights best.pt --include onnx --imgsz 320 --opset 13
"""

REFUSED = {
    "--simplify": "nothing is left to simplify: normalisation and constants are folded already; leave the flag out",
    "--optimize": "TorchScript is written as it is; leave the flag out",
    "--int8": "quantisation is not available; quantise best.onnx with the target's own tool",
    "--nms": "suppression is not part of the file; docs/export.md says what to do with its output",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """One export of one detector. Field by field the flags of `export.py`."""

    weights: str = "yolov5s.pt"
    """Weights to export; the outputs lie beside them."""
    imgsz: tuple[int, ...] = (640,)
    """Side in pixels, or height and width; rounded up to the stride."""
    batch_size: int = 1
    """Images in one call."""
    include: tuple[str, ...] = FORMATS
    """Formats to write."""
    dynamic: bool = False
    """ONNX takes any batch, height and width."""
    opset: int = 17
    """Version of ONNX's operators."""
    half: bool = False
    """float16 weights; needs a GPU."""
    device: str = "cpu"
    """`cpu`, or a GPU's number."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a file."""
        if not self.weights:
            raise ConfigError("--weights", self.weights, "give the path of a .pt file")
        check_sides(self.imgsz)
        if self.batch_size < 1:
            raise ConfigError("--batch-size", self.batch_size, "must be at least 1")
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise ConfigError("--opset", self.opset, f"must be from {OPSETS[0]} to {OPSETS[1]}")
        if self.half and self.device.strip().lower() == "cpu":
            raise ConfigError(
                "--half", self.half, "float16 is exported on a GPU: add --device 0, or leave --half out"
            )
        if self.half and self.dynamic:
            raise ConfigError("--half", self.half, "does not go with --dynamic; leave one out")

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width asked for."""
        return self.imgsz[0], self.imgsz[-1]


FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to export": (
        Flag("--weights", help="weights to export [%(default)s]"),
        Flag("--include", nargs="+", choices=FORMATS, help="formats [torchscript onnx]"),
        Flag(
            "--imgsz",
            "--img",
            "--img-size",
            nargs="+",
            type=int,
            metavar="PIXELS",
            help="one side, or height and width; rounded up to the stride [640]",
        ),
        Flag("--batch-size", "--batch", help="images in one call [%(default)s]"),
        Flag("--dynamic", help="ONNX takes any batch, height and width"),
        Flag("--opset", metavar="N", help="version of ONNX's operators, 12 to 20 [%(default)s]"),
        Flag("--half", help="float16 weights; needs a GPU"),
        Flag("--device", help="cpu, or a GPU's number [%(default)s]"),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> CommandParser:
    """Return the parser of `export.py`."""
    return CommandParser.of(
        "export.py",
        "Write a detector as TorchScript and ONNX, checked against the original.",
        EXAMPLES,
        FLAGS,
        ExportConfig(),
        REFUSED,
    )


def parse_args(argv: Sequence[str] | None = None) -> ExportConfig:
    """Return what the command line asks for; raises UsageError for what cannot work."""
    return ExportConfig(**build_parser().parse_given(argv, ExportConfig))

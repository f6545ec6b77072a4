"""The configuration of an `export.py` command: parsed once, checked, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from starling.core.errors import ConfigError
from starling.core.settings.declaration import Check, Config, at_least, setting
from starling.core.settings.parser import Command
from starling.core.settings.values import check_sides

Format = Literal["torchscript", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
OPSETS = (12, 20)
"""The first and the last supported version of ONNX's operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Config):
    """One export of one detector; the outputs are written beside its weights."""

    weights: str = setting(
        "yolov5s.pt", "weights to export; the files are written beside them", heading="what to export"
    )
    include: tuple[Format, ...] = setting(FORMATS, "formats: torchscript, onnx")
    imgsz: tuple[int, ...] = setting(
        (640,),
        "one side, or height and width; rounded up to the stride",
        "--imgsz",
        "--img",
        "--img-size",
        metavar="PIXELS",
    )
    batch_size: int = setting(1, "images in one call", "--batch-size", "--batch", check=at_least(1))
    dynamic: bool = setting(
        False, "ONNX takes any batch, and any height and width in whole strides; TorchScript stays fixed"
    )
    opset: int = setting(
        17,
        f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[1]}; older runtimes need a lower one",
        metavar="N",
        check=Check(
            holds=lambda version: OPSETS[0] <= version <= OPSETS[1],
            problem=f"must be from {OPSETS[0]} to {OPSETS[1]}",
        ),
    )
    half: bool = setting(False, "float16 weights and input; needs a GPU")
    device: str = setting("cpu", "cpu, or a GPU's number")
    debug: bool = setting(False, "show tracebacks")

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other."""
        if not self.weights:
            raise ConfigError("--weights", self.weights, "give the path of a .pt file")
        check_sides(self.imgsz)
        if self.half and self.device.strip().lower() == "cpu":
            raise ConfigError(
                "--half", self.half, "float16 is exported on a GPU: add --device 0, or leave --half out"
            )
        if self.half and self.dynamic:
            raise ConfigError("--half", self.half, "does not go with --dynamic; leave one out")

    @property
    def size_hw(self) -> tuple[int, int]:
        """The height and width from --imgsz."""
        return self.imgsz[0], self.imgsz[-1]


COMMAND = Command(
    name="export",
    description="Write a detector as TorchScript and ONNX, checked against the original.",
    config=ExportConfig,
    refused={
        "--simplify": "nothing is left to simplify: normalisation and constants are folded already; leave the flag out",
        "--optimize": "TorchScript is written without optimisation; leave the flag out",
        "--int8": "quantisation is not available; quantise best.onnx with the target's own tool",
        "--nms": "NMS is not part of the file; docs/export.md says what to do with its output",
    },
    examples="""\
  both formats, beside the weights
      python export.py --weights runs/train/exp/weights/best.pt
  one ONNX file for images of any size and batches of any length
      python export.py --weights best.pt --include onnx --dynamic
  for a phone: small and of a fixed size
      python export.py --weights best.pt --include onnx --imgsz 320 --opset 13
""",
)


def parse_args(argv: Sequence[str] | None = None) -> ExportConfig:
    """Return the configuration from the command line; raises UsageError for invalid values."""
    return ExportConfig(**COMMAND.given(argv))

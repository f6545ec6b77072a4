"""`--compile`: the model as one compiled program, on GPUs replayed as a CUDA graph; as it is where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from starling.device import Compute

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor], Any]


class CompiledForward:
    """Call a model compiled for images of one shape; other shapes, such as an epoch's last batch, go as they are.

    Compiling happens at the first call and takes from half a minute to some minutes. Where it fails, for want of a
    compiler say, the model goes on as it is, and that is said once.
    """

    def __init__(self, forward: Forward, compute: Compute) -> None:
        """`forward` takes [B,3,H,W] images."""
        self._plain = forward
        # On GPUs a step is thousands of launches; a CUDA graph makes them one.
        mode = None if compute.on_cpu else "reduce-overhead"
        self._compiled: Forward | None = torch.compile(forward, dynamic=False, mode=mode)
        self._shape: torch.Size | None = None

    def __call__(self, images: Tensor) -> Any:
        """Return what the model returns."""
        if self._compiled is None or (self._shape is not None and images.shape != self._shape):
            return self._plain(images)
        if self._shape is not None:
            return self._compiled(images)
        logger.info("--compile: compiling the model for its first batch; this can take minutes")
        try:
            raw = self._compiled(images)
        except _compiler_errors() as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            logger.warning(
                f"--compile: going on without, as the model cannot be compiled here ({reason}); "
                "it needs a C++ compiler (g++) on the path"
            )
            self._compiled = None
            return self._plain(images)
        self._shape = images.shape
        return raw


def _compiler_errors() -> tuple[type[Exception], ...]:
    """Return what torch raises where it cannot compile; not what the model itself raises."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return TorchDynamoException, CppCompileError

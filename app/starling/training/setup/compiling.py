"""`--compile`: compile the model, and on GPUs replay it as a CUDA graph; if compiling fails, run it uncompiled."""

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
    """Call a model compiled for one image shape; other shapes, such as an epoch's last batch, run uncompiled.

    The first call compiles, which takes from half a minute to some minutes. If compiling fails, for example without a
    C++ compiler, the model runs uncompiled, and one line says so.
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
    """Return the exceptions that torch raises if it cannot compile; exceptions of the model are not among them."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return TorchDynamoException, CppCompileError

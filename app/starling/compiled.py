"""Functions that Numba compiles for the host's cores: its machine code is kept where it can be, and made anew elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile the function below at its first call; other threads run on meanwhile, and while it runs.

    The code is kept beside the module or in the user's cache. Where neither can be written (a read-only home), Numba
    refuses to keep it, and each process compiles for itself, in about two seconds.
    """

    def decorate(function: Function) -> Function:
        try:
            kept: Function = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            kept = njit(nogil=True, **options)(function)
        return kept

    return decorate

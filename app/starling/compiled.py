"""Compile functions with Numba for the host's cores; the machine code is stored if the disk allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Return a decorator that compiles a function at its first call; the compiled function releases the GIL.

    The code is stored beside the module or in the user's cache. If neither can be written (a read-only home), Numba
    refuses to store it, and each process compiles again, in about two seconds.
    """

    def decorate(function: Function) -> Function:
        try:
            kept: Function = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            kept = njit(nogil=True, **options)(function)
        return kept

    return decorate

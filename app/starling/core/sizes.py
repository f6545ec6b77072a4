"""Parse and format amounts of memory and sets of cores in Docker's notation: `20g` is 20 x 1024^3 bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starling.core.errors import UsageError

MIB = 1024**2
GIB = 1024**3

_UNITS = {"": 1, "b": 1, "k": 1024, "m": MIB, "g": GIB, "t": 1024**4}
_MINIMUM = 6 * MIB
"""Docker's least memory for a container."""


def parse_size(text: str, option: str = "--memory") -> int:
    """Return the bytes of `20g`, `512m`, `1.5g`, `20gb` or `20GiB`; raises UsageError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise UsageError(f"{option} {text}: not an amount of memory; write it as 20g or 512m")
    amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < _MINIMUM:
        hint = f"; did you mean {text}g?" if text.strip().isdigit() else ""
        raise UsageError(f"{option} {text}: below 6m, the least a container can have{hint}")
    return amount


def format_size(amount: int) -> str:
    """Return bytes in words: `20 GB`, `1.5 GB`, `512 MB` (binary units, as Docker counts)."""
    for unit, size in (("GB", GIB), ("MB", MIB), ("KB", 1024)):
        if amount >= size:
            return f"{amount / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{amount} B"


def format_gib(amount: int) -> str:
    """Return bytes as `1.50 GiB`, for amounts that a reader compares."""
    return f"{amount / GIB:.2f} GiB"


def format_share(used: int | None, limit: int) -> str:
    """Return the used part of a limit, in the limit's unit: `1.2/20 GB`; `1.2 GB` without a limit."""
    if used is None:
        return "-"
    if not limit:
        return format_size(used)
    words, unit = format_size(limit).split()
    size = {"GB": GIB, "MB": MIB, "KB": 1024}.get(unit, 1)
    share = used / size
    return f"{share:.1f}/{words} {unit}" if unit == "GB" else f"{share:.0f}/{words} {unit}"


def format_cores(cores: Sequence[int]) -> str:
    """Return cores as a cpuset list: `0-3,6`."""
    parts: list[str] = []
    start = previous = None
    for core in [*sorted(cores), None]:
        if start is None or previous is None:
            start = previous = core
        elif core is not None and core == previous + 1:
            previous = core
        else:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = previous = core
    return ",".join(parts)

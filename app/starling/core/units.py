"""Parse and format amounts of memory in Docker's notation, sets of cores, and points and spans of time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from starling.core.errors import UsageError

MIB = 1024**2
GIB = 1024**3

_BYTES = {"": 1, "b": 1, "k": 1024, "m": MIB, "g": GIB, "t": 1024**4}
_MINIMUM = 6 * MIB
"""Docker's least memory for a container."""


def parse_size(text: str, option: str = "--memory") -> int:
    """Return the bytes of `20g`, `512m`, `1.5g`, `20gb` or `20GiB`; raises UsageError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise UsageError(f"{option} {text}: not an amount of memory; write it as 20g or 512m")
    amount = int(float(match[1]) * _BYTES[match[2]])
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


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")


def parse_since(text: str, now: float, option: str = "--since") -> float:
    """Return Unix seconds for a span before `now` (`90s`, `10m`, `1h30m`, `2d`), or for a date or time.

    A time without a zone is local. Raises UsageError for anything else.
    """
    spans = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if spans and "".join(number + unit for number, unit in spans) == text:
        return now - sum(float(number) * _SECONDS[unit] for number, unit in spans)
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text}: must be a time span such as 10m or 1h30m, or a time such as 2026-03-01T14:00"
        ) from None


def format_duration(seconds: float) -> str:
    """Return `41s`, `4m10s` or `2h05m`."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def parse_stamp(text: str) -> float | None:
    """Return Unix seconds for an engine's time stamp; None for any other text, and for Docker's zero in the year 1."""
    match = _STAMP.fullmatch(text)
    if not match or text.startswith("0001"):
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        whole = datetime.fromisoformat(match[1] + zone).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        return None
    return whole + float(match[2] or 0)

"""Parse and format points and spans of time, in the forms of people and engines."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from starling.core.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")


def parse_since(text: str, now: float, option: str = "--since") -> float:
    """Return Unix seconds for a span before `now` (`90s`, `10m`, `1h30m`, `2d`), or for a date or time.

    A time without a zone is local. Raises UsageError for anything else.
    """
    spans = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if spans and "".join(number + unit for number, unit in spans) == text:
        return now - sum(float(number) * _UNITS[unit] for number, unit in spans)
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

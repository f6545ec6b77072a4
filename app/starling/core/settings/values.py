"""Checks of values that several commands have."""

from __future__ import annotations

import re

from starling.core.errors import ConfigError, UsageError, suggest

LARGEST_SIDE = 16_384
"""The largest side in pixels; a larger value is a typing error and would run out of memory."""

BUCKET_DRIVERS: dict[str, str | None] = {
    "gs": "gcsfs",
    "s3": "s3fs",
    "az": "adlfs",
    "file": None,
    "memory": None,
}
"""Scheme -> the package that implements it; None: fsspec itself. Credentials come from the environment."""


def check_sides(imgsz: tuple[int, ...]) -> None:
    """Raise ConfigError unless `imgsz` is one side or height and width, in pixels."""
    if len(imgsz) not in (1, 2):
        raise ConfigError("--imgsz", imgsz, "give one side, or height and width")
    if not all(32 <= side <= LARGEST_SIDE for side in imgsz):
        raise ConfigError("--imgsz", imgsz, f"each side must be from 32 to {LARGEST_SIDE} pixels")


def check_name(name: str) -> str:
    """Return `name` if it is one plain path component; raises UsageError otherwise."""
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise UsageError(f"--name {name!r}: must be one folder name, without '/' or '..'")
    return name


def check_bucket(url: str) -> str:
    """Return the scheme of `url` if results can be copied there, as far as the URL shows.

    Raises UsageError for another scheme, and for credentials in the URL, which logs would show.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in BUCKET_DRIVERS or not rest.strip("/"):
        known = ", ".join(f"{name}://" for name in BUCKET_DRIVERS)
        hint = suggest(scheme, BUCKET_DRIVERS) if separator else ""
        raise UsageError(f"--bucket: give scheme://bucket/folder with one of {known}{hint}")
    if re.search(r"[@?#]", rest) or ".." in rest.split("/"):
        raise UsageError(
            f"--bucket {scheme}://…: a bucket and a folder only, without '@', '?', '#' or '..'; "
            "credentials come from the environment"
        )
    return scheme

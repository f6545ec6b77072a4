"""Sides of pictures on a command line."""

from __future__ import annotations

from starling.errors import ConfigError

LARGEST_SIDE = 16_384
"""Pixels; what is larger is a slip of the keyboard and would only run out of memory."""


def check_sides(imgsz: tuple[int, ...]) -> None:
    """Raise ConfigError unless `imgsz` is one side or height and width, in pixels."""
    if len(imgsz) not in (1, 2):
        raise ConfigError("--imgsz", imgsz, "give one side, or height and width")
    if not all(32 <= side <= LARGEST_SIDE for side in imgsz):
        raise ConfigError("--imgsz", imgsz, f"each side must be from 32 to {LARGEST_SIDE} pixels")

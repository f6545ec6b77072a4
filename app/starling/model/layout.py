"""Read a layout: YAML rows `[from, number, module, args]` that describe a detector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.config.yaml_reader import read_yaml
from starling.core.errors import ConfigError, suggest
from starling.model.blocks import ACTIVATIONS, DEFAULT_ACTIVATION

REQUIRED_KEYS = ("depth_multiple", "width_multiple", "backbone", "head")
KNOWN_KEYS = (
    *REQUIRED_KEYS,
    "nc",
    "anchors",
    "activation",
    "csp_activation",
    "ch",
    "channels",
    "names",
    "yaml_file",
)
"""Allowed keys. `ch`, `names` and `yaml_file` occur in layouts inside checkpoints of other trainers, without effect."""
MAX_ROWS = 200
_LARGEST = 1e6
"""Maximum side of an anchor in pixels, and far above any multiple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a layout."""

    index: int
    sources: tuple[int, ...]
    """Absolute indices of the rows whose outputs this row reads; -1 is the image."""
    number: int
    """Number of repeats before the depth multiple is applied."""
    module: str
    args: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A checked layout."""

    depth: float
    width: float
    anchors: tuple[tuple[float, ...], ...] | int
    """Pairs of width and height in pixels, one tuple per level; or a number of anchors per level."""
    activation: str
    """A key of `ACTIVATIONS`."""
    csp_activation: str
    """Activation behind BottleneckCSP's own BatchNorm; most files with this block use another one there."""
    anchor_free: bool
    """Whether the head has no anchors: its row is `Detect, [nc]` where others say `[nc, anchors]`."""
    rows: tuple[Row, ...]

    def channels(self, count: int) -> int:
        """Return `count` times the width multiple, rounded up to a multiple of 8."""
        return math.ceil(count * self.width / 8) * 8

    def repeats(self, number: int) -> int:
        """Return `number` times the depth multiple, at least 1; a `number` of 1 stays 1."""
        return max(round(number * self.depth), 1) if number > 1 else number


def read_layout(path: Path) -> dict[str, Any]:
    """Return the plain mapping of a layout file; raises UsageError if the file is not strict YAML."""
    return read_yaml(path)


def parse_layout(mapping: Mapping[str, Any], modules: Sequence[str]) -> Layout:
    """Check a layout's mapping; `modules` are the names that rows may use.

    Raises ConfigError with the key or row and the requirement.
    """
    for key in mapping:
        if key not in KNOWN_KEYS:
            raise ConfigError(key, mapping[key], f"unknown key in a layout{suggest(str(key), KNOWN_KEYS)}")
    for key in REQUIRED_KEYS:
        if key not in mapping:
            raise ConfigError(key, None, "missing from the layout")
    plain_rows: list[Any] = []
    for part in ("backbone", "head"):
        if not isinstance(mapping[part], list) or not mapping[part]:
            raise ConfigError(part, mapping[part], "must be rows of [from, number, module, args]")
        plain_rows += mapping[part]
    if len(plain_rows) > MAX_ROWS:
        raise ConfigError("head", len(plain_rows), f"a layout has at most {MAX_ROWS} rows")
    rows = tuple(_row(index, row, modules) for index, row in enumerate(plain_rows))
    if rows[-1].module != "Detect" or any(row.module == "Detect" for row in rows[:-1]):
        raise ConfigError("head", rows[-1].module, "the last row, and only it, must be Detect")
    return Layout(
        depth=_multiple("depth_multiple", mapping["depth_multiple"]),
        width=_multiple("width_multiple", mapping["width_multiple"]),
        anchors=check_anchors(mapping.get("anchors", 3), len(rows[-1].sources)),
        activation=_activation(mapping, "activation"),
        csp_activation=_activation(mapping, "csp_activation"),
        anchor_free=is_anchor_free(mapping),
        rows=rows,
    )


def is_anchor_free(mapping: Mapping[str, Any]) -> bool:
    """Return whether a layout's head has no anchors: its row is `Detect, [nc]` where others say `[nc, anchors]`."""
    rows = mapping.get("head")
    last = rows[-1] if isinstance(rows, list) and rows else None
    return isinstance(last, list | tuple) and len(last) == 4 and list(last[3:]) == [["nc"]]


def check_anchors(value: Any, levels: int) -> tuple[tuple[float, ...], ...] | int:
    """Return anchors as pixel pairs per level, or as a number per level; raises ConfigError."""
    problem = (
        "must be one row of width, height pairs in pixels for each level, or a number of anchors a level"
    )
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not (1 <= value <= 32 and math.isfinite(value)):
            raise ConfigError("anchors", value, problem)
        return round(value)
    if not isinstance(value, list | tuple):
        raise ConfigError("anchors", value, problem)
    if len(value) != levels:
        raise ConfigError("anchors", value, f"{len(value)} rows for the {levels} levels of Detect")
    rows = []
    for row in value:
        if not isinstance(row, list | tuple):
            raise ConfigError("anchors", value, problem)
        sides = [side for pair in row for side in (pair if isinstance(pair, list | tuple) else (pair,))]
        if not sides or len(sides) % 2 or not all(_is_number(side) and side > 0 for side in sides):
            raise ConfigError("anchors", row, problem)
        rows.append(tuple(float(side) for side in sides))
    if len({len(row) for row in rows}) != 1:
        raise ConfigError("anchors", value, "every level needs the same number of anchors")
    return tuple(rows)


def _row(index: int, row: Any, modules: Sequence[str]) -> Row:
    where = f"row {index}"
    if not isinstance(row, list | tuple) or len(row) != 4:
        raise ConfigError(where, row, "must be [from, number, module, args]")
    sources, number, module, args = row
    if not isinstance(module, str) or module not in modules:
        raise ConfigError(where, module, f"unknown module{suggest(str(module), modules)}")
    if not _is_integer(number) or not 1 <= number <= 100:
        raise ConfigError(where, number, "number must be an integer between 1 and 100")
    if not isinstance(args, list | tuple):
        raise ConfigError(where, args, "args must be a list")
    given = sources if isinstance(sources, list | tuple) else (sources,)
    absolute = []
    for source in given:
        if not _is_integer(source):
            raise ConfigError(where, sources, "from must be row numbers")
        # -1 is the row before; for row 0 it is the image
        position = index + source if source < 0 else source
        if not (0 <= position < index or (position == -1 and index == 0)):
            raise ConfigError(where, sources, "from must name rows above this one")
        absolute.append(position)
    if not absolute:
        raise ConfigError(where, sources, "from must name at least one row")
    return Row(index=index, sources=tuple(absolute), number=number, module=module, args=tuple(args))


def _activation(mapping: Mapping[str, Any], key: str) -> str:
    activation = mapping.get(key, DEFAULT_ACTIVATION)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(key, activation, f"must be one of {', '.join(ACTIVATIONS)}")
    return str(activation)


def _multiple(key: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 8:
        raise ConfigError(key, value, "must be a number above 0, at most 8")
    return float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a number that float32 can hold; integers may be too large for any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST

"""JSON of others as plain data: bounded size, depth and numbers, and one kind of error.

The standard reader raises RecursionError for 2,000 nested lists, ValueError for whole numbers of 5,000 digits, and makes
numbers that no float holds, which fail far from the file.
"""

from __future__ import annotations

import json
import os
from typing import Any

from app.core.budget import BudgetExceeded
from app.core.regular_file import read_regular
from app.core.words import shown

MAX_BYTES = 64 << 20
"""Room for a COCO file of 500,000 boxes; notes of ours are below 100 KB."""
MAX_LEVELS = 64
_MOST_DIGITS = 40
_MOST_INT = 1 << 64


class NotJson(ValueError):
    """Content that is no JSON, or more of it than a reader takes; the message says which."""


def parse_json(content: bytes | str, *, levels: int = MAX_LEVELS) -> Any:
    """Return the value. NaN and infinities pass, as Python writes them. Raises NotJson."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise NotJson(f"nested deeper than {levels} levels") from None
    except ValueError as error:
        raise NotJson(f"no JSON: {shown(error)}") from None
    if _is_deep(value, levels):
        raise NotJson(f"nested deeper than {levels} levels")
    return value


def read_json(path: str | os.PathLike[str], most_bytes: int = MAX_BYTES) -> Any:
    """Return what a file of JSON holds. Raises OSError where there is no regular file, and NotJson."""
    try:
        return parse_json(read_regular(path, most_bytes))
    except BudgetExceeded as error:
        raise NotJson(str(error)) from None


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(number := int(digits)) > _MOST_INT:
        raise ValueError(f"a whole number of {len(digits)} digits, which no reader needs")
    return number


def _is_deep(value: Any, levels: int) -> bool:
    """Return whether lists and mappings stand in each other more than `levels` times."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            item
            for container in layer
            if isinstance(container, list | dict)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, list | dict)
        ]
        if not layer:
            return False
    return True

"""JSON of others as plain data: bounded size, depth and numbers, and one kind of error.

The standard reader raises RecursionError for 2,000 nested lists, ValueError for whole numbers of 5,000 digits, and makes
numbers that no float holds, which fail far from the file.
"""

from __future__ import annotations

import json
import os
from typing import Any

from starling.core.budget import BudgetExceeded
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of
from starling.core.words import shown

MAX_BYTES = 64 << 20
"""Room for a COCO file of 500,000 boxes; notes of ours are below 100 KB."""
MAX_LEVELS = 64
_MOST_BITS = 64


class NotJson(ValueError):
    """Content that is no JSON, or more of it than a reader takes; the message says which."""


def parse_json(content: bytes | str, *, levels: int = MAX_LEVELS) -> Any:
    """Return the value. NaN and infinities pass, as Python writes them. Raises NotJson."""
    try:
        text = text_of(content, "FILE") if isinstance(content, bytes) else content
        value = json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise NotJson(f"nested deeper than {levels} levels") from None
    except NotUtf8 as error:
        raise NotJson(f"no JSON: {error.problem}") from None
    except ValueError as error:
        raise NotJson(f"no JSON: {shown(error)}") from None
    _check(value, levels)
    return value


def read_json(path: str | os.PathLike[str], most_bytes: int = MAX_BYTES) -> Any:
    """Return what a file of JSON holds. Raises OSError where there is no regular file, and NotJson."""
    try:
        return parse_json(read_regular(path, most_bytes))
    except BudgetExceeded as error:
        raise NotJson(str(error)) from None


def _check(value: Any, levels: int) -> None:
    """Raise NotJson for lists and mappings too deep in each other, and for numbers that no reader needs."""
    layer = [value]
    for _ in range(levels + 1):
        for item in layer:
            if type(item) is int and item.bit_length() > _MOST_BITS:
                raise NotJson(f"a whole number of more than {_MOST_BITS} bits")
        layer = [
            item
            for container in layer
            if isinstance(container, list | dict)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not layer:
            return
    raise NotJson(f"nested deeper than {levels} levels")

"""Read untrusted JSON as plain data, with limits on size, depth and numbers, and one kind of error.

The standard reader raises RecursionError for 2,000 nested lists and ValueError for integers of 5,000 digits, and it
makes integers that no float can hold, which fail later.
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
"""Room for a COCO file of 500,000 boxes; Starling's own files are below 100 KB."""
MAX_LEVELS = 64
_MOST_BITS = 64


class NotJson(ValueError):
    """The content is no JSON, or exceeds a limit; the message says which."""


def parse_json(content: bytes | str, *, levels: int = MAX_LEVELS) -> Any:
    """Return the value; accepts NaN and Infinity, as Python writes them. Raises NotJson."""
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
    """Return the value in a file of JSON; raises OSError if it is not a readable regular file, and NotJson."""
    try:
        return parse_json(read_regular(path, most_bytes))
    except BudgetExceeded as error:
        raise NotJson(str(error)) from None


def _check(value: Any, levels: int) -> None:
    """Raise NotJson for lists and mappings nested too deep, and for integers that are too large."""
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

"""Read `--env-file`: NAME=value lines, or a bare NAME to take the caller's value. Values are never shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from starling.core.budget import BudgetExceeded
from starling.core.errors import UsageError
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of

_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_env_file(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in the file, as `docker run --env-file` reads it; raises UsageError with the line."""
    try:
        lines = text_of(read_regular(path, _MOST_BYTES), path).splitlines()
    except OSError as error:
        raise UsageError(f"--env-file {path}: cannot be read ({error.strerror})") from None
    except BudgetExceeded as error:
        raise UsageError(f"--env-file {path}: holds {error}; name the file of NAME=value lines") from None
    except NotUtf8 as error:
        raise UsageError(f"--env-file {path}: {error}") from None
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, sign, value = line.strip().partition("=")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{path}:{number}: not NAME=value; a name has letters, digits and '_'")
        if sign:
            variables[name] = value
        elif name in environment:
            variables[name] = environment[name]
    return variables

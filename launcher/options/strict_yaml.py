"""Read a YAML file of settings, each value with its line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starling.core.errors import UsageError

if TYPE_CHECKING:
    from starling.core.plain_yaml import Value


def read_mapping(path: Path) -> dict[str, Value]:
    """Return the mapping that a YAML file holds; an empty one for a file of comments only.

    Raises UsageError with file and line for a file that cannot be read or is too large, for anything but one
    document with a mapping, and for tags, anchors, aliases and keys that stand twice.
    """
    from starling.core.budget import BudgetExceeded
    from starling.core.files.regular import read_regular
    from starling.core.plain_yaml import MOST_BYTES, NotYaml, OtherYaml, written_mapping
    from starling.core.words import printable

    try:
        return written_mapping(read_regular(path, MOST_BYTES), path)
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: cannot be read, or is not a file ({error.strerror}); give a YAML file"
        ) from None
    except BudgetExceeded:
        raise UsageError(
            f"{path}: over {MOST_BYTES // 1024} KiB, so no file of settings; check the path"
        ) from None
    except NotYaml as error:
        what = "" if isinstance(error, OtherYaml) else "not valid YAML: "
        raise UsageError(f"{path}{error.place}: {what}{error.problem}") from None

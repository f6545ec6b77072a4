"""The password of a study's database, from the places where PostgreSQL's own tools look for one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from starling.core.budget import BudgetExceeded
from starling.core.errors import UsageError
from starling.core.files.refusals import readable
from starling.core.files.regular import read_regular
from starling.core.settings.study_url import PASSWORD_FILE_VARIABLE, StudyUrl
from starling.core.utf8 import NotUtf8, text_of

REMEDY = f"{PASSWORD_FILE_VARIABLE}=FILE, PGPASSWORD or ~/.pgpass"
_MOST_BYTES = 1 << 20
_PIECE = re.compile(r"\\(.)|(:)|([^:\\]+|\\$)")


@readable(UsageError)
def find_password(url: StudyUrl, environment: Mapping[str, str]) -> str:
    """Return the password for `url`, or an empty string where none is set.

    The first that is set counts: the file that STARLING_STUDY_PASSWORD_FILE names, PGPASSWORD, and the line for
    this server in the file of PGPASSFILE, else ~/.pgpass.

    Raises UsageError for a file that cannot be read, or that others can.
    """
    named = environment.get(PASSWORD_FILE_VARIABLE)
    if named:
        return _read(Path(named), PASSWORD_FILE_VARIABLE).rstrip("\r\n")
    if environment.get("PGPASSWORD"):
        return environment["PGPASSWORD"]
    given = environment.get("PGPASSFILE")
    path = Path(given) if given else Path(environment.get("HOME") or "/") / ".pgpass"
    if not path.is_file():
        return ""
    if path.stat().st_mode & 0o077:
        raise UsageError(f"{path}: holds passwords and others may read it; chmod 600 it")
    return _look_up(_read(path, "PGPASSFILE"), url)


def _read(path: Path, variable: str) -> str:
    try:
        return text_of(read_regular(path, _MOST_BYTES), path)
    except (OSError, NotUtf8, BudgetExceeded) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None)
        reason = reason or "not text of a password's length"
        raise UsageError(
            f"{path}: the database's password cannot be read ({reason}); correct {variable}"
        ) from None


def _look_up(text: str, url: StudyUrl) -> str:
    """Return the password of the first line `host:port:database:user:password` that fits; `*` fits anything."""
    wanted = (url.host, str(url.port), url.database, url.user)
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        fields = _fields(line)
        if len(fields) >= 5 and all(
            field in ("*", value) for field, value in zip(fields[:4], wanted, strict=True)
        ):
            return fields[4]
    return ""


def _fields(line: str) -> list[str]:
    r"""Return the fields of a line between its colons; `\:` and `\\` stand for the characters themselves."""
    fields: list[list[str]] = [[]]
    for escaped, colon, plain in _PIECE.findall(line):
        if colon:
            fields.append([])
        else:
            fields[-1].append(escaped or plain)
    return ["".join(pieces) for pieces in fields]

"""Decode text files as UTF-8; for another encoding, name it and the command that converts the file.

Notepad of Windows and PowerShell's `>` write UTF-16, which editors show correctly.
"""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

from starling.core.words import printable

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # checked first, because it begins with UTF-16's mark
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
HEAD_BYTES = 512
"""The number of bytes that `check_utf8` examines."""
_FEW = 8
"""Fewer bytes are too few to guess an encoding from NULs."""


class NotUtf8(ValueError):
    """The text has another encoding; the message names the problem and the remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


def text_of(content: bytes, path: Path | str) -> str:
    """Return the text of a file's bytes, without a byte order mark. Raises NotUtf8."""
    check_utf8(content[:HEAD_BYTES], path)
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise NotUtf8("not UTF-8 text", "save it as UTF-8") from None


def check_utf8(head: bytes, path: Path | str) -> None:
    """Raise NotUtf8 if a file's first bytes are UTF-16 or UTF-32; other encodings are not checked."""
    encoding = _encoding_of(head)
    if encoding is None:
        return
    old, new = (printable(shlex.quote(name)) for name in (str(path), f"{path}.utf8"))
    raise NotUtf8(
        f"{encoding} text, not UTF-8",
        f"rewrite it: iconv -f {encoding} -t UTF-8 {old} >{new} && mv {new} {old} (in PowerShell, write it with "
        "Out-File -Encoding utf8 in place of >)",
    )


def _encoding_of(head: bytes) -> str | None:
    """Return the encoding by its byte order mark, or else by the NULs between ASCII letters; None if unknown."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked or len(head) < _FEW:
        return marked
    pairs = len(head) // 2
    first, second = head[0::2].count(0), head[1::2].count(0)
    if second * 2 > pairs and first * 20 < pairs:
        return "UTF-16LE"
    if first * 2 > pairs and second * 20 < pairs:
        return "UTF-16BE"
    return None

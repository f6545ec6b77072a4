"""The checksum of a journal's record: an additional key at the record's end, which Optuna ignores.

    {"op_code":6,"worker_id":"…","trial_id":3,"state":1,"values":[0.5],"crc":"1b2e8a90"}

The checksum is the CRC-32 of the bytes before `,"crc"`, in hexadecimal. Records without a checksum, from older versions
and other programs, are accepted.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from starling.core.plain_json import NotJson, parse_json

_SEAL = re.compile(rb',"crc":"([0-9a-f]{8})"}')
_LENGTH = len(b',"crc":"00000000"}')
MOST_LINE_BYTES = 16 << 20
"""Maximum bytes of one record; the longest records, the attributes of a trial, are below 1 MiB."""
_SIGNS = (b'"op_code":', b'"worker_id":', b',"crc":"')
"""Byte strings in every record; damage rarely destroys all of them."""


def sealed(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of the journal, with a checksum."""
    content = json.dumps(record, separators=(",", ":")).encode()[:-1]
    return content + b',"crc":"%08x"}\n' % zlib.crc32(content)


def opened(line: bytes) -> dict[str, Any] | None:
    """Return the record of a complete line; None for a damaged line and for a line that is no record."""
    if len(line) > MOST_LINE_BYTES:
        return None
    text = line.rstrip(b"\r\n")
    try:
        record = parse_json(text)
    except NotJson:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("op_code"), int):
        return None
    if "crc" in record and not is_sealed(text):
        return None
    return record


def is_sealed(text: bytes) -> bool:
    """Return whether the bytes end with a correct checksum of the bytes before it."""
    found = _SEAL.fullmatch(text[-_LENGTH:])
    return found is not None and int(found[1], 16) == zlib.crc32(memoryview(text)[:-_LENGTH])


def looks_like_record(line: bytes) -> bool:
    """Return whether an unreadable line has been a record."""
    return any(sign in line for sign in _SIGNS)


def has_lost_line_end(tail: bytes) -> bool:
    """Return whether bytes without a line end are a complete record and more bytes: the line end was damaged.

    A killed writer leaves a part of a record, or a complete record with nothing behind it.
    """
    sum_so_far = at = 0  # CRC-32 of the bytes before `at`; each byte is summed once
    for found in _SEAL.finditer(tail):
        sum_so_far = zlib.crc32(memoryview(tail)[at : found.start()], sum_so_far)
        at = found.start()
        if int(found[1], 16) == sum_so_far:
            return bool(tail[found.end() :].strip(b"\0"))
    return False

#!/usr/bin/env python3
"""Restrict a program's writes to a few folders by the kernel's Landlock, and execute the program.

    confine.py RUNS COMMAND…

For a trainer with the capability that it needs to read private folders of root, such as root's home. That capability
also allows writing there, which Landlock takes away. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence

NEEDED_VERSION = 3
"""The Landlock version (Linux 6.2) from which it also prevents truncating files."""

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION_FLAG, _BENEATH = 1, 1
_WRITE_FILE = 1 << 1
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 15))
"""The rights to write, truncate, make, remove, link and move all kinds of files."""

_ALWAYS = ("/tmp", "/var/tmp", "/dev", "/proc")


class _Ruleset(ctypes.Structure):
    _fields_ = [("handled", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _call(number: int, *words: object) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, *words)
    return result


def landlock_version() -> int:
    """Return the kernel's version of Landlock; 0 or less if the kernel has no Landlock."""
    return _call(_CREATE, None, 0, _VERSION_FLAG)


def confine(folders: Iterable[str]) -> None:
    """Restrict the writes of this process and its children to the folders.

    Requires no_new_privs. Raises OSError if the kernel refuses.
    """
    attributes = _Ruleset(_WRITES)
    ruleset = _checked(_call(_CREATE, ctypes.byref(attributes), ctypes.sizeof(attributes), 0))
    for folder in folders:
        try:
            parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = _PathBeneath(_WRITES, parent)
        _checked(_call(_ADD, ruleset, _BENEATH, ctypes.byref(rule), 0))
        os.close(parent)
    _checked(_call(_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def main(argv: Sequence[str]) -> int:
    """Confine this process and execute the command."""
    runs, *command = argv
    try:
        confine((runs, *_ALWAYS))
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"starling: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Pickles that once took minutes, gigabytes or the interpreter's life; each is made in memory, none is kept."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEAD = b"\x80\x02"
FORMAT = b"}(X\x06\x00\x00\x00formatX\x0a\x00\x00\x00starling-1X\x05\x00\x00\x00model"
"""A mapping of ours, up to the value of `model`."""


def _doubled(levels: int) -> bytes:
    """Return a tuple of twice the tuple before it."""
    return b"Nq\x00" + b"".join(
        b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels)
    )


def _key(value: bytes) -> bytes:
    return b"}" + value + b"Ns"


def _long(size: int, code: bytes = b"\x8a") -> bytes:
    content = b"\xff" * (size - 1) + b"\x7f"
    return code + (bytes([size]) if code == b"\x8a" else struct.pack("<I", size)) + content


def _tensor(numel: bytes, size: bytes, stride: bytes) -> bytes:
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + numel
        + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


PICKLES: dict[str, bytes] = {
    "a doubled tuple as a key": _key(_doubled(60)),
    "a doubled tuple": _doubled(60),
    "a doubled list": b"]q\x00" + b"".join(
        b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1]) for level in range(60)
    ),
    "a deep tuple as a key": _key(b"N" + b"\x85" * 200_000),
    "a deep tuple": b"N" + b"\x85" * 200_000,
    "a deep tuple that is dropped": b"ccollections\nOrderedDict\n)RN" + b"\x85" * 200_000 + b"b",
    "a deep list": b"]" * 100_000 + b"a" * 99_999,
    "a deep list from the top down": b"]q\x00" + b"".join(
        b"j" + struct.pack("<I", n) + b"]r" + struct.pack("<I", n + 1) + b"a" for n in range(50_000)
    ),
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00Nh\x00s",
    "deep records": b"cmodels.yolo\nModel\n)\x81}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00a" * 5000
    + b"N"
    + b"ssb" * 5000,
    "a set of a doubled tuple": b"c__builtin__\nset\n(](" + _doubled(60) + b"etR",
    "an OrderedDict of doubled keys": b"ccollections\nOrderedDict\n(](" + _doubled(59) + b"N\x86etR",
    "twenty million empty dicts": b"](" + b"}" * 20_000_000 + b"e",
    "four million numbers": b"](" + b"K\x00" * 4_500_000 + b"e",
    "sets without end": b"](" + b"c__builtin__\nset\n)R" * 2_000_000 + b"e",
    "records without end": b"cmodels.yolo\nModel\nq\x000](" + b"h\x00)\x81" * 2_000_000 + b"e",
    "a wide key many times": b"](" + b"K\x00" * 1_000_000 + b"tq\x00" + b"](" + b"}h\x00Ns" * 500_000 + b"e",
    "one long text in many places": b"X" + struct.pack("<I", 10_000_000) + b"x" * 10_000_000 + b"q\x00(" + b"h\x00" * 1_000_000 + b"t",
    "a text that claims 4 GiB": b"X\xff\xff\xff\xffabc",
    "bytes that claim 4 GiB": b"B\xff\xff\xff\xffabc",
    "bytes that claim more than there is": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "a frame that claims more than there is": b"\x95" + b"\xff" * 7 + b"\x7f",
    "a huge memo index": b"}r\xff\xff\xff\x7f",
    "a sparse memo": b"".join(b"Nr" + struct.pack("<I", n * 1000) for n in range(1000)),
    "a memo that is never written": b"j\x00\x00\x00\x01",
    "POP and DUP without end": b"N" + b"20" * 3_000_000,
    "a number of 255 bytes": _long(255),
    "a number of a million bytes": _long(1_000_000, b"\x8b"),
    "sizes with a product of a million digits": _tensor(
        b"K\x04", b"(" + _long(255) * 20_000 + b"t", b"(" + _long(255) * 20_000 + b"t"
    ),
    "sizes with a large product": _tensor(b"K\x04", b"(" + b"M\xff\xff" * 400_000 + b"t", b"(" + b"K\x01" * 400_000 + b"t"),
    "sizes with a zero at the end": _tensor(b"K\x04", b"(" + _long(32) * 200_000 + b"K\x00t", b"(" + b"K\x01" * 200_001 + b"t"),
    "a storage of more than the file": _tensor(b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f\x85", b"K\x01\x85"),
    "a storage of negative size": _tensor(b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
    "a storage of fractional size": _tensor(b"G\x40\x00\x00\x00\x00\x00\x00\x00", b"K\x01\x85", b"K\x01\x85"),
    "a tensor whose storage is a text": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR",
    "a tensor of no arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "a persistent id that is a number": b"K\x01Q",
    "a persistent id that is a text": b"X\x07\x00\x00\x00storageQ",
    "a persistent id of nothing": b")Q",
    "a persistent id of digits without end": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + struct.pack("<I", 1_000_000) + b"9" * 1_000_000 + b"X\x03\x00\x00\x00cpuK\x01tQ",
    "a state that is no mapping": b"cmodels.yolo\nModel\n)\x81K\x01b",
    "names that are a mapping of itself": b"}q\x00X\x05\x00\x00\x00namesh\x00s",
    "marks without end": b"(" * 3_000_000,
    "an opcode that is none": b"\xff",
    "a call of a number": b"K\x01)R",
    "a global with a long name": b"c" + b"x" * 1_000_000 + b"\nx\n",
    "a global that clears the screen": b"c\x1b[2J\nx\n",
    "nothing": b"",
}  # fmt: skip
"""Each follows the PROTO opcode and is followed by STOP."""


def as_foreign(content: bytes, path: Path) -> Path:
    """Write the pickle as the whole content of a zip of torch's."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", HEAD + content + b".")
    return path


def as_ours(content: bytes, path: Path) -> Path:
    """Write the pickle as the value of `model` in a checkpoint of this trainer, which has no digest."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", HEAD + FORMAT + content + b"u.")
    return path


def as_legacy(content: bytes, path: Path) -> Path:
    """Write the pickle as the object of a file from before torch 1.6."""
    head = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": True}, 2),
    ]
    path.write_bytes(b"".join(head) + HEAD + content + b"." + pickle.dumps([], 2))
    return path


FORMS: dict[str, Callable[[bytes, Path], Path]] = {
    "foreign": as_foreign,
    "ours": as_ours,
    "legacy": as_legacy,
}


def sparse_file(path: Path) -> Path:
    """Write a zip of torch's with 8 GiB of a storage that takes no room on the disk."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", HEAD + b"}.")
    with open(path, "r+b") as file:
        whole = file.read()
        end = whole.index(b"PK\x01\x02")
        file.seek(8 << 30)
        file.write(whole[end:])
    return path


def crowded_file(path: Path) -> Path:
    """Write a zip of torch's with 300,000 entries of no bytes."""
    entry = struct.pack(
        "<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", HEAD + b"}.")
        start = archive.start_dir  # type: ignore[attr-defined]
    whole = path.read_bytes()
    directory = whole[start:-22] + b"".join(entry + b"%07d" % n for n in range(300_000))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), start, 0)
    path.write_bytes(whole[:start] + directory + end)
    return path


FILES: dict[str, Callable[[Path], Path]] = {"a sparse file": sparse_file, "300,000 entries": crowded_file}


def many_views(path: Path) -> Path:
    """Write a checkpoint of ours with one storage of 4 MiB that 20,000 tensors show whole."""
    numel = 1 << 20
    file = io.BytesIO()

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is marker else None

    class View:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (marker, 0, (numel,), (1,), False, OrderedDict())

    marker = object()
    Writer(file, 2).dump({"format": "starling-1", "views": [View() for _ in range(20_000)]})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", file.getvalue())
        archive.writestr("w/data/0", bytes(4 * numel))
    return path


FILES["20,000 views of one storage"] = many_views

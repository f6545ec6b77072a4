"""Archives that nobody made in good faith, each built in memory and small on disk."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable


def tar_of(*members: tuple[tarfile.TarInfo | str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar file of members and their contents."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for member, content in members:
            header = tarfile.TarInfo(member) if isinstance(member, str) else member
            if header.isreg():
                header.size = len(content)
            tar.addfile(header, io.BytesIO(content) if header.isreg() else None)
    return target.getvalue()


def zip_of(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip file of names and contents."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return target.getvalue()


GOOD_TAR = tar_of(("images/a.txt", b"abc" * 1000), ("labels/b.txt", b"0 .5 .5 .1 .1\n"))
GOOD_ZIP = zip_of(("images/a.txt", b"abc" * 1000), ("labels/b.txt", b"0 .5 .5 .1 .1\n"))


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    """Return one header block of a member of that type and claimed size."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def claimed(kind: bytes, size: int, packed: bool = True) -> bytes:
    """Return a tar file whose first header claims a size that no bytes follow, or zeros, packed."""
    head = header(kind, size)
    return gzip.compress(head + bytes(min(size, 20 << 20)), 1) if packed else head


def sparse_map(blocks: int) -> bytes:
    """Return a GNU sparse member whose map goes on for many blocks."""
    head = bytearray(header(tarfile.GNUTYPE_SPARSE, 0))
    head[482] = 1  # the map is continued
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    block = (b"%011o\0%011o\0" % (0, 0)) * 21 + b"\1" + bytes(7)
    return gzip.compress(bytes(head) + block * blocks, 1)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a PAX header with these records, padded."""
    return header(kind, len(records)) + records + bytes(-len(records) % 512)


def global_headers(count: int) -> bytes:
    """Return PAX headers for all members, each with another key, in front of a member."""
    parts = [pax(b"%d k%06d=v\n" % (len(b"k%06d=v\n" % n) + 3, n), tarfile.XGLTYPE) for n in range(count)]
    return b"".join(parts) + GOOD_TAR


def nested_headers(count: int) -> bytes:
    """Return long-name headers that follow one another without a member."""
    return (header(tarfile.GNUTYPE_LONGNAME, 4) + b"a\0\0\0" + bytes(508)) * count + GOOD_TAR


def negative_size() -> bytes:
    """Return a tar file whose second member leads back to the first."""
    first = header(tarfile.REGTYPE, 0, "a")
    head = bytearray(header(tarfile.REGTYPE, 0, "b"))
    head[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    return first + bytes(head) + bytes(1024)


def cut(whole: bytes, at: float) -> bytes:
    """Return the first part of a file."""
    return whole[: int(len(whole) * at)]


def member_of(kind: bytes, link: str = "/etc/passwd") -> bytes:
    """Return a tar file with one member that is no plain file."""
    member = tarfile.TarInfo("images/x")
    member.type, member.linkname = kind, link
    return tar_of((member, b""))


def xz_of_dictionary(bits: int) -> bytes:
    """Return an xz file whose header claims a dictionary of 2**bits bytes."""
    whole = bytearray(lzma.compress(GOOD_TAR, lzma.FORMAT_XZ))
    whole[12 + 4] = (bits - 12) * 2  # the property of LZMA2, in the block header behind the stream's 12 bytes
    whole[12 + 8 : 12 + 12] = struct.pack("<L", zlib.crc32(bytes(whole[12 : 12 + 8])))
    return bytes(whole)


def edited_zip(offset: int, field: bytes, whole: bytes = GOOD_ZIP) -> bytes:
    """Return a zip file with bytes of its first directory entry replaced."""
    at = whole.index(b"PK\1\2") + offset
    return whole[:at] + field + whole[at + len(field) :]


def overlapping_zip(count: int) -> bytes:
    """Return a zip file whose entries all share the content of the first (Fifield, A better zip bomb, 2019)."""
    whole = zip_of(("a", bytes(1 << 20)))
    at, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[at:end]
    directory = b"".join(entry[:46] + b"%04d" % n + entry[47:] for n in range(count))
    directory = directory.replace(struct.pack("<H", 1) + b"\0\0\0\0", struct.pack("<H", 4) + b"\0\0\0\0")
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), at, 0)
    return whole[:at] + directory + tail


def crowded_zip() -> bytes:
    """Return a zip file whose directory alone is 33 MiB: 750,000 entries without a name."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *(0,) * 15)
    directory = entry * 750_000
    return directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(directory), 0, 0)


def zip_named(name: bytes, flags: bytes = b"\0\0") -> bytes:
    """Return a zip file whose one entry has this name of five bytes."""
    whole = zip_of(("01234", b"x" * 100)).replace(b"01234", name)
    return edited_zip(8, flags, whole)


ZEROS = tar_of(("zeros", bytes(70 << 20)))

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "gz-bomb": (lambda: gzip.compress(ZEROS, 9), "bomb"),
    "bz2-bomb": (lambda: bz2.compress(ZEROS, 9), "bomb"),
    "xz-bomb": (lambda: lzma.compress(ZEROS, preset=1), "bomb"),
    "zip-bomb": (lambda: zip_of(("zeros", bytes(70 << 20))), "bomb"),
    "zip-of-many": (lambda: zip_of(*((f"{n}/", b"") for n in range(9)), ("x" * 300, b"")), "too long"),
    "huge-long-name": (lambda: claimed(tarfile.GNUTYPE_LONGNAME, 1 << 34), "1 MiB of header"),
    "huge-pax": (lambda: claimed(tarfile.XHDTYPE, 1 << 33), "1 MiB of header"),
    "huge-pax-plain": (lambda: claimed(tarfile.XHDTYPE, 1 << 33, packed=False), "1 MiB of header"),
    "digits-in-pax": (lambda: pax(b"1" * 900_000) + GOOD_TAR, "20 digits"),
    "sparse-map": (lambda: sparse_map(100_000), "1 MiB of header"),
    "sparse-member": (lambda: tar_of((_sparse(), b"")), "sparse"),
    "many-globals": (lambda: global_headers(3000), "header"),
    "nested-headers": (lambda: nested_headers(5000), "header"),
    "negative-size": (negative_size, "negative|backwards"),
    "claims-terabytes": (lambda: claimed(tarfile.REGTYPE, 1 << 50, packed=False), "claims"),
    "claims-more": (lambda: claimed(tarfile.REGTYPE, 1 << 20, packed=False), "too early"),
    "cut-tar": (lambda: cut(GOOD_TAR, 0.2), "early|cut"),
    "cut-at-a-member": (lambda: GOOD_TAR[:3584], "cut"),
    "cut-gz": (lambda: cut(gzip.compress(GOOD_TAR), 0.7), "early"),
    "cut-bz2": (lambda: cut(bz2.compress(GOOD_TAR), 0.7), "early"),
    "cut-xz": (lambda: cut(lzma.compress(GOOD_TAR), 0.7), "early"),
    "gz-checksum": (lambda: gzip.compress(GOOD_TAR)[:-8] + bytes(8), "check|data"),
    "gz-then-rubbish": (lambda: gzip.compress(GOOD_TAR[:1024]) + b"rubbish", "header|data"),
    "xz-dictionary": (lambda: xz_of_dictionary(31), "256 MiB of memory"),
    "lzma-alone-dictionary": (lambda: b"\x5d\0\0\0\x80" + b"\xff" * 8 + bytes(30), "256 MiB of memory"),
    "symlink": (lambda: member_of(tarfile.SYMTYPE), "link or a device"),
    "hard-link": (lambda: member_of(tarfile.LNKTYPE), "link or a device"),
    "device": (lambda: member_of(tarfile.CHRTYPE), "link or a device"),
    "fifo": (lambda: member_of(tarfile.FIFOTYPE), "link or a device"),
    "unknown-type": (lambda: member_of(b"Q"), "link or a device"),
    "long-name": (lambda: tar_of(("n" * 300, b"x")), "too long"),
    "long-path": (lambda: tar_of((("n" * 200 + "/") * 30 + "x", b"x")), "too long"),
    "deep-path": (lambda: tar_of(("n/" * 1800 + "x", b"x"), ("../x", b"")), "over 100 folders"),
    "deep-path-in-zip": (lambda: zip_of(("n/" * 1800 + "x", b"x"), ("../x", b"")), "over 100 folders"),
    "control-characters": (lambda: tar_of(("a\n\x1b[2Jb", b"x")), "control character"),
    "twice": (lambda: tar_of(("a", b"x"), ("a", b"y")), "written twice"),
    "file-then-folder": (lambda: tar_of(("a", b"x"), ("a/b", b"y")), "twice|not a dir|Not a dir"),
    "zip-cut": (lambda: cut(GOOD_ZIP, 0.6), "cut"),
    "zip-encrypted": (lambda: edited_zip(8, b"\1\0"), "encrypted"),
    "zip-method": (lambda: edited_zip(10, b"\x62\0"), "method 98, which is not read; unpack"),
    "zip-bzip2": (lambda: zip_of(("a", b"x"), method=zipfile.ZIP_BZIP2), "bzip2.*pack it again"),
    "zip-lzma": (lambda: zip_of(("a", b"x"), method=zipfile.ZIP_LZMA), "LZMA.*pack it again"),
    "zip-claims-less": (lambda: edited_zip(24, struct.pack("<L", 5)), "Bad CRC-32"),
    "zip-claims-more": (lambda: edited_zip(24, struct.pack("<L", 5000)), "fewer bytes than it claims"),
    "zip-checksum": (lambda: edited_zip(16, b"\0\0\0\0"), "Bad CRC-32"),
    "zip-offset": (lambda: edited_zip(42, struct.pack("<L", 7)), "Bad magic number"),
    "zip-offset-outside": (lambda: edited_zip(42, struct.pack("<L", 1 << 30)), "Truncated file header"),
    "zip-version": (lambda: edited_zip(6, b"\xff"), "version 25.5"),
    "zip-stream-damaged": (lambda: GOOD_ZIP.replace(GOOD_ZIP[42:46], b"\xff" * 4), "Error -3"),
    "zip-extra-damaged": (lambda: edited_zip(30, b"\5\0"), "extra field|directory"),
    "zip-name-no-text": (lambda: zip_named(b"\xff\xfe\xff\xfe\xff", b"\0\x08"), "utf-8"),
    "zip-name-with-nul": (lambda: zip_named(b"a\0b/c"), "control character"),
    "zip-crowded": (crowded_zip, "list of entries is more than 32 MiB"),
    "zip-packed": (lambda: edited_zip(20, struct.pack("<L", 1 << 30)), "claim more"),
    "zip-wide-sizes-missing": (lambda: edited_zip(24, b"\xff" * 4), "MB to unpack|fewer"),
    "zip-overlap": (lambda: overlapping_zip(9000), "overlap"),
    "zip-nothing": (lambda: b"PK\5\6", "cut"),
    "empty": (lambda: b"", "neither a zip nor a tar"),
    "text": (lambda: b"<html>" * 200, "neither a zip nor a tar"),
}  # fmt: skip
"""Name -> what builds the archive, and what the message says."""


def _sparse() -> tarfile.TarInfo:
    member = tarfile.TarInfo("images/sparse")
    member.pax_headers = {}
    member.type = tarfile.GNUTYPE_SPARSE
    return member

"""Find the type of a folder's file system.

Some do not show one host's locks to other hosts; on some, `A` and `a` are the same name.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from starling.core.paths import real_path

MOUNTS = Path("/proc/self/mountinfo")

NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "gfs2", "ocfs2",
     "beegfs", "gpfs", "orangefs", "pvfs2", "davfs", "coda", "ncpfs", "virtiofs", "vboxsf", "prl_fs", "vmhgfs"}
)  # fmt: skip
"""Types of file systems that several machines can mount at once."""

_LOCAL_FUSE = frozenset(
    {"fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.ntfs-3g", "fuse.ntfs", "fuse.exfat", "fuse.ext4", "fuse.bindfs",
     "fuse.mergerfs", "fuse.gocryptfs", "fuse.encfs", "fuse.cryfs", "fuse.lxcfs", "fuse.unionfs", "fuse.unionfs-fuse",
     "fuse.zfs", "fuse.grpcfuse", "fuse.osxfs", "fuse.squashfuse", "fuse.snapfuse", "fuse.archivemount"}
)  # fmt: skip
"""FUSE file systems on a local disk; the locks of other FUSE file systems may not work across hosts."""


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """Return the type of the file system below `path` if other machines may share it, else None.

    `path` need not exist yet: its nearest parent counts. `mounts` is the text of /proc/self/mountinfo, read if it is
    not given; the result is None if there is no such file.
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(errors="surrogateescape")
        except OSError:
            return None
    kind = file_system_type(real_path(path), mounts)
    shared = kind in NETWORK or (kind.split(".")[0] == "fuse" and kind not in _LOCAL_FUSE)
    return kind if shared else None


def file_system_type(path: Path, mounts: str) -> str:
    """Return the type of the mount that holds the absolute `path`; empty if no line of `mounts` matches.

    A line reads `36 35 98:0 /root /mount/point options [optional...] - type source options`, with `\\040` for a space.
    Of two mounts on the same point, the later one counts.
    """
    deepest, found = -1, ""
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5 or not after:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, found = len(point.parts), after.split(" ")[0]
    return found


NAME_MAX = 255
"""The longest file name in bytes if the file system does not report a limit."""


def longest_name(folder: Path) -> int:
    """Return the longest file name in `folder`, in bytes."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return NAME_MAX


def folds_names(folder: Path) -> bool:
    """Return whether `folder` ignores case in file names; makes and removes a file there."""
    probe = folder / f".case-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink(missing_ok=True)

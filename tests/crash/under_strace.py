"""Programs to run under strace, which hits the NTH call of a system call in each process.

The process forks a child for every place that is to be hit. Child number k first makes NTH - k harmless calls, so that
the k-th of the action itself is the one. So torch is imported once, not once for every place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

NTH = 400
"""More than this process makes itself."""
CALLS = {
    "write": "write",
    "fsync": "fsync",
    "rename": "renameat",
    "link": "linkat",
    "unlink": "unlinkat",
    "flock": "flock",
    "pread": "pread64",
    "pwrite": "pwrite64",
    "truncate": "ftruncate",
    "statfs": "fstatfs",
}
"""A call by our name and as strace knows it, on any processor."""
OLD, NEW = 1, 2
RECORD = {"op_code": 1, "worker_id": "w", "text": "x" * 200}


def harmless(call: str, count: int, scratch: Path) -> None:
    """Make `count` calls that change nothing that matters."""
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT, 0o644)
    # By a descriptor, as the writers do: for the kernel, and so for strace, that is another call than by path.
    folder = os.open(scratch.parent, os.O_RDONLY)
    for _ in range(count):
        if call == "write":
            os.write(descriptor, b"x")
        elif call == "fsync":
            os.fsync(descriptor)
        elif call == "rename":
            os.rename(scratch.name, scratch.name, src_dir_fd=folder, dst_dir_fd=folder)
        elif call in ("link", "unlink"):
            with contextlib.suppress(OSError):
                if call == "link":
                    os.link(scratch.name, scratch.name, src_dir_fd=folder, dst_dir_fd=folder)
                else:
                    os.unlink(f"{scratch.name}.other", dir_fd=folder)
        elif call == "flock":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_UN)
        elif call == "pread":
            os.pread(descriptor, 1, 0)
        elif call == "pwrite":
            os.pwrite(descriptor, b"x", 0)
        elif call == "truncate":
            os.ftruncate(descriptor, 1)
        else:
            os.fstatvfs(descriptor)
    os.close(folder)
    os.close(descriptor)


def checkpoint(value: int) -> dict[str, object]:
    import torch

    return {
        "kind": "weights",
        "value": value,
        "tensors": {f"t{i}": torch.full((4000,), float(value)) for i in range(4)},
    }


def prepare_save(folder: Path) -> Callable[[Path], None]:
    """Leave a folder with two saves, and return what saves a third."""
    from starling.model.checkpoint import save_checkpoint

    for value in (OLD - 1, OLD):
        save_checkpoint(folder / "last.pt", checkpoint(value), previous=folder / "last.previous.pt")
    content = checkpoint(NEW)
    return lambda case: save_checkpoint(case / "last.pt", content, previous=case / "last.previous.pt")


def prepare_append(folder: Path) -> Callable[[Path], None]:
    """Leave a journal of one record and a torn one, and return what appends two."""
    from starling.search.storage.journal import SafeJournalBackend

    folder.mkdir(parents=True)
    SafeJournalBackend(folder / "journal").append_logs([RECORD])
    with (folder / "journal").open("ab") as file:
        file.write(b'{"op_code":4,"torn')
    return lambda case: SafeJournalBackend(case / "journal").append_logs([RECORD, RECORD])


ACTIONS = {"save": prepare_save, "append": prepare_append}


def main(action: str, cases: str, *calls: str) -> None:
    """Hit every place of the action; write how each child ended, by call, to `ends.json`."""
    root = Path(cases)
    act = ACTIONS[action](root / "template")
    ends: dict[str, list[str]] = {call: [] for call in calls}
    for call in calls:
        while not ends[call] or ends[call][-1] != "done":
            case = root / f"{call}-{len(ends[call])}"
            child = os.fork()
            if child == 0:
                os._exit(_child(act, call, len(ends[call]) + 1, root / "template", case))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ends[call].append(
                "killed" if code < 0 else "refused" if code == 6 else "done" if code == 0 else "broken"
            )
            if len(ends[call]) > 100 or ends[call][-1] == "broken":
                break
    (root / "ends.json").write_text(json.dumps(ends))


def _child(act: Callable[[Path], None], call: str, place: int, template: Path, case: Path) -> int:
    from starling.core.errors import DiskFull

    shutil.copytree(template, case)
    harmless(call, NTH - place, case.with_suffix(".scratch"))
    try:
        act(case)
    except DiskFull:
        return 6
    except BaseException:
        return 1
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Supervise one local replica: its own session and cores, a rotated log, and its exit code on disk.

Run by path with `python -I`; imports only the standard library and the ground floor, and starts in milliseconds:
    supervisor.py EXIT_FILE LOG_FILE CORES MEMORY -- COMMAND…
Prints `pid start-time` of the process that stays, and returns. That process has left the caller's session, so a logout
does not end it. If it is killed, the kernel kills its child too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import stat
import subprocess
import sys
import time
from typing import Any

LOG_BYTES = 10 * 1024**2
LOG_FILES = 3
LONGEST_LINE = 1024**2
RESERVED_BYTES = 4096
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Fork the process that stays, and print its pid and start time."""
    exit_file, log_file, cores, memory = argv[:4]
    command = argv[5:]
    read_end, write_end = os.pipe()
    if os.fork():
        # The staying process reads its own start time: its answer proves that it runs.
        os.close(write_end)
        sys.stdout.write(os.read(read_end, 64).decode())
        return 0
    os.setsid()
    os.write(write_end, f"{os.getpid()} {own_start()}\n".encode())
    os.close(write_end)
    os.close(read_end)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    limit = memory_limit(int(memory))
    folder, name = open_folder(exit_file), os.path.basename(exit_file)
    ending = reserved(folder, unfinished(name))
    code = supervise(command, RotatedLog(folder, os.path.basename(log_file)), limit)
    ended = {"exit_code": code, "finished": time.time(), "oom_killed": limit.oom_killed}
    limit.close()
    os.ftruncate(ending, os.pwrite(ending, json.dumps(ended).encode(), 0))
    os.replace(unfinished(name), name, src_dir_fd=folder, dst_dir_fd=folder)
    return 0


def unfinished(exit_file: str) -> str:
    """Return the exit file's name before the command has ended."""
    return f"{exit_file}.part"


def reserved(folder: int, name: str) -> int:
    """Return a descriptor of a new file with reserved disk space for the exit code: a trainer may fill the disk."""
    descriptor = open_new(folder, name, os.O_WRONLY)
    with contextlib.suppress(OSError):  # the file system cannot reserve space
        os.posix_fallocate(descriptor, 0, RESERVED_BYTES)
    return descriptor


def open_folder(file: str) -> int:
    """Open the folder of a file without following a link at the folder, which another user may have placed."""
    return os.open(os.path.dirname(file), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_new(folder: int, name: str, flags: int) -> int:
    """Create and open a new file, after removing any existing file of that name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)


def memory_limit(limit: int) -> Any:
    """Return a MemoryLimit; its module is loaded by path, because this script runs outside its package."""
    module = os.path.join(os.path.dirname(os.path.abspath(__file__)), "memory_limit.py")
    return runpy.run_path(module)["MemoryLimit"](cgroup_name(os.getpid(), own_start()), limit)


def cgroup_name(pid: int, started: int) -> str:
    """Return the name of the cgroup that the supervisor with this pid and start makes."""
    return f"starling-{pid}-{started}"


def supervise(command: list[str], log: RotatedLog, limit: Any) -> int:
    """Run the command, pass SIGTERM and SIGINT to it, copy its output, and return its exit code."""
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if children:
            children[0].send_signal(number)
        else:
            early.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        limit.enter()

    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        log.write(stamped(f"{command[0]}: {error.strerror}\n".encode()))
        return 127
    children.append(child)
    for missed in early:
        child.send_signal(missed)
    assert child.stdout is not None
    copy_output(child, child.stdout.fileno(), log, limit)
    code = child.wait()
    return 128 - code if code < 0 else code


def copy_output(child: subprocess.Popen[bytes], output: int, log: RotatedLog, limit: Any) -> None:
    """Copy until the output ends, or the child has ended and no more comes (a grandchild may keep the pipe open)."""
    unfinished = b""
    while True:
        ready, _, _ = select.select([output], [], [], 0.25)
        limit.look()
        if ready:
            data = os.read(output, 65536)
            if not data:
                break
            whole, end, unfinished = (unfinished + data).rpartition(b"\n")
            if end:
                log.write(stamped(whole + end))
            elif len(unfinished) > LONGEST_LINE:
                log.write(stamped(unfinished))
                unfinished = b""
        elif child.poll() is not None:
            break
    if unfinished:
        log.write(stamped(unfinished))


def stamped(lines: bytes) -> bytes:
    """Return the lines, each after the current time, as Docker keeps them; an unfinished last line gets no line end."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z "
    *whole, rest = lines.split(b"\n")
    return b"".join(stamp.encode() + line + b"\n" for line in whole) + (
        stamp.encode() + rest if rest else b""
    )


class RotatedLog:
    """A log of limited size: FILE, FILE.1, FILE.2. A full disk loses lines, but does not stop the training."""

    def __init__(self, folder: int, name: str) -> None:
        self._folder, self._name = folder, name
        self._file = self._open()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(self._file).st_size > LOG_BYTES:
                self._rotate()
            os.write(self._file, data)

    def _rotate(self) -> None:
        for number in range(LOG_FILES - 1, 0, -1):
            older = f"{self._name}.{number}"
            newer = self._name if number == 1 else f"{self._name}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.close(self._file)
        self._file = self._open()

    def _open(self) -> int:
        """Open the log to append; replaces a file that another user owns or that has another hard link."""
        flags = os.O_WRONLY | os.O_APPEND
        try:
            found = os.open(
                self._name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder
            )
        except OSError:
            return open_new(self._folder, self._name, flags)
        state = os.fstat(found)
        if stat.S_ISREG(state.st_mode) and state.st_nlink == 1 and state.st_uid == os.geteuid():
            return found
        os.close(found)
        return open_new(self._folder, self._name, flags)


def own_start() -> int:
    """Return this process's start time, which with the pid identifies the process."""
    from starling.core.process import stat_of

    own = stat_of(os.getpid())
    assert own is not None
    return own.start


def find_ground_floor() -> None:
    """Make `starling.core` importable from `app` of a checkout, or from the folder of this package."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))
    places = (os.path.join(root, "app"), root)
    sys.path += [place for place in places if os.path.isdir(os.path.join(place, "starling", "core"))][:1]


if __name__ == "__main__":
    find_ground_floor()
    sys.exit(main(sys.argv[1:]))

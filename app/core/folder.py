"""Folders that somebody else may write, opened step by step from a descriptor so that no link is ever followed.

A path is looked up anew by every system call: whoever may write one of its folders can swap a part of it for a link
between a check and the use. A descriptor stays what it was when it was opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LINK_ERRORS = frozenset({errno.ELOOP, errno.ENOTDIR})


class LinkRefused(OSError):
    """A part of a path below a shared folder is a symbolic link."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            errno.ELOOP, "is a symbolic link, and links below the runs folder are not followed", str(path)
        )


class Folder:
    """A folder held open by its descriptor, and by the path that messages name it by.

    Names of entries are single path components; `folder` walks several, one at a time. Every method raises OSError as
    the system call does, and LinkRefused in place of ELOOP or ENOTDIR where a symbolic link is the reason.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        """Take over an open directory descriptor; `path` is what messages call the folder."""
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def resolve(cls, path: Path, *, create: bool = False) -> Folder:
        """Open the top of a tree: links in `path` itself are followed, this once."""
        if create:
            path.mkdir(parents=True, exist_ok=True)
        return cls(os.open(path, _DIRECTORY), path)

    @property
    def proc_path(self) -> Path:
        """A path to this very folder, for a library that opens files by name; valid in this process while it is open."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    def folder(self, *parts: str, create: bool = False, mode: int = 0o777) -> Folder:
        """Open the folder at `parts` below this one, making what is missing where `create` says so."""
        below = os.dup(self.descriptor)
        path = self.path
        for part in parts:
            parent, path = below, path / part
            try:
                below = _open_directory(parent, _component(part), path, mode if create else None)
            finally:
                os.close(parent)
        return Folder(below, path)

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file of this folder, never through a link, and return its descriptor."""
        try:
            return os.open(
                _component(name), flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self.descriptor
            )
        except OSError as error:
            raise self._named(error, name) from None

    def stat(self, name: str) -> os.stat_result:
        """Return what `name` itself is, a link included."""
        return os.stat(_component(name), dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Return whether there is anything of that name, a link to nowhere included."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        return sorted(os.listdir(self.descriptor))

    def tree(self) -> Iterator[tuple[Folder, str, os.stat_result]]:
        """Yield every entry below, as its folder (open until the next step), its name and what it is itself.

        A folder is yielded before what it holds. Entries that vanish meanwhile, and folders that may not be entered,
        are passed over.
        """
        for name in self.names():
            try:
                state = self.stat(name)
            except FileNotFoundError:
                continue
            yield self, name, state
            if stat.S_ISDIR(state.st_mode):
                with contextlib.suppress(OSError), self.folder(name) as below:
                    yield from below.tree()

    def close(self) -> None:
        """Give the descriptor back; a second time does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, error: OSError, name: str) -> OSError:
        return _refusal(error, self.descriptor, name, self.path / name)


def _open_directory(parent: int, name: str, path: Path, make_with: int | None) -> int:
    try:
        if make_with is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, make_with, dir_fd=parent)
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        raise _refusal(error, parent, name, path) from None


def _refusal(error: OSError, parent: int, name: str, path: Path) -> OSError:
    """Return the error with its whole path, and as LinkRefused where a link is the reason."""
    if error.errno in _LINK_ERRORS:
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                return LinkRefused(path)
    return type(error)(error.errno, error.strerror, str(path))


def _component(name: str) -> str:
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not one path component")
    return name

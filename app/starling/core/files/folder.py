"""Open folders that other users may write, part by part from a descriptor, without following links.

Every system call resolves a path again: a user who may write one of its folders can replace a part with a link
between the check and the use. A descriptor always refers to the folder that was opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_PARTS = 64
"""The most parts of a path in messages; a hostile tree may be thousands of levels deep."""
_LINK_ERRORS = frozenset({errno.ELOOP, errno.ENOTDIR})


class LinkRefused(OSError):
    """A part of a path below a shared folder is a symbolic link."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            errno.ELOOP, "is a symbolic link, and links below the runs folder are not followed", str(path)
        )


class _Level:
    """A folder that a walk has entered: its name, path and state, and its subfolders that are still to be entered."""

    __slots__ = ("deep", "folders", "name", "path", "state")

    def __init__(self, folder: Folder, name: str, state: os.stat_result, deep: int = 0) -> None:
        self.name, self.path, self.state, self.deep = name, folder.path, state, deep
        self.folders: list[tuple[str, os.stat_result]] = []


class Folder:
    """A folder held open by its descriptor; its path is for messages.

    Names of entries are single path components; `folder` opens several, one at a time. Every method raises the OSError
    of its system call, or LinkRefused instead of ELOOP or ENOTDIR if a symbolic link is the reason.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        """Take over an open directory descriptor; `path` is the folder's name in messages."""
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def resolve(cls, path: Path, *, create: bool = False) -> Folder:
        """Open the top of a tree; only here, links in `path` are followed. A new folder has mode 0700.

        The target of a dangling link is never created, because the link's disk may not be mounted.
        """
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(mode=0o700, exist_ok=True)
            return cls(os.open(path, _DIRECTORY), path)
        except (FileExistsError, FileNotFoundError) as error:
            raise link_to_nothing(path) or error from None

    @property
    def proc_path(self) -> Path:
        """A path to the open folder, for a library that opens files by name; valid in this process while it is open."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    def folder(self, *parts: str, create: bool = False, mode: int = 0o777) -> Folder:
        """Open the folder at `parts` below this one; with `create`, make missing folders."""
        below = os.dup(self.descriptor)
        path = self.path
        for part in parts:
            parent, path = below, _path_below(path, part)
            try:
                below = _open_directory(parent, _component(part), path, mode if create else None)
            finally:
                os.close(parent)
        return Folder(below, path)

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file of this folder without following a link, and return its descriptor."""
        try:
            return os.open(
                _component(name), flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self.descriptor
            )
        except OSError as error:
            raise self._named(error, name) from None

    def stat(self, name: str) -> os.stat_result:
        """Return the state of `name`, of a link itself if it is one."""
        return os.stat(_component(name), dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Return whether `name` exists, also as a dangling link."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        return sorted(os.listdir(self.descriptor))

    def tree(self, *, folders_last: bool = False) -> Iterator[tuple[Folder, str, os.stat_result]]:
        """Yield every entry below as its folder (open until the next step), its name and its state.

        A folder comes before its contents, or after them with `folders_last`. Vanished entries are skipped, and so are
        the contents of folders that cannot be entered and of mount points. For any depth and size of the tree, the walk
        holds only three descriptors and the names of the folders still to be entered.
        """
        levels: list[_Level] = []
        here, mount = self._again(), mount_of(self.descriptor)
        try:
            level = _Level(here, "", os.fstat(here.descriptor))
            while True:
                for name, state in here._entries():
                    if stat.S_ISDIR(state.st_mode):
                        level.folders.append((name, state))
                    if not (folders_last and stat.S_ISDIR(state.st_mode)):
                        yield here, name, state
                levels.append(level)
                below: Folder | None = None
                while below is None:
                    if levels[-1].folders:
                        name, state = levels[-1].folders.pop()
                        below = _enter(here, name, mount)
                        if below is None and folders_last:
                            yield here, name, state
                        continue
                    left = levels.pop()
                    if not levels:
                        return
                    here = self._back(here, levels)
                    if folders_last and levels[-1].deep == left.deep - 1:
                        yield here, left.name, left.state
                here.close()
                here, level = below, _Level(below, name, os.fstat(below.descriptor), levels[-1].deep + 1)
        finally:
            here.close()

    def empty(self, refused: Callable[[OSError], None] | None = None) -> None:
        """Remove the contents of this folder, but neither the targets of links nor the contents of mounts.

        Raises OSError for an entry that cannot be removed; with `refused`, calls it with the error instead, and only
        that entry and the folders above it stay.
        """
        for folder, name, state in self.tree(folders_last=True):
            remove = os.rmdir if stat.S_ISDIR(state.st_mode) else os.unlink
            try:
                remove(name, dir_fd=folder.descriptor)
            except FileNotFoundError:
                continue
            except OSError as error:
                if refused is None:
                    raise folder._named(error, name) from None
                refused(folder._named(error, name))

    def remove(self, name: str) -> None:
        """Remove a folder and its contents as far as possible; a link, a file and a mounted folder stay."""
        below = _enter(self, name, mount_of(self.descriptor))
        if below is not None:
            with below:
                below.empty(refused=lambda error: None)
        with contextlib.suppress(OSError):
            os.rmdir(_component(name), dir_fd=self.descriptor)

    def _again(self) -> Folder:
        """Return this folder opened again: two readers of one descriptor would share a position."""
        return Folder(os.open(".", _DIRECTORY, dir_fd=self.descriptor), self.path)

    def _entries(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the entries of this folder one at a time, in the file system's order."""
        with self._again() as own, os.scandir(own.descriptor) as entries:
            for entry in entries:
                try:
                    yield entry.name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue

    def _back(self, left: Folder, levels: list[_Level]) -> Folder:
        """Close `left` and return the folder of the last level, its parent when it was entered.

        If a part of the tree was moved meanwhile, the folder is opened again from the top. If that fails too, the walk
        continues at the top, and `levels` is cut to the first.
        """
        with left:
            for open_it in (lambda: left._parent(), lambda: self._at(levels)):
                with contextlib.suppress(OSError):
                    found = open_it()
                    if os.path.samestat(os.fstat(found.descriptor), levels[-1].state):
                        found.path = levels[-1].path
                        return found
                    found.close()
        del levels[1:]
        return self._again()

    def _parent(self) -> Folder:
        return Folder(os.open("..", _DIRECTORY, dir_fd=self.descriptor), self.path.parent)

    def _at(self, levels: Sequence[_Level]) -> Folder:
        return self.folder(*(level.name for level in levels[1:]))

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
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


def link_to_nothing(path: Path) -> OSError | None:
    """Return the error for a path with a dangling link in it; None for any other path."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            problem = (
                f"is a symbolic link to {os.readlink(place)}, which does not exist (is that disk mounted?)"
            )
            return FileNotFoundError(errno.ENOENT, problem, str(place))
    return None


def mount_of(descriptor: int) -> str:
    """Return the mount of a descriptor: a bind mount has the same device, but is another mount."""
    with open(f"/proc/self/fdinfo/{descriptor}") as file:
        return next((line for line in file if line.startswith("mnt_id:")), "")


def _enter(here: Folder, name: str, mount: str) -> Folder | None:
    """Return a folder of this mount that can be entered and listed; None for any other folder."""
    with contextlib.suppress(OSError):
        below = here.folder(name)
        try:
            below._again().close()
            if mount_of(below.descriptor) == mount:
                return below
        except OSError:
            pass
        below.close()
    return None


def _path_below(path: Path, name: str) -> Path:
    """Return an entry's path for messages; the middle of a very deep path is left out."""
    if len(path.parts) < _MOST_PARTS:
        return path / name
    return Path(*path.parts[: _MOST_PARTS - 2], "…", name)


def _open_directory(parent: int, name: str, path: Path, make_with: int | None) -> int:
    try:
        if make_with is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, make_with, dir_fd=parent)
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        raise _refusal(error, parent, name, path) from None


def _refusal(error: OSError, parent: int, name: str, path: Path) -> OSError:
    """Return the error with its whole path, or LinkRefused if a link is the reason."""
    if error.errno in _LINK_ERRORS:
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                return LinkRefused(path)
    return type(error)(error.errno, error.strerror, str(path))


def _component(name: str) -> str:
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not one path component")
    return name

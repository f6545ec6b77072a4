"""The folder of a run, `<runs>/<project>/<name>`, independent of the current directory's name.

One trainer at a time works in a run directory: it holds a lock that ends with its process.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from starling.core.errors import UsageError
from starling.core.files.folder import link_to_nothing
from starling.core.files.refusals import disk_write, refusal
from starling.core.files.safe_open import make_folder, name_top, open_file, open_folder, top_of
from starling.core.files.safe_open import runs_root as runs_root
from starling.core.lock import take, take_folder
from starling.core.paths import real_path

DIFF = "uncommitted.diff"


def project_dir(project: str, root: Path) -> Path:
    """Return the folder of a project.

    An absolute `project` is used unchanged, and no link below it is followed. Any other is below `root`, without a
    leading `runs/`: `--project runs/train` and `--project train` name the same folder.

    Raises UsageError for a project that leads out of `root`, by its name or through a link.
    """
    if PurePosixPath(project).is_absolute():
        name_top(Path(project))
        return Path(project)
    parts = [part for part in PurePosixPath(project).parts if part != "."]
    if parts and parts[0] == "runs":
        parts = parts[1:]
    if ".." in parts:
        raise UsageError(
            f"--project {project}: leaves the runs folder {root}; give a name, or an absolute path"
        )
    return folder_below(root, *parts)


def check_project(project: str, root: Path) -> None:
    """Raise UsageError for a project in which no run can be made; makes nothing. Called before data is read."""
    folder = project_dir(project, root)
    with _written_in(folder):
        try:
            open_folder(folder).close()
        except FileNotFoundError:
            if error := link_to_nothing(top_of(folder)[0]):
                raise error from None
        place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def folder_below(parent: Path, *parts: str) -> Path:
    """Return `parent` joined with `parts`, with links among them resolved.

    Raises UsageError if a link leads out of `parent`.
    """
    path, top = parent.joinpath(*parts), real_path(parent)
    real = real_path(path)
    if not real.is_relative_to(top):
        raise UsageError(
            f"{path}: a link that leads out of {parent}, to {real}; "
            "remove the link, or give that place as an absolute --project"
        )
    return parent / real.relative_to(top)


def next_free_dir(parent: Path, name: str) -> Path:
    """Create and return `parent/name`, or the next of `name2`, `name3`, … after the highest existing number.

    Safe for concurrent processes, because creating the folder is atomic.
    """
    with open_folder(parent, create=True) as folder:
        number = max((_suffix(other, name) for other in folder.names()), default=0) + 1
        while True:
            free = name if number <= 1 else f"{name}{number}"
            try:
                os.mkdir(free, dir_fd=folder.descriptor)
                return parent / free
            except FileExistsError:
                number = max(number, 1) + 1


def create_run_dir(project: str, name: str, root: Path, *, exist_ok: bool = False) -> Path:
    """Create and return the folder of a new run; with `exist_ok`, an existing folder of that name is used.

    Raises UsageError if the project leads out of `root` or cannot be written, DiskFull if the disk is full.
    """
    parent = project_dir(project, root)
    if exist_ok:
        return make_run_dir(folder_below(parent, name))
    with _written_in(parent):
        path = next_free_dir(parent, name)
    name_top(path)
    return path


def make_run_dir(path: Path) -> Path:
    """Make the folder of a run if it is missing, and return it; raises like `create_run_dir`."""
    with _written_in(path.parent):
        make_folder(path)
    name_top(path)
    return path


@contextmanager
def _written_in(parent: Path) -> Iterator[None]:
    """Turn an OSError into the user's error that names the folder and the reason."""
    try:
        yield
    except OSError as error:
        place = error.filename or parent
        raise refusal(error, parent) or UsageError(
            f"{place}: results cannot be written here ({error.strerror}); "
            "check what is there and its owner, or choose another --project"
        ) from None


def _suffix(folder: str, name: str) -> int:
    """Return 1 for `name` itself, N for `nameN`, 0 for anything else."""
    if folder == name:
        return 1
    match = re.fullmatch(re.escape(name) + r"([1-9]\d*)", folder)
    return int(match[1]) if match else 0


def previous_of(last: Path) -> Path:
    """Return the path of the checkpoint before `last`: `last.previous.pt` beside `last.pt`."""
    return last.with_name(f"{last.stem}.previous{last.suffix}")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files of one training run."""

    path: Path

    @property
    def weights(self) -> Path:
        """The folder of `last.pt`, `best.pt` and `epochN.pt`."""
        return self.path / "weights"

    @property
    def last(self) -> Path:
        """The newest resumable checkpoint."""
        return self.weights / "last.pt"

    @property
    def previous(self) -> Path:
        """The resumable checkpoint before the newest, for use if the newest is damaged."""
        return previous_of(self.last)

    @property
    def best(self) -> Path:
        """The checkpoint with the highest fitness."""
        return self.weights / "best.pt"

    @property
    def results_csv(self) -> Path:
        """The results, one row per epoch."""
        return self.path / "results.csv"

    @property
    def diff(self) -> Path:
        """The changes of the code's working tree since its commit, if there are any."""
        return self.path / DIFF

    @property
    def events(self) -> Path:
        """The event log that the tracking bridge reads."""
        return self.path / "events.jsonl"


LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock the run directory; raises UsageError that names the holder if another trainer has locked it.

    The kernel releases the lock when its holder dies, so there is nothing to clean up.
    """
    with ExitStack() as stack:
        # Two locks: the file names the holder; the folder's lock holds even if the file is removed.
        descriptor, free = take(folder / LOCK, lambda: _open(folder / LOCK))
        file = stack.enter_context(open(descriptor, "a+"))
        if free:
            descriptor, free = take_folder(lambda: open_folder(folder).descriptor)
            stack.callback(os.close, descriptor)
        if not free:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"{folder}: already in use by {holder}; wait for it, stop it, or choose another --name"
            )
        with disk_write(folder / LOCK):  # unbuffered: the close would write a buffer again after a failure
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _open(path: Path) -> int:
    """Open the lock's file, which is then truncated; refuses a link, and a file with a second name."""
    try:
        make_folder(path.parent)
        return open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, alone=True)
    except OSError as error:
        raise refusal(error, path) or UsageError(
            f"{path}: cannot be locked ({error.strerror}); it must be a file that this user may write"
        ) from None

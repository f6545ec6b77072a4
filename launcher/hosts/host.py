"""What the launcher asks of a machine that replicas run on, wherever that machine is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from launcher.devices.inventory import Driver, Gpu
    from launcher.errors import ConnectionLost
    from launcher.hosts.files import DiskSpace, HostFiles
    from launcher.hosts.usage import Usage


class Host(Protocol):
    """A machine that replicas run on: its files, its lock, its devices, and the way to its engine.

    Every method may raise EngineError where the machine is reached over a connection.
    """

    @property
    def address(self) -> str:
        """The URL that `--host` names it by; empty where its files are those of this machine."""

    @property
    def name(self) -> str:
        """Its name in messages; empty where its files are those of this machine."""

    @property
    def remote(self) -> bool:
        """Whether it is another machine, whose processes and devices are not to be seen from here."""

    @property
    def uid(self) -> int:
        """The uid that the launcher acts under there."""

    @property
    def owner(self) -> int:
        """The uid of the user whose replicas they are: behind `sudo`, of the user who typed it."""

    @property
    def files(self) -> HostFiles:
        """Its files."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables under which Docker's own client, and docker-py, reach its engine."""

    @property
    def engine_address(self) -> str:
        """The URL of its engine; raises EngineError for a Docker context that does not exist."""

    def gpus(self) -> tuple[Gpu, ...] | None:
        """Return its GPUs; None where they cannot be listed."""

    def driver(self) -> Driver | None:
        """Return its NVIDIA driver; None where that is not known."""

    def disk_space(self, path: Path) -> DiskSpace | None:
        """Return the free space at a path that need not exist yet; None where that is not known."""

    def owner_of(self, path: Path) -> int | None:
        """Return the uid of the owner of a folder, links followed; None where there is no folder."""

    def usage(self, pids: Mapping[str, int]) -> dict[str, Usage]:
        """Return what containers use, by id, as far as the kernel there tells; `pids` are their first processes."""

    def read_status(self, paths: Sequence[Path], most_bytes: int) -> Mapping[Path, bytes] | None:
        """Return the heads of files `<runs>/<folder>/<file>` that replicas write, following no link below `<runs>`.

        A file that is absent, or is no regular file, reads as empty. None where files there cannot be read safely.
        """

    def check_runs(self, runs: Path) -> None:
        """Raise UsageError for a path that cannot be the runs folder."""

    def replica_user(self, runs: Path, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as: what was asked, else what suits the runs folder."""

    def hold(self, runs: Path, user: str) -> AbstractContextManager[Callable[[], None]]:
        """Make the runs folder, and hold it and the machine against every other `up`.

        Gives the function that releases the machine before the block ends; the runs folder stays held.
        """

    def lost(self) -> ConnectionLost | None:
        """Return the error that tells why the connection has ended; None while there is one, or none is needed."""

"""The interface of a machine that replicas run on, this one or another."""

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
    """A machine that replicas run on: its files, its lock, its devices, and the address of its engine.

    Every method may raise EngineError if the machine is reached over a connection.
    """

    @property
    def address(self) -> str:
        """The URL from `--host`; empty if the host's files are this machine's."""

    @property
    def name(self) -> str:
        """The name in messages; empty if the host's files are this machine's."""

    @property
    def remote(self) -> bool:
        """Whether the host is another machine, whose processes and devices cannot be read from here."""

    @property
    def uid(self) -> int:
        """The launcher's uid on the host."""

    @property
    def owner(self) -> int:
        """The uid of the replicas' owner: under `sudo`, the uid of the user who called `sudo`."""

    @property
    def files(self) -> HostFiles:
        """The host's files."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables with which Docker's client and docker-py reach the host's engine."""

    @property
    def engine_address(self) -> str:
        """The URL of the host's engine; raises EngineError if the Docker context does not exist."""

    def gpus(self) -> tuple[Gpu, ...] | None:
        """Return the host's GPUs; None if they cannot be listed."""

    def driver(self) -> Driver | None:
        """Return the host's NVIDIA driver; None if unknown."""

    def disk_space(self, path: Path) -> DiskSpace | None:
        """Return the free space at a path that need not exist yet; None if unknown."""

    def owner_of(self, path: Path) -> int | None:
        """Return the uid of the owner of a folder, links followed; None if there is no folder."""

    def usage(self, pids: Mapping[str, int]) -> dict[str, Usage]:
        """Return the usage of containers by id, as far as the kernel reports it; `pids` are their first processes."""

    def read_status(self, paths: Sequence[Path], most_bytes: int) -> Mapping[Path, bytes] | None:
        """Return the heads of files `<runs>/<folder>/<file>`, which replicas write; follows no link below `<runs>`.

        A missing file, or one that is not regular, reads as empty. None if the host's files cannot be read safely.
        """

    def check_runs(self, runs: Path) -> None:
        """Raise UsageError for a path that cannot be the runs folder."""

    def replica_user(self, runs: Path, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as: `asked`, else chosen by the caller and the runs folder."""

    def hold(self, runs: Path, user: str) -> AbstractContextManager[Callable[[], None]]:
        """Make the runs folder, and hold it and the machine against every other `up`.

        Yields a function that unlocks the machine before the block ends; the runs folder stays locked.
        """

    def lost(self) -> ConnectionLost | None:
        """Return the error that says why the connection has ended; None if it is open, or if none is needed."""

"""Hosts that use this machine's files: this machine, and a machine whose engine is reached over the network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.hosts.address import engine_address
from launcher.hosts.files import LOCAL, DiskSpace, HostFiles, disk_space, read_below
from launcher.hosts.processes import caller_ids

if TYPE_CHECKING:
    from launcher.devices.inventory import Driver, Gpu
    from launcher.hosts.usage import Usage


class ThisMachine:
    """This machine. `environment` gives the address of its engine, as for Docker's own client."""

    address = name = ""
    remote = False

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.environment = environment
        self.files: HostFiles = LOCAL

    @property
    def uid(self) -> int:
        """The uid of this process."""
        return os.getuid()

    @property
    def owner(self) -> int:
        """The uid of the caller: under `sudo`, the uid of the user who called `sudo`."""
        return caller_ids()[0]

    @property
    def engine_address(self) -> str:
        """The URL of the engine; raises EngineError if the Docker context does not exist."""
        return engine_address(self.environment)

    def gpus(self) -> tuple[Gpu, ...] | None:
        """Return the GPUs that NVML lists; None if NVML does not answer."""
        from launcher.devices.inventory import read_gpus

        return read_gpus()

    def driver(self) -> Driver | None:
        """Return the NVIDIA driver; None if NVML does not answer."""
        from launcher.devices.inventory import read_driver

        return read_driver()

    def disk_space(self, path: Path) -> DiskSpace | None:
        """Return the free space at a path that need not exist yet."""
        return disk_space(path)

    def owner_of(self, path: Path) -> int | None:
        """Return the uid of the owner of a folder; None if there is no folder."""
        return path.stat().st_uid if os.path.isdir(path) else None

    def usage(self, pids: Mapping[str, int]) -> dict[str, Usage]:
        """Return the usage of containers from their control groups."""
        from launcher.hosts.usage import read_usage

        read = {key: read_usage(pid, key) for key, pid in pids.items()}
        return {key: usage for key, usage in read.items() if usage is not None}

    def read_status(self, paths: Sequence[Path], most_bytes: int) -> Mapping[Path, bytes] | None:
        """Return the heads of files `<runs>/<folder>/<file>` without following links below `<runs>`."""
        return {path: read_below(path, most_bytes) for path in paths}

    def check_runs(self, runs: Path) -> None:
        """Raise UsageError for a path that cannot be the runs folder."""
        from launcher.hosts.runs_folder import check_runs

        check_runs(runs)

    def replica_user(self, runs: Path, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as."""
        from launcher.hosts.runs_folder import replica_user

        return replica_user(runs, caller_ids(), asked)

    @contextlib.contextmanager
    def hold(self, runs: Path, user: str) -> Iterator[Callable[[], None]]:
        """Make the runs folder, and hold it and the machine against every other `up`."""
        from launcher.hosts.lock import host_lock
        from launcher.hosts.runs_folder import runs_folder

        with runs_folder(runs, user), host_lock() as lock:
            yield lock.release

    def lost(self) -> None:
        """Return None: no connection is needed."""
        return None


class TcpHost(ThisMachine):
    """A machine whose engine is reached over the network; its files are assumed to be the same as this machine's."""

    remote = True

    def gpus(self) -> None:
        """Return None: an engine does not list GPUs."""
        return None

    def driver(self) -> None:
        """Return None: an engine does not report drivers."""
        return None

    def usage(self, pids: Mapping[str, int]) -> dict[str, Usage]:
        """Return an empty dict: the host's control groups cannot be read."""
        return {}

    def read_status(self, paths: Sequence[Path], most_bytes: int) -> None:
        """Return None: only the engine can read what its containers write."""
        return None

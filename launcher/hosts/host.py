"""Where replicas run and results land: this machine, or a box behind ssh. What `up` must ask of a machine, either way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.devices.inventory import Gpu, read_gpus
from launcher.engines.base import Engine
from launcher.hosts.files import LOCAL, HostFiles
from launcher.hosts.lock import host_lock
from launcher.hosts.ownership import caller_ids
from launcher.hosts.runs_folder import check_runs, replica_user, runs_folder

Say = Callable[[str], None]


class HeldMachine(Protocol):
    """A machine held against every other `up`."""

    def release(self) -> None:
        """Let the next one go on; what was started is there to be seen."""


class Host(Protocol):
    """A machine and its runs folder."""

    @property
    def runs(self) -> Path:
        """The runs folder, absolute there."""

    @property
    def files(self) -> HostFiles:
        """Its files."""

    @property
    def address(self) -> str:
        """What `--host` names it by; empty for this machine."""

    def check_runs(self) -> None:
        """Raise UsageError for a runs folder that cannot be one."""

    def replica_user(self, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as: what was asked, else what suits the runs folder."""

    def gpus(self, engine: Engine) -> tuple[Gpu, ...] | None:
        """Return its GPUs; None where they cannot be listed."""

    def held(self, user: str, say: Say) -> contextlib.AbstractContextManager[HeldMachine]:
        """Make the runs folder, and hold it and the machine against every other `up`."""


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """This machine; also for an engine behind tcp, whose files are taken to be ours."""

    runs: Path
    files: HostFiles = LOCAL
    address: str = ""

    def check_runs(self) -> None:
        """Raise UsageError for a runs folder that cannot be one."""
        check_runs(self.runs)

    def replica_user(self, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as."""
        return replica_user(self.runs, caller_ids(), asked)

    def gpus(self, engine: Engine) -> tuple[Gpu, ...] | None:
        """Return NVML's list; None where it does not answer, or for an engine elsewhere."""
        return None if engine.remote else read_gpus()

    @contextlib.contextmanager
    def held(self, user: str, say: Say) -> Iterator[HeldMachine]:
        """Make the runs folder, and hold it and the machine against every other `up`."""
        with runs_folder(self.runs, user, say), host_lock(say) as lock:
            yield lock

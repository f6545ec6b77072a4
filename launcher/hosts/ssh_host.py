"""A machine behind ssh, as the place where replicas run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.devices.inventory import Gpu
from launcher.engines.base import Engine
from launcher.hosts import ssh_runs
from launcher.hosts.files import HostFiles, RemoteFiles
from launcher.hosts.host import HeldMachine, Say
from launcher.hosts.ssh_connection import SshConnection


@dataclass(frozen=True, slots=True)
class SshHost:
    """A machine behind ssh."""

    box: SshConnection
    runs: Path
    files: HostFiles

    @property
    def address(self) -> str:
        """What `--host` names it by."""
        return self.box.url

    def check_runs(self) -> None:
        """Raise UsageError for a folder that cannot be the runs folder there."""
        ssh_runs.check_remote_runs(self.box, self.runs)

    def replica_user(self, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as there."""
        return ssh_runs.remote_replica_user(self.box, self.runs, asked)

    def gpus(self, engine: Engine) -> tuple[Gpu, ...] | None:
        """Return what `nvidia-smi` lists there; None where it does not answer."""
        return ssh_runs.remote_gpus(self.box)

    @contextlib.contextmanager
    def held(self, user: str, say: Say) -> Iterator[HeldMachine]:
        """Make the runs folder there, and hold it and that machine against every other `up`."""
        with (
            ssh_runs.remote_runs_folder(self.box, self.runs, user, say),
            ssh_runs.remote_host_lock(self.box, say) as lock,
        ):
            yield lock


def ssh_host(box: SshConnection, runs: Path) -> SshHost:
    """Return the site on a box; a relative `runs` starts in the user's home folder there."""
    files = RemoteFiles(box)
    return SshHost(box, files.expand(files.start, str(runs)), files)

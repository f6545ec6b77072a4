"""Find the machine that replicas run on."""

from __future__ import annotations

from pathlib import Path

from launcher.hosts.address import open_box
from launcher.hosts.files import LOCAL
from launcher.hosts.host import Host, ThisMachine
from launcher.hosts.ssh_host import ssh_host


def find_host(engine: str, runs: Path) -> Host:
    """Return where the engine of this name runs replicas; connects to a box behind ssh.

    A relative `runs` starts in the working directory, or, as with scp, in the user's home folder there.
    """
    box = open_box() if engine == "docker" else None
    if box is None:
        return ThisMachine(LOCAL.expand(LOCAL.start, str(runs)))
    return ssh_host(box, runs)

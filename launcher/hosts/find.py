"""Find the machine that replicas run on."""

from __future__ import annotations

from pathlib import Path

from launcher.hosts.box_site import box_site
from launcher.hosts.host_files import LOCAL
from launcher.hosts.reach import open_box
from launcher.hosts.site import LocalSite, Site


def find_site(engine: str, runs: Path) -> Site:
    """Return where the engine of this name runs replicas; connects to a box behind ssh.

    A relative `runs` starts in the working directory, or, as with scp, in the user's home folder there.
    """
    box = open_box() if engine == "docker" else None
    if box is None:
        return LocalSite(LOCAL.expand(LOCAL.start, str(runs)))
    return box_site(box, runs)

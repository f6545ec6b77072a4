"""Which machine's engine is meant: `--host`, `DOCKER_HOST` or the Docker context.

An ssh address is reached by `launcher.hosts.ssh_connection`. `DOCKER_HOST` then names a socket here that leads there, so that whatever
talks to Docker in this process, or is started by it, reaches the box.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from launcher.errors import EngineError
from starling.core.errors import UsageError
from starling.core.paths import at_home
from starling.core.plain_json import read_json

if TYPE_CHECKING:
    from launcher.hosts.ssh_connection import SshConnection

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"

_SCHEMES = ("ssh", "tcp", "http", "https", "unix")

_box: SshConnection | None = None


def choose_host(url: str) -> None:
    """Make `--host` the engine's address for this process; raises UsageError for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not (parts.netloc or parts.path):
        raise UsageError(f"--host {url}: must be ssh://user@machine, tcp://machine:port or unix:///socket")
    if parts.scheme == "ssh":
        from launcher.hosts.ssh_connection import destination

        destination(url)
    os.environ["DOCKER_HOST"] = url


def remote_files(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the engine's machine is reached by ssh, so that its files can be asked about there."""
    return _box is not None or _ssh_url(environment) is not None


def box() -> SshConnection | None:
    """Return the machine that `open_box` has connected to."""
    return _box


def open_box() -> SshConnection | None:
    """Connect to the machine that an ssh address names, once a process; None for any other address.

    Raises EngineError with ssh's own words when that fails.
    """
    global _box
    url = None if _box is not None else _ssh_url(os.environ)
    if url is not None:
        from launcher.hosts.ssh_connection import SshConnection

        _box = SshConnection(url)
        os.environ["DOCKER_HOST"] = f"unix://{_box.docker_socket}"
        for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
            os.environ.pop(name, None)
    return _box


def engine_address(environment: Mapping[str, str] = os.environ) -> str:
    """Return where the engine is; raises EngineError for a Docker context that is not there."""
    return environment.get("DOCKER_HOST") or _context_host(environment) or DEFAULT_ADDRESS


def _ssh_url(environment: Mapping[str, str]) -> str | None:
    url = engine_address(environment)
    return url if url.startswith("ssh://") else None


def _context_host(environment: Mapping[str, str]) -> str | None:
    """Return the address in the current Docker context; None for the default one.

    Read here, since docker-py takes a context that it does not find for the default one, which is another machine.
    Raises EngineError for a context that is not there.
    """
    folder = Path(environment.get("DOCKER_CONFIG") or at_home("~/.docker"))
    name = environment.get("DOCKER_CONTEXT")
    if not name:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            name = read_json(folder / "config.json").get("currentContext")
    if not isinstance(name, str) or name in ("", "default"):
        return None
    meta = folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
    try:
        return str(read_json(meta)["Endpoints"]["docker"]["Host"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EngineError(
            f"Docker context {name}: is not there, or names no engine; `docker context ls` lists those that are"
        ) from None

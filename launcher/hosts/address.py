"""The address of an engine: from `--host`, else from DOCKER_HOST, else from the current Docker context."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from launcher.errors import EngineError
from starling.core.errors import UsageError
from starling.core.paths import at_home
from starling.core.plain_json import read_json

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"

_SCHEMES = ("ssh", "tcp", "http", "https", "unix")


def check_address(url: str) -> None:
    """Raise UsageError if the value of `--host` is no address."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not (parts.netloc or parts.path):
        raise UsageError(f"--host {url}: must be ssh://user@machine, tcp://machine:port or unix:///socket")
    if parts.scheme == "ssh":
        from launcher.hosts.ssh_connection import destination

        destination(url)


def engine_address(environment: Mapping[str, str] = os.environ) -> str:
    """Return the URL of the Docker engine; raises EngineError if the Docker context does not exist."""
    return environment.get("DOCKER_HOST") or _context_address(environment) or DEFAULT_ADDRESS


def podman_address(environment: Mapping[str, str], uid: int) -> str:
    """Return the URL of Podman's socket: CONTAINER_HOST or DOCKER_HOST, else the default socket of this user."""
    named = environment.get("CONTAINER_HOST") or environment.get("DOCKER_HOST")
    if named:
        return named
    run = "/run" if uid == 0 else environment.get("XDG_RUNTIME_DIR", f"/run/user/{uid}")
    return f"unix://{run}/podman/podman.sock"


def is_behind_ssh(given: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the Docker engine is reached by ssh; paths then are paths of its machine."""
    return (given or engine_address(environment)).startswith("ssh://")


def socket_path(address: str) -> str | None:
    """Return the path of a unix socket's address; None for any other address."""
    parts = urlsplit(address)
    return "/" + f"{parts.netloc}{parts.path}".lstrip("/") if parts.scheme == "unix" else None


def _context_address(environment: Mapping[str, str]) -> str | None:
    """Return the address in the current Docker context; None for the default context.

    docker-py falls back to the default context, another machine, if it does not find a context; this function raises
    EngineError instead.
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
            f"Docker context {name}: does not exist, or names no engine; `docker context ls` lists the contexts"
        ) from None

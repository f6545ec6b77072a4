"""The containers of a compose project, found by Compose's labels, never by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
ONE_OFF_LABEL = "com.docker.compose.oneoff"
ONCE_LABEL = "starling.once"
"""A label in our compose file: the service does one job and ends."""

_EXITED = re.compile(r"Exited \((\d+)\)")
_HEALTH = re.compile(r"\((?:health: )?(starting|healthy|unhealthy)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One container of a compose project."""

    id: str
    name: str
    """The service's name, not the container's."""
    image: str
    state: str
    """Docker's state: `running`, `exited`, `restarting`, …"""
    status: str
    """The status of `docker ps`: `Up 3 minutes (healthy)`."""
    once: bool = False
    """Whether the service does one job and ends."""
    networks: tuple[str, ...] = ()
    volumes: Mapping[str, str] = field(default_factory=dict)
    """Maps a target to the volume's name."""
    ports: Mapping[int, str] = field(default_factory=dict)
    """Maps a port inside to `address:port` outside."""

    @property
    def health(self) -> str:
        """`starting`, `healthy` or `unhealthy`; empty without a health check or if the container does not run."""
        found = _HEALTH.search(self.status)
        return found[1] if found else ""

    @property
    def exit_code(self) -> int | None:
        """The exit code; None if the container has not ended."""
        found = _EXITED.match(self.status)
        return int(found[1]) if found else None

    @property
    def well(self) -> bool:
        """Whether the service has done its one job, or runs and passes its health check if it has one."""
        return self.done or self.up

    @property
    def done(self) -> bool:
        """Whether the service has done its one job."""
        return self.once and self.exit_code == 0

    @property
    def up(self) -> bool:
        """Whether the service runs, and passes its health check if it has one."""
        return self.state == "running" and self.health in ("", "healthy")


def labels_of(project: str) -> list[str]:
    """Return the labels of a project's containers, which exclude one-off containers (`compose run`)."""
    return [f"{PROJECT_LABEL}={project}", f"{ONE_OFF_LABEL}=False"]


def read_services(containers: Iterable[Mapping[str, Any]]) -> Sequence[Service]:
    """Return a project's containers from Docker's list, sorted by service."""
    return sorted(map(_service, containers), key=lambda service: service.name)


def _service(item: Mapping[str, Any]) -> Service:
    return Service(
        id=item["Id"],
        name=item["Labels"][SERVICE_LABEL],
        image=item["Image"],
        state=item["State"],
        status=item["Status"],
        once=item["Labels"].get(ONCE_LABEL) == "true",
        networks=tuple((item.get("NetworkSettings") or {}).get("Networks") or ()),
        volumes={
            mount["Destination"]: mount["Name"]
            for mount in item.get("Mounts") or ()
            if mount.get("Type") == "volume"
        },
        ports={
            port["PrivatePort"]: f"{port['IP']}:{port['PublicPort']}"
            for port in item.get("Ports") or ()
            if port.get("PublicPort") and ":" not in port.get("IP", "")
        },
    )

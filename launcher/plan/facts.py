"""The facts that `up` decides on, as a plain value that tests can construct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.devices.holders import GpuHolder
from launcher.devices.inventory import Driver, Gpu, Machine
from launcher.engines.base import Image, ReplicaState
from launcher.hosts.access import PathState, ReadPath
from launcher.hosts.files import DiskSpace
from starling.core.errors import StarlingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusals:
    """What the engine refuses or lacks, as its errors; None if the check passed or was not made."""

    image: StarlingError | None = None
    network: StarlingError | None = None
    trainer: StarlingError | None = None
    gpu_runtime: StarlingError | None = None
    names: StarlingError | None = None
    """The error if a container that is not our replica has a replica's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretFile:
    """A file with a password or keys that a variable of the user names. The launcher never reads the file."""

    variable: str
    path: Path
    is_file: bool
    state: PathState | None = None
    """None if permissions are not checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """The permissions of the data and the runs folder."""

    reads: tuple[ReadPath, ...] = ()
    runs: tuple[PathState, ...] = ()
    """The runs folder and the fleet's folders in it, as far as they exist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The machine, its devices and their holders, its engine, the existing replicas, and the host's paths."""

    machine: Machine
    engine: str = "docker"
    """The name of the engine that answers."""
    behind_ssh: bool = False
    """Whether paths are on another machine."""
    uid: int = 0
    """The launcher's uid on the machine."""
    owner: int = 0
    """The uid of the replicas' owner."""
    gpus: tuple[Gpu, ...] | None = None
    """None if they cannot be listed."""
    driver: Driver | None = None
    """None if unknown or not needed."""
    holders: tuple[GpuHolder, ...] = ()
    """The holders of GPUs, without the fleet's own replicas."""
    existing: tuple[ReplicaState, ...] = ()
    """The fleet's existing replicas."""
    others: tuple[ReplicaState, ...] = ()
    """The replicas of the caller's other fleets."""
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """The variables that the fleet's live replicas were started with, by id."""
    image: Image | None = None
    """None if the image is missing."""
    refusals: Refusals = Refusals()
    secrets: tuple[SecretFile, ...] = ()
    runs_owner: int | None = None
    """The uid of the owner of the runs folder; None if the folder does not exist yet."""
    disk: DiskSpace | None = None
    """The free space of the disk of the runs folder; None if it is not checked."""
    access: Access | None = None
    """None if permissions are not checked: on another machine, or if the engine maps user ids."""

"""What `up` has found out before it decides: a value, which a test can write down."""

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
    """What the engine refuses or lacks, in its own words; None for what is as it should be, or was not asked."""

    image: StarlingError | None = None
    network: StarlingError | None = None
    trainer: StarlingError | None = None
    gpu_runtime: StarlingError | None = None
    names: StarlingError | None = None
    """Something that is not a replica of ours has the name of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretFile:
    """A file with a password or keys that a variable of the user names. Nobody here reads it."""

    variable: str
    path: Path
    is_file: bool
    state: PathState | None = None
    """None where permissions are not judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may read the data and write the runs folder."""

    reads: tuple[ReadPath, ...] = ()
    runs: tuple[PathState, ...] = ()
    """The runs folder and the fleet's folders in it, as far as they are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The machine, its devices and who holds them, its engine, the replicas that are there, and the host's paths."""

    machine: Machine
    engine: str = "docker"
    """The name of the engine that answers."""
    behind_ssh: bool = False
    """Whether paths are those of another machine."""
    uid: int = 0
    """The uid that the launcher acts under on the machine."""
    owner: int = 0
    """The uid of the user whose replicas they will be."""
    gpus: tuple[Gpu, ...] | None = None
    """None where they cannot be listed."""
    driver: Driver | None = None
    """None where it is not known, or does not matter."""
    holders: tuple[GpuHolder, ...] = ()
    """Who holds GPUs, but for the fleet's own replicas."""
    existing: tuple[ReplicaState, ...] = ()
    """The fleet's replicas that are there."""
    others: tuple[ReplicaState, ...] = ()
    """The replicas of the caller's other fleets."""
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """The variables that the fleet's living replicas were started with, by id."""
    image: Image | None = None
    """None where the image is missing."""
    refusals: Refusals = Refusals()
    secrets: tuple[SecretFile, ...] = ()
    runs_owner: int | None = None
    """The uid of the owner of the runs folder; None where there is no such folder yet."""
    disk: DiskSpace | None = None
    """The free space of the disk of the runs folder; None where it is not judged."""
    access: Access | None = None
    """None where permissions are not judged: on another machine, or where the engine maps user ids."""

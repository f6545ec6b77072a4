"""The one seam to whatever runs replicas: what an engine is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from starling.core.sizes import format_cores

if TYPE_CHECKING:
    from launcher.devices.devices import Device
    from launcher.devices.holders import GpuHolder
    from launcher.devices.inventory import Machine
    from launcher.hosts.host import Host
    from launcher.hosts.usage import Usage

Phase = Literal["created", "running", "paused", "exited"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A path of the host, or a volume of the engine, inside a replica."""

    source: str
    """The path; a volume's name."""
    target: str
    read_only: bool = True
    kind: Literal["bind", "volume"] = "bind"

    def public(self) -> dict[str, Any]:
        """Return the mount as plain values; a path's as they always were, so that no digest changes."""
        values = {"source": self.source, "target": self.target, "read_only": self.read_only}
        return values if self.kind == "bind" else {"kind": self.kind, **values}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A present image, and what it says of itself."""

    name: str = ""
    """As the user named it; empty on the local engine."""
    id: str = ""
    trainer: bool = False
    """Whether its label says that our trainer is in it."""
    cuda: str | None = None
    """The CUDA that its torch was built for, `13.0`; None where it does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """Everything that one replica is; two equal specs run the same thing in the same place."""

    name: str
    fleet: str
    device: Device
    image: str
    """The image as the user named it; empty on the local engine."""
    image_id: str
    """What that name meant when the plan was made: a rebuilt image is a changed spec."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Set by the launcher; nothing in it is secret."""
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The user's own variables. Only their names are ever shown, labelled or hashed."""
    mounts: tuple[Mount, ...] = ()
    runs: Path
    """The host's runs folder."""
    user: str = ""
    """`uid:gid`."""
    cores: tuple[int, ...] = ()
    """The cores it is pinned to; empty: all."""
    memory_bytes: int = 0
    shm_bytes: int = 0
    tmp_bytes: int = 0
    pids_limit: int = 4096
    network: str = "bridge"

    def public(self) -> dict[str, Any]:
        """Return the spec as plain values without a secret: what is shown, labelled, hashed and compared."""
        from starling.core.redaction import masked

        return {
            "replica": self.name,
            "fleet": self.fleet,
            "device": self.device.label,
            "uuids": list(self.device.uuids),
            "image": self.image,
            "image_id": self.image_id,
            "command": [masked(word) for word in self.command],
            "environment": dict(sorted(self.environment.items())),
            "passed_environment": sorted(self.passed),
            "mounts": [mount.public() for mount in self.mounts],
            "runs": str(self.runs),
            "user": self.user,
            "cores": format_cores(self.cores),
            "memory_bytes": self.memory_bytes,
            "shm_bytes": self.shm_bytes,
            "tmp_bytes": self.tmp_bytes,
            "pids_limit": self.pids_limit,
            "network": self.network,
        }

    def public_json(self) -> str:
        """Return `public()` in its one canonical spelling."""
        return json.dumps(self.public(), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `public_json()`, in hex."""
        return hashlib.sha256(self.public_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaState:
    """What an engine says of one of our replicas."""

    id: str
    name: str
    fleet: str
    device: str
    phase: Phase
    exit_code: int | None = None
    """None unless exited, or when nobody saw the end."""
    oom_killed: bool = False
    memory_bytes: int = 0
    started_at: float | None = None
    """Unix seconds."""
    pid: int = 0
    """Of its first process while it runs, as the engine's machine counts; 0: unknown."""
    plan: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The `public()` spec it was created from."""

    @property
    def runs(self) -> Path:
        """The host's runs folder."""
        return Path(self.plan["runs"])

    @property
    def live(self) -> bool:
        """Whether it holds its device now."""
        return self.phase in ("running", "paused")

    @property
    def stopped(self) -> bool:
        """Whether it ended because it was asked to, after saving: the same `up` goes on with it."""
        return self.phase == "exited" and self.exit_code in (130, 143) and not self.oom_killed

    @property
    def well(self) -> bool:
        """Whether it is as it should be: at work, done, or stopped by its owner."""
        return self.phase == "running" or self.finished or self.stopped

    @property
    def finished(self) -> bool:
        """Whether it ended well: an out-of-memory kill of a child leaves exit code 0 behind and is no success."""
        return self.phase == "exited" and self.exit_code == 0 and not self.oom_killed


class LogLine(str):
    """A line of a replica's output, and when it was said; a plain string to whoever does not ask."""

    at: float | None
    """Unix seconds by the engine's clock; None where it does not tell."""

    def __new__(cls, text: str, at: float | None = None) -> LogLine:
        """Return the line without its end."""
        line = super().__new__(cls, text)
        line.at = at
        return line


class Engine(Protocol):
    """Create, start, watch and end replicas. Every method raises EngineError for an engine that fails.

    Ids are the engine's own and never reused. Asking for the end of something that has vanished is fine.
    """

    name: str

    @property
    def host(self) -> Host:
        """The machine that its replicas run on."""

    def machine(self) -> Machine:
        """Return the cores and the memory that replicas can have."""

    def resolve_image(self, image: str) -> Image:
        """Return a present image; never fetches one."""

    def check_trainer(self, image: Image, script: str) -> None:
        """Raise unless our trainer, whose command is `script`, is in the image."""

    def check_gpu_runtime(self, image: Image) -> None:
        """Raise when the engine cannot hand a GPU to a replica of this image."""

    def check_network(self, network: str) -> None:
        """Raise unless the network is there."""

    def check_names(self, names: Sequence[str]) -> None:
        """Raise NameTaken when something that is not ours holds one of these names."""

    def create(self, spec: ReplicaSpec) -> str:
        """Make a replica that does not run yet and return its id; raises NameTaken."""

    def start(self, replica_id: str) -> None:
        """Run a created replica."""

    def list(self) -> list[ReplicaState]:
        """Return our replicas and nobody else's, by name."""

    def gpu_holders(self) -> Sequence[GpuHolder]:
        """Return who was given which GPUs by this engine: everybody, not only us."""

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return one of our replicas; None when it has vanished."""

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return the environment a replica was started with; None when that cannot be known any more."""

    def usage(self, states: Sequence[ReplicaState]) -> Mapping[str, Usage]:
        """Return by id what running replicas use now; those that nothing is known of are left out."""

    def logs(
        self, replica_id: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Iterator[LogLine]:
        """Yield lines of output; with `follow`, until the replica ends. Reading never disturbs it.

        `since` is Unix seconds: only lines that were said from then on; of these, `tail` takes the last.
        """

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM."""

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL."""

    def remove(self, replica_id: str) -> None:
        """Kill it if it runs, and leave nothing of it behind."""

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a plain file of at most `most_bytes`, as a replica sees it; empty for anything else, also a link."""

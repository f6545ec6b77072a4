"""Replicas as Docker containers. The containers' labels are the launcher's only database."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import requests
import urllib3.exceptions
from docker.errors import APIError

from launcher.engines.base import Image, LogLine, Phase, ReplicaSpec, ReplicaState
from launcher.engines.docker.connection import Connection, Manner
from launcher.engines.docker.troubles import is_gone, is_idle, refusal
from launcher.engines.labels import (
    DEVICE_LABEL,
    FLEET_LABEL,
    FORMAT,
    FORMAT_LABEL,
    OWNER_LABEL,
    REPLICA_LABEL,
    in_use_by,
    is_ours,
    plan_of,
)
from launcher.errors import ConnectionLost, EngineError, NameTaken
from launcher.parallel import in_parallel
from starling.core.units import parse_stamp
from starling.core.words import printable

if TYPE_CHECKING:
    from launcher.devices.holders import GpuHolder
    from launcher.devices.inventory import Machine
    from launcher.engines.docker.services import Service
    from launcher.hosts.host import Host
    from launcher.hosts.usage import Usage

RETURN_S = 20.0
"""How long a follower of a log waits for an engine that restarts."""

_PHASES: dict[str, Phase] = {
    "created": "created",
    "initialized": "created",
    "running": "running",
    "restarting": "running",
    "paused": "paused",
    "stopping": "running",
}


class DockerEngine:
    """The Docker engine of a host.

    Raises EngineError at once if it does not answer. Modules that only some commands need are imported in functions.
    """

    name = "docker"
    manner = Manner(
        title="Docker",
        remedy="start it (sudo systemctl start docker), check DOCKER_HOST and that you may use its socket (group docker); "
        "or use --engine local",
        has_group=True,
    )

    def __init__(self, owner: int, host: Host) -> None:
        self.host = host
        self._owner = owner
        self._to = Connection(self.manner, host)
        self._told: dict[str, Any] | None = None

    @property
    def is_podman(self) -> bool:
        """Whether Podman answers at Docker's address."""
        return self._to.is_podman

    def machine(self) -> Machine:
        """Return the cores and the memory of the engine's host."""
        from launcher.devices.inventory import Machine
        from launcher.engines.docker.checks import maps_users

        about = self._about()
        return Machine(
            cores=tuple(range(about["NCPU"])),
            memory_bytes=about["MemTotal"],
            maps_users=maps_users(about),
        )

    def _about(self) -> Mapping[str, Any]:
        """Return the engine's `info` about itself and its host; read once per command."""
        if self._told is None:
            with self._to.translated():
                self._told = dict(self._to.client.info())
        return self._told

    def resolve_image(self, image: str) -> Image:
        """Return an image that the engine has; never pulls an image."""
        from launcher.engines.docker.checks import find_image

        with self._to.translated(f"image {image}"):
            return find_image(self._to.client, image)

    def check_trainer(self, image: Image, script: str) -> None:
        """Raise EngineError for an image without our trainer; looks for the trainer's script if there is no label."""
        from launcher.engines.docker.checks import require_trainer

        with self._to.translated(f"image {image.name}"):
            require_trainer(self._to.client, image, script)

    def check_gpu_runtime(self, image: Image) -> None:
        """Raise EngineError if the engine has no GPU runtime; starts a container to find out if `info` does not say."""
        from launcher.engines.docker.checks import require_gpu_runtime

        with self._to.translated("GPU runtime"):
            require_gpu_runtime(self._to.client, self._about(), image, remote=self.host.remote)

    def check_network(self, network: str) -> None:
        """Raise EngineError unless the engine has the network."""
        with self._to.translated(f"network {network}"):
            names = sorted(item["Name"] for item in self._to.client.networks())
        if network not in names:
            raise EngineError(f"--network {network}: no such network; there are: {', '.join(names)}")

    def check_names(self, names: Sequence[str]) -> None:
        """Raise NameTaken if a container that is not this owner's replica has one of these names."""
        wanted = set(names)
        with self._to.translated():
            # The engine's filter treats a name as a pattern and also finds parts of names.
            found = self._to.containers(name=list(names)) if names else []
        for container in found:
            for name in wanted & {item.lstrip("/") for item in container.get("Names") or ()}:
                if not is_ours(container.get("Labels") or {}, name, self._owner):
                    raise self._name_taken(name)

    def create(self, spec: ReplicaSpec) -> str:
        """Create the container with all hardening options; raises NameTaken."""
        from launcher.engines.docker.container_options import container_options

        with self._to.translated(spec.name):
            try:
                client = self._to.client
                made = client.create_container(**container_options(spec, self._owner, client.api_version))
            except APIError as error:
                if error.status_code == 409:
                    raise self._name_taken(spec.name) from None
                raise
        return str(made["Id"])

    def start(self, replica_id: str) -> None:
        """Start a container; after a failure it stays in `created`, and the caller removes it."""
        with self._to.translated():
            try:
                self._to.client.start(replica_id)
            except APIError as error:
                from launcher.engines.docker.checks import GPU_REMEDY, NO_GPU_RUNTIME

                text = refusal(error)
                if NO_GPU_RUNTIME in text:
                    raise EngineError(f"Docker has no GPU runtime; {GPU_REMEDY}") from None
                if "nvidia-container-cli" in text:
                    detail = text.split("nvidia-container-cli:", 1)[1].splitlines()[0].strip()
                    raise EngineError(
                        f"the NVIDIA runtime refuses the device: {detail}; `nvidia-smi -L` lists those that exist"
                    ) from None
                raise

    def list(self) -> list[ReplicaState]:
        """Return this owner's replicas, sorted by name."""
        with self._to.translated():
            found = self._to.containers(label=[f"{FORMAT_LABEL}={FORMAT}", f"{OWNER_LABEL}={self._owner}"])
        states = [done.value for done in in_parallel(self.state, [item["Id"] for item in found])]
        return sorted((state for state in states if state is not None), key=_natural)

    def gpu_holders(self) -> Sequence[GpuHolder]:
        """Return the GPUs of each container of this engine, other users' included."""
        from launcher.engines.docker.gpu_containers import HOLDING, container_holder

        with self._to.translated():
            found = self._to.containers()
        ids = [item["Id"] for item in found if item["State"] in (*HOLDING, "created")]
        inspected = filter(None, map(self._inspect, ids))
        return [holder for item in inspected if (holder := container_holder(item, self._owner)) is not None]

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return the current state of one of our containers; None for any other container."""
        inspected = self._inspect(replica_id)
        if inspected is None:
            return None
        found: dict[str, str] = inspected["Config"].get("Labels") or {}
        name = inspected["Name"].lstrip("/")
        if not is_ours(found, name, self._owner):
            return None
        state = inspected["State"]
        phase = _PHASES.get(state["Status"], "exited")
        return ReplicaState(
            id=inspected["Id"],
            name=found[REPLICA_LABEL],
            fleet=found[FLEET_LABEL],
            device=found[DEVICE_LABEL],
            phase=phase,
            exit_code=int(state["ExitCode"]) if phase == "exited" else None,
            oom_killed=bool(state.get("OOMKilled")),
            memory_bytes=int(inspected["HostConfig"].get("Memory") or 0),
            started_at=parse_stamp(state.get("StartedAt", "")),
            pid=int(state.get("Pid") or 0),
            plan=plan_of(found) or {},
        )

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return the container's environment."""
        inspected = self._inspect(replica_id)
        if inspected is None:
            return None
        return dict(item.split("=", 1) for item in inspected["Config"].get("Env") or [] if "=" in item)

    def usage(self, states: Sequence[ReplicaState]) -> Mapping[str, Usage]:
        """Return the usage of running containers, from their control groups if readable, else from the engine."""
        live = {state.id: state.pid for state in states if state.live}
        found = self.host.usage(live)
        elsewhere = [replica_id for replica_id in live if replica_id not in found]
        if not elsewhere:
            return found
        from launcher.engines.docker.stats import ask_usage

        return found | ask_usage(self._stats, elsewhere)

    def _stats(self, replica_id: str) -> Mapping[str, Any]:
        return dict(self._to.client.stats(replica_id, stream=False, one_shot=True))

    def logs(
        self, replica_id: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Iterator[LogLine]:
        """Yield whole lines, also across restarts of the engine."""
        from launcher.engines.docker.logs import read_log

        yield from read_log(
            lambda follow, options: self._log_frames(replica_id, follow, options),
            lambda: self._runs(replica_id),
            follow=follow,
            tail=tail,
            since=since,
        )

    def _runs(self, replica_id: str) -> bool:
        """Return whether the container runs; waits for an engine that restarts."""
        until = time.monotonic() + RETURN_S
        while True:
            try:
                inspected = self._inspect(replica_id)
                return inspected is not None and bool(inspected["State"]["Running"])
            except EngineError as error:
                if isinstance(error, ConnectionLost) or time.monotonic() > until:
                    raise
                time.sleep(0.25)

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM to PID 1, `init`, which passes the signal to the trainer."""
        self._signal(replica_id, "SIGTERM")

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL."""
        self._signal(replica_id, "SIGKILL")

    def remove(self, replica_id: str) -> None:
        """Kill and remove a container; no error if it is already removed or being removed."""
        with self._to.translated():
            try:
                self._to.client.remove_container(replica_id, force=True, v=True)
            except APIError as error:
                if not (is_gone(error) or "already in progress" in refusal(error)):
                    raise

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the engine's `info` and `version`."""
        with self._to.translated():
            return self._to.client.info(), self._to.client.version()

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a file of a container, running or not, from the archive that the engine makes."""
        from launcher.engines.docker.archives import read_archived_file

        with self._to.translated():
            return read_archived_file(self._to.client, replica_id, path, most_bytes)

    def services(self, project: str) -> Sequence[Service]:
        """Return the containers of a compose project, sorted by service."""
        from launcher.engines.docker.services import labels_of, read_services

        with self._to.translated():
            return read_services(self._to.containers(label=labels_of(project)))

    def _signal(self, replica_id: str, signal: str) -> None:
        with self._to.translated():
            try:
                self._to.client.kill(replica_id, signal)
            except APIError as error:
                if not (is_idle(error) or is_gone(error)):  # an ended container needs no signal
                    raise

    def _inspect(self, replica_id: str) -> dict[str, Any] | None:
        with self._to.translated():
            try:
                return dict(self._to.client.inspect_container(replica_id))
            except APIError as error:
                if is_gone(error):
                    return None
                raise

    def _name_taken(self, name: str) -> NameTaken:
        """Return the error that names the holder of this name: another user's fleet, or another container."""
        inspected: dict[str, Any] = {}
        with contextlib.suppress(EngineError):
            inspected = self._inspect(name) or {}
        found = (inspected.get("Config") or {}).get("Labels") or {}
        stranger = in_use_by(found, name, remote=self.host.remote)
        if stranger and not is_ours(found, name, self._owner):
            return NameTaken(stranger)
        fleet = f"fleet {printable(found[FLEET_LABEL])}, " if FLEET_LABEL in found else ""
        holder = (
            f"container {inspected['Id'][:12]} ({fleet}image {printable(inspected['Config']['Image'])})"
            if inspected
            else "another container"
        )
        return NameTaken(
            f"{name}: this name is held by {holder}, which stays unchanged: "
            "rename or remove it, or give the training another --name"
        )

    def _log_frames(self, replica_id: str, follow: bool, options: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the log's frames until the stream ends or, with `follow`, breaks off."""
        with self._to.translated():
            try:
                yield from self._to.client.logs(
                    replica_id, stream=True, follow=follow, timestamps=True, **options
                )
            except APIError as error:
                if not is_gone(error):
                    raise
            except (requests.ConnectionError, urllib3.exceptions.HTTPError):
                if not follow:
                    raise


def _natural(state: ReplicaState) -> tuple[str, int, str]:
    """Sort gpu2 before gpu10."""
    number = state.device.split(":", 1)[1]
    return state.fleet, int(number) if number.isdigit() else -1, state.name

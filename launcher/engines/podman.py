"""Replicas as Podman's containers, through its Docker-compatible socket. Only the differences to Docker are here.

Containers are created through Podman's own API on the same socket. Podman 4's version of Docker's API silently drops a
requested GPU, and has no field for the log's size limit or a rootless user's mapping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from docker.errors import APIError

from launcher.engines.base import Image, LogLine, Mount, ReplicaSpec
from launcher.engines.docker.connection import Manner
from launcher.engines.docker.docker import DockerEngine
from launcher.engines.docker.troubles import refusal
from launcher.engines.hardening import Scratch, log, podman_body, scratch
from launcher.engines.labels import labels
from launcher.engines.limits import CDI_GPU
from launcher.errors import EngineError
from launcher.hosts.host import Host

DOCKER_API, NATIVE_API = "1.41", "v4.0.0"
"""Podman 4 and 5 support both versions; asking Podman for its version makes it start several programs."""

LOCK_TIMEOUT_S = 20.0
"""A request about a container waits while Podman acts on it; the first ping of the service has a shorter limit."""

GPU_REMEDY = (
    "describe this machine's GPUs to Podman: sudo nvidia-ctk cdi generate --device-name-strategy=uuid "
    "--output=/etc/cdi/nvidia.yaml "
    "(`nvidia-ctk cdi list` shows what there is); or use --cpu N"
)


class PodmanEngine(DockerEngine):
    """The Podman service of a host.

    Raises EngineError at once if it does not answer, or if another engine answers.
    """

    name = "podman"
    manner = Manner(
        title="Podman",
        remedy="start it (systemctl --user start podman.socket, as root without --user), or check CONTAINER_HOST; "
        "or use --engine local",
        version=DOCKER_API,
        patience_s=LOCK_TIMEOUT_S,
    )

    def __init__(self, owner: int, host: Host) -> None:
        self._rootless: bool | None = None
        super().__init__(owner, host)
        if not self.is_podman:
            raise EngineError(f"{host.engine_address}: the engine there is not Podman; use --engine docker")

    def resolve_image(self, image: str) -> Image:
        """Return an image that the engine has; never pulls an image."""
        try:
            return super().resolve_image(image)
        except EngineError as error:
            if not str(error).startswith("no image"):
                raise
        raise EngineError(
            f"no image {image} here, and none is ever pulled; in the project's folder: podman build -t {image} .  "
            f"(or bring it over: docker save {image} | podman load; or name another with --image)"
        )

    def check_gpu_runtime(self, image: Image) -> None:
        """Accept every image: Podman looks a device up only when it starts a container."""

    def check_network(self, network: str) -> None:
        """Raise EngineError unless the engine has the network; `bridge` is Podman's default."""
        if network not in ("", "bridge", "host", "none"):
            super().check_network(network)

    def create(self, spec: ReplicaSpec) -> str:
        """Create the container with all hardening options; raises NameTaken."""
        client = self._to.client
        with self._to.translated(spec.name):
            try:
                made = client.post(
                    f"{client.base_url}/{NATIVE_API}/libpod/containers/create",
                    json=container_specification(spec, self._owner, rootless=self._is_rootless()),
                ).json()
            except APIError as error:
                if "already in use" in refusal(error):
                    raise self._name_taken(spec.name) from None
                raise
        return str(made["Id"])

    def start(self, replica_id: str) -> None:
        """Start a container; after a failure it stays in `created`, and the caller removes it."""
        try:
            super().start(replica_id)
        except EngineError as error:
            if "CDI" in str(error):
                raise EngineError(f"Podman does not know the device; {GPU_REMEDY}") from None
            raise

    def remove(self, replica_id: str) -> None:
        """Kill and remove a container; Podman's forced removal alone sends SIGTERM first and waits ten seconds."""
        self.kill(replica_id)
        super().remove(replica_id)

    def logs(
        self, replica_id: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Iterator[LogLine]:
        """Yield whole lines. `tail` is applied here: Podman's joins an unfinished last line to the line before."""
        if follow or tail is None:
            return super().logs(replica_id, follow=follow, tail=tail, since=since)
        return iter(deque(super().logs(replica_id, since=since), maxlen=tail))

    def _is_rootless(self) -> bool:
        if self._rootless is None:
            about = self._about()
            self._rootless = bool(about.get("Rootless"))
            if self._rootless and about.get("CgroupVersion") == "1":
                raise EngineError(
                    "Podman without root cannot limit memory on this machine (cgroup v1), and replicas are never started "
                    "without a limit; use cgroup v2, Podman's root service, or --engine local"
                )
        return self._rootless


def container_specification(spec: ReplicaSpec, owner: int, *, rootless: bool) -> dict[str, Any]:
    """Return the body of Podman's `create` request, with the same limits as `container_options`."""
    kept = log("podman")
    body: dict[str, Any] = {
        **podman_body(spec),
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "labels": labels(spec, owner),
        "env": {**spec.passed, **spec.environment},
        "terminal": False,
        "stdin": False,
        "mounts": [*map(_scratch, scratch(spec, "podman")), *map(_bind, spec.mounts)],
        "log_configuration": {"driver": kept.driver, "size": int(kept.options["max-size"])},
        **_network(spec.network),
    }
    if spec.device.kind == "gpu":
        body["devices"] = [{"path": CDI_GPU.format(handle)} for handle in spec.device.handles]
    if rootless:
        # Without keep-id, the user inside maps to another id outside, and no known user would own the results.
        body["userns"] = {"nsmode": "keep-id"}
    return body


def _network(network: str) -> dict[str, Any]:
    if network in ("", "bridge"):
        return {}  # root's default bridge, or a rootless user's default network
    if network in ("host", "none"):
        return {"netns": {"nsmode": network}}
    return {"netns": {"nsmode": "bridge"}, "networks": {network: {}}}


def _scratch(folder: Scratch) -> dict[str, Any]:
    return {
        "type": "tmpfs",
        "source": "tmpfs",
        "destination": folder.place,
        "options": list(folder.options),
    }


def _bind(mount: Mount) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": mount.source,
        "destination": mount.target,
        "options": ["rbind", "ro" if mount.read_only else "rw"],
    }

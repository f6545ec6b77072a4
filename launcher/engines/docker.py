"""Replicas as containers. The engine's labels are the launcher's only database."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import docker
import docker.errors
import docker.types
import requests.exceptions
import urllib3.exceptions

from launcher.claims import Claim
from launcher.devices import format_cores
from launcher.engines import docker_checks as checks
from launcher.engines.archives import read_archived_file
from launcher.engines.base import Image, Phase, ReplicaSpec, ReplicaState
from launcher.engines.gpu_containers import HOLDING, container_claim
from launcher.engines.limits import LOG_FILE_SIZE, LOG_FILES
from launcher.errors import EngineError, NameTaken
from launcher.inventory import Machine
from launcher.ownership import (
    DEVICE_LABEL,
    FLEET_LABEL,
    FORMAT,
    FORMAT_LABEL,
    OWNER_LABEL,
    REPLICA_LABEL,
    is_ours,
    labels,
    plan_of,
)
from launcher.reach import box

ANSWER_TIMEOUT_S = 3.0
"""A socket that has not answered a question by then is hung; `status` must say so within 5 s."""

ACTION_TIMEOUT_S = 120.0
"""Creating and starting may wait for disks and drivers."""

_DENIED = "permission denied"

_PHASES: dict[str, Phase] = {
    "created": "created",
    "running": "running",
    "restarting": "running",
    "paused": "paused",
}

_TRANSPORT = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError)


class DockerEngine:
    """The Docker engine that DOCKER_HOST or the current Docker context names.

    Raises EngineError at once when it does not answer.
    """

    name = "docker"

    def __init__(self, owner: int) -> None:
        self._owner = owner
        # docker-py's clients are not made for several threads at once: each thread has its own.
        self._clients = threading.local()
        with _translated("Docker"):
            # Its API version is negotiated here, so this is also the first question.
            first = docker.DockerClient.from_env(timeout=ANSWER_TIMEOUT_S)
            self._api_version = first.api.api_version
            checks.refuse_old(first, self._api_version)
        self._clients.asking = first
        self._told: dict[str, Any] | None = None

    @property
    def remote(self) -> bool:
        """Whether DOCKER_HOST or the context leads to another machine."""
        scheme = urlsplit(self._client.api.base_url).scheme
        return box() is not None or not scheme.startswith(
            ("http+docker", "http+unix", "unix", "npipe", "http+npipe")
        )

    def machine(self) -> Machine:
        """Return the cores and the memory of the engine's host."""
        about = self._about()
        return Machine(
            cores=tuple(range(about["NCPU"])),
            memory_bytes=about["MemTotal"],
            maps_users=checks.maps_users(about),
        )

    def _about(self) -> Mapping[str, Any]:
        """Return what the engine says of itself and its host; asked once a command."""
        if self._told is None:
            with _translated("Docker"):
                self._told = dict(self._client.info())
        return self._told

    def resolve_image(self, image: str) -> Image:
        """Return a present image; never pulls."""
        with _translated(f"image {image}"):
            return checks.find_image(self._client, image)

    def check_trainer(self, image: Image, script: str) -> None:
        """Raise EngineError for an image without our trainer; looks for its script where no label tells."""
        with _translated(f"image {image.name}"):
            checks.require_trainer(self._acting(), image, script)

    def check_gpu_runtime(self, image: Image) -> None:
        """Raise EngineError when the engine has no runtime that hands out GPUs; asks by a start where it is not told."""
        with _translated("GPU runtime"):
            checks.require_gpu_runtime(self._acting(), self._about(), image, remote=self.remote)

    def check_network(self, network: str) -> None:
        """Raise EngineError unless the engine has the network."""
        with _translated(f"network {network}"):
            names = sorted(item.name for item in self._client.networks.list())
        if network not in names:
            raise EngineError(f"--network {network}: no such network; there are: {', '.join(names)}")

    def create(self, spec: ReplicaSpec) -> str:
        """Create the container with all of engine-side hardening; raises NameTaken."""
        with _translated(spec.name):
            try:
                container = self._acting().containers.create(**container_options(spec, self._owner))
            except docker.errors.APIError as error:
                if error.status_code == 409:
                    raise NameTaken(
                        f"{spec.name}: this name is held by {self._holder(spec.name)}; it stays as it is: "
                        "rename or remove it, or give the training another --name"
                    ) from None
                raise
        return str(container.id)

    def start(self, replica_id: str) -> None:
        """Start a container; a failure leaves it in `created`, for the caller to remove."""
        with _translated("Docker"):
            try:
                self._acting().api.start(replica_id)
            except docker.errors.APIError as error:
                text = str(error.explanation or error)
                if checks.NO_GPU_RUNTIME in text:
                    raise EngineError(f"Docker has no GPU runtime; {checks.GPU_REMEDY}") from None
                if "nvidia-container-cli" in text:
                    detail = text.split("nvidia-container-cli:", 1)[1].splitlines()[0].strip()
                    raise EngineError(
                        f"the NVIDIA runtime refuses the device: {detail}; `nvidia-smi -L` lists those that exist"
                    ) from None
                raise

    def list(self) -> list[ReplicaState]:
        """Return this owner's replicas, by name."""
        with _translated("Docker"):
            found = self._client.api.containers(
                all=True, filters={"label": [f"{FORMAT_LABEL}={FORMAT}", f"{OWNER_LABEL}={self._owner}"]}
            )
        states = (self.state(item["Id"]) for item in found)
        return sorted((state for state in states if state is not None), key=_natural)

    def claims(self) -> Sequence[Claim]:
        """Return which GPUs each container of this engine was given, whoever started it."""
        with _translated("Docker"):
            found = self._client.api.containers(all=True)
        ids = [item["Id"] for item in found if item["State"] in (*HOLDING, "created")]
        inspected = filter(None, map(self._inspect, ids))
        return [claim for item in inspected if (claim := container_claim(item, self._owner)) is not None]

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return a container of ours as the engine's inspect describes it now."""
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
            started_at=_parse_time(state.get("StartedAt", "")),
            plan=plan_of(found) or {},
        )

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return the container's environment."""
        inspected = self._inspect(replica_id)
        if inspected is None:
            return None
        return dict(item.split("=", 1) for item in inspected["Config"].get("Env") or [] if "=" in item)

    def logs(self, replica_id: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield whole lines. A dropped stream looks like the end, so the state is asked before believing it."""
        last = ""
        while True:
            since = _parse_time(last)
            options = {"since": since} if since is not None else {"tail": "all" if tail is None else tail}
            for stamp, line in self._read_log(replica_id, follow, options):
                if stamp > last:
                    last = stamp
                    yield line
            state = self._inspect(replica_id) if follow else None
            if state is None or not state["State"]["Running"]:
                return

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM to PID 1, which `init` passes on to the trainer."""
        self._signal(replica_id, "SIGTERM")

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL."""
        self._signal(replica_id, "SIGKILL")

    def remove(self, replica_id: str) -> None:
        """Kill and remove a container; one that is gone, or going, is fine."""
        with _translated("Docker"):
            try:
                self._acting().api.remove_container(replica_id, force=True, v=True)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                if "already in progress" not in str(error):
                    raise

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the engine says of itself: its `info` and its `version`."""
        with _translated("Docker"):
            return self._client.info(), self._client.version()

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a file of a container, running or not, out of the archive that the engine makes of it."""
        with _translated("Docker"):
            return read_archived_file(self._client.api, replica_id, path, most_bytes)

    @property
    def _client(self) -> Any:
        """This thread's client for questions, which are answered soon or not at all."""
        return self._connected("asking", ANSWER_TIMEOUT_S)

    def _acting(self) -> Any:
        """Return this thread's client that waits long enough for actions."""
        return self._connected("acting", ACTION_TIMEOUT_S)

    def _connected(self, purpose: str, timeout_s: float) -> Any:
        client = getattr(self._clients, purpose, None)
        if client is None:
            client = docker.DockerClient.from_env(timeout=timeout_s, version=self._api_version)
            setattr(self._clients, purpose, client)
        return client

    def _signal(self, replica_id: str, signal: str) -> None:
        with _translated("Docker"):
            try:
                self._acting().api.kill(replica_id, signal=signal)
            except docker.errors.APIError as error:
                # 404: vanished; 409: not running. Either way there is nothing left to end.
                if error.status_code not in (404, 409):
                    raise

    def _inspect(self, replica_id: str) -> dict[str, Any] | None:
        with _translated("Docker"):
            try:
                return dict(self._client.api.inspect_container(replica_id))
            except docker.errors.NotFound:
                return None

    def _holder(self, name: str) -> str:
        """Say in words which container has this name."""
        with contextlib.suppress(docker.errors.APIError, *_TRANSPORT):
            inspected = self._client.api.inspect_container(name)
            found = inspected["Config"].get("Labels") or {}
            fleet = f"fleet {found[FLEET_LABEL]}, " if FLEET_LABEL in found else ""
            return f"container {inspected['Id'][:12]} ({fleet}image {inspected['Config']['Image']})"
        return "another container"

    def _read_log(
        self, replica_id: str, follow: bool, options: Mapping[str, Any]
    ) -> Iterator[tuple[str, str]]:
        """Yield (time stamp, line) until the stream ends, however it ends."""
        pending = b""
        with _translated("Docker"):
            try:
                stream = self._client.api.logs(
                    replica_id, stream=True, follow=follow, timestamps=True, **options
                )
            except docker.errors.NotFound:
                return
            try:
                for chunk in stream:
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        yield _split_stamp(line)
            except (requests.exceptions.ConnectionError, urllib3.exceptions.HTTPError):
                return
        if pending:
            yield _split_stamp(pending)


def container_options(spec: ReplicaSpec, owner: int) -> dict[str, Any]:
    """Return docker-py's arguments for a spec: detached, limited, hardened, without a terminal.

    Without a terminal Ctrl-C in `docker attach --sig-proxy=false` leaves the trainer alone.
    """
    options: dict[str, Any] = {
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "labels": labels(spec, owner),
        "environment": {**spec.passed, **spec.environment},
        "mounts": [
            docker.types.Mount(item.target, item.source, type="bind", read_only=item.read_only)
            for item in spec.mounts
        ],
        "user": spec.user or None,
        "detach": True,
        "tty": False,
        "stdin_open": False,
        "init": True,
        "network": spec.network or "bridge",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        # Compiled kernels are loaded from /tmp, so it must allow execution.
        "tmpfs": {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={spec.tmp_bytes}"},
        "pids_limit": spec.pids_limit,
        "mem_limit": spec.memory_bytes,
        "memswap_limit": spec.memory_bytes,
        "shm_size": spec.shm_bytes,
        "log_config": docker.types.LogConfig(
            type="json-file", config={"max-size": LOG_FILE_SIZE, "max-file": str(LOG_FILES)}
        ),
    }
    if spec.cores:
        options["cpuset_cpus"] = format_cores(spec.cores)
    if spec.device.kind == "gpu":
        options["device_requests"] = [
            docker.types.DeviceRequest(
                device_ids=list(spec.device.handles), capabilities=[["gpu", "compute", "utility"]]
            )
        ]
    return options


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn docker-py's and the transport's errors into EngineError."""
    try:
        yield
    except docker.errors.APIError as error:
        raise EngineError(f"{what}: Docker refuses: {error.explanation or error}") from error
    except (docker.errors.DockerException, *_TRANSPORT) as error:
        there = box()
        if there is not None and there.ended:
            raise there.lost() from error
        reason = _reason(error)
        raise EngineError(
            checks.permission_words()
            if reason == _DENIED
            else f"Docker does not answer ({reason}); start it (sudo systemctl start docker), check DOCKER_HOST and "
            "that you may use its socket (group docker); or use --engine local"
        ) from error


def _reason(error: BaseException) -> str:
    text = str(error)
    for sign, words in (
        ("timed out", f"no answer within {ANSWER_TIMEOUT_S:g} s"),
        ("No such file", "no socket there"),
        ("FileNotFoundError", "no socket there"),
        ("Permission denied", _DENIED),
        ("Connection refused", "connection refused"),
    ):
        if sign in text:
            return words
    return text.splitlines()[0][:160] if text else type(error).__name__


def _split_stamp(line: bytes) -> tuple[str, str]:
    stamp, _, text = line.decode(errors="replace").partition(" ")
    return stamp, text.rstrip("\r")


def _parse_time(text: str) -> float | None:
    """Return Unix seconds for the engine's time stamps; None for none, and for its year-1 zero."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not match or text.startswith("0001"):
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(match[1] + zone).astimezone(UTC).timestamp() + float(match[2] or 0)


def _natural(state: ReplicaState) -> tuple[str, int, str]:
    """Sort gpu2 before gpu10."""
    number = state.device.split(":", 1)[1]
    return state.fleet, int(number) if number.isdigit() else -1, state.name

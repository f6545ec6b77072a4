"""The GPUs of any container, read from the engine's inspect."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.devices.devices import replica_gpus
from launcher.devices.holders import EVERY, GpuHolder
from launcher.engines.labels import DEVICE_LABEL, FLEET_LABEL, OWNER_LABEL, is_ours
from launcher.hosts.processes import user_name
from starling.core.words import printable

HOLDING = ("running", "paused", "restarting")
"""States in which a container holds its devices; one of our replicas also counts in the state `created`."""

_DRIVER_CAPABILITIES = {"compute", "compat32", "graphics", "utility", "video", "display", "ngx"}
_CDI_NAME = re.compile(r"(?:[a-z.]*\.)?nvidia\.com/[\w.-]+=")
_DEVICE_FILE = re.compile(r"/dev/nvidia(\d+)", re.ASCII)


def container_holder(inspected: Mapping[str, Any], caller: int) -> GpuHolder | None:
    """Return a container as a holder of GPUs; None if the container is no replica and does not run.

    A running container without a GPU is returned with no GPUs, because a process in it may need its name.
    """
    config = inspected["Config"]
    name, status = inspected["Name"].lstrip("/"), inspected["State"]["Status"]
    found: dict[str, str] = config.get("Labels") or {}
    owner = found.get(OWNER_LABEL, "")
    ids = gpu_ids(inspected)
    if owner.isdecimal() and is_ours(found, name, int(owner)):
        fleet = printable(found[FLEET_LABEL])
        holder = f"{name} of fleet {fleet}" + ("" if int(owner) == caller else f" of {user_name(int(owner))}")
        holder += " (created, never started)" if status == "created" else ""
        end = "kill-all" if status == "created" else "stop"
        remedy = f"launcher {end} {shlex.quote(fleet)}" if int(owner) == caller else ""
        ids = ids or replica_gpus(found[DEVICE_LABEL], {})  # Podman's inspect omits GPUs from CDI
    elif status in HOLDING:
        holder, remedy = f"container {name} ({inspected['Id'][:12]}, image {printable(config['Image'])})", ""
    else:
        return None
    return GpuHolder(holder, ids, inspected["Id"], remedy)


def gpu_ids(inspected: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the GPUs on which a container can compute: indices, UUIDs, slices, or `all`."""
    host = inspected["HostConfig"]
    variables = dict(item.split("=", 1) for item in inspected["Config"].get("Env") or [] if "=" in item)
    ids = [
        item
        for request in host.get("DeviceRequests") or []
        if _computes(request, variables)
        for item in _requested(request)
    ]
    if not ids and _computes({}, variables):
        ids = _visible(str(host.get("Runtime") or ""), variables.get("NVIDIA_VISIBLE_DEVICES", ""))
    # The number of a device file is the index on nearly every machine.
    files = (_DEVICE_FILE.fullmatch(item.get("PathOnHost", "")) for item in host.get("Devices") or [])
    ids += [match[1] for match in files if match]
    return tuple(dict.fromkeys(ids))


def _requested(request: Mapping[str, Any]) -> Sequence[str]:
    """Return the GPUs that a device request (`--gpus`, `--device nvidia.com/gpu=…`) asks for."""
    ids = [str(item) for item in request.get("DeviceIDs") or []]
    if request.get("Driver") == "cdi":
        return [_CDI_NAME.sub("", item) for item in ids if _CDI_NAME.match(item)]
    capabilities = {word for words in request.get("Capabilities") or [] for word in words}
    if request.get("Driver") not in ("", None, "nvidia") or "gpu" not in capabilities:
        return []
    count = int(request.get("Count") or 0)
    return ids or ([EVERY] if count < 0 else [str(number) for number in range(count)])


def _visible(runtime: str, value: str) -> list[str]:
    """Return the GPUs that NVIDIA_VISIBLE_DEVICES gives.

    CUDA's images set it to `all` in every container, also in containers without a GPU; `all` therefore counts only
    under NVIDIA's runtime. A list was written on purpose and always counts (Podman's hook reads it under any runtime).
    """
    items = [_CDI_NAME.sub("", item.strip()) for item in value.split(",")]
    items = [item for item in items if item not in ("", "void", "none")]
    return [] if EVERY in items and "nvidia" not in runtime else items


def _computes(request: Mapping[str, Any], variables: Mapping[str, str]) -> bool:
    """Return whether the request includes the driver's compute part; a monitor with only `utility` holds no GPU."""
    asked = {word for words in request.get("Capabilities") or [] for word in words} & _DRIVER_CAPABILITIES
    asked = asked or set(filter(None, variables.get("NVIDIA_DRIVER_CAPABILITIES", "").split(",")))
    return not asked or bool(asked & {"compute", "all"})

"""Which GPUs a container was given, read from the engine's inspect: whoever started it, and however."""

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
"""States in which a container has its devices; one of ours that was created only is about to."""

_DRIVER_CAPABILITIES = {"compute", "compat32", "graphics", "utility", "video", "display", "ngx"}
_CDI_NAME = re.compile(r"(?:[a-z.]*\.)?nvidia\.com/[\w.-]+=")
_DEVICE_FILE = re.compile(r"/dev/nvidia(\d+)", re.ASCII)


def container_holder(inspected: Mapping[str, Any], caller: int) -> GpuHolder | None:
    """Return who a container is and what it holds; None for one that holds nothing, being no replica and not running.

    A container without a GPU holds none, and is returned all the same, so that a process in it can be named.
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
        ids = ids or replica_gpus(found[DEVICE_LABEL], {})  # Podman tells of no GPU that was given by CDI
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
    """Return what a device request (`--gpus`, `--device nvidia.com/gpu=…`) asks for."""
    ids = [str(item) for item in request.get("DeviceIDs") or []]
    if request.get("Driver") == "cdi":
        return [_CDI_NAME.sub("", item) for item in ids if _CDI_NAME.match(item)]
    capabilities = {word for words in request.get("Capabilities") or [] for word in words}
    if request.get("Driver") not in ("", None, "nvidia") or "gpu" not in capabilities:
        return []
    count = int(request.get("Count") or 0)
    return ids or ([EVERY] if count < 0 else [str(number) for number in range(count)])


def _visible(runtime: str, value: str) -> list[str]:
    """Return what NVIDIA_VISIBLE_DEVICES gives.

    CUDA's images set it to `all` for every container, also for those without a GPU; so `all` counts only under NVIDIA's
    own runtime, while a list was written on purpose (Podman's hook reads it under any runtime).
    """
    items = [_CDI_NAME.sub("", item.strip()) for item in value.split(",")]
    items = [item for item in items if item not in ("", "void", "none")]
    return [] if EVERY in items and "nvidia" not in runtime else items


def _computes(request: Mapping[str, Any], variables: Mapping[str, str]) -> bool:
    """Return whether the driver's compute part comes along; a monitor with `utility` alone holds nothing."""
    asked = {word for words in request.get("Capabilities") or [] for word in words} & _DRIVER_CAPABILITIES
    asked = asked or set(filter(None, variables.get("NVIDIA_DRIVER_CAPABILITIES", "").split(",")))
    return not asked or bool(asked & {"compute", "all"})

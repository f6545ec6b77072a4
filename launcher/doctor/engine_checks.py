"""Checks of the Docker engine: its socket, its version, and the features that it reports."""

from __future__ import annotations

import grp
import os
import re
import stat
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.devices.inventory import Gpu
from launcher.doctor.findings import Finding
from launcher.engines.docker.checks import GPU_REMEDY
from launcher.hosts.files import disk_space
from starling.core.units import GIB, format_size

OLDEST = (20, 10)
MOST_SKEW_S = 5.0
LITTLE_DISK, NO_DISK = 10 * GIB, GIB
DEFAULT_SOCKET = "/var/run/docker.sock"


def socket_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the path of Docker's socket; None if Docker is reached over the network."""
    host = environment.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"
    return Path(host.removeprefix("unix://")) if host.startswith("unix://") else None


def check_socket(path: Path) -> Finding:
    """Check who may use the socket: every user of the socket can become root on the machine."""
    try:
        about = path.stat()
    except PermissionError:
        return Finding(
            "socket", "failure", f"{path}: its folder is closed to you", "ask who runs the machine"
        )
    except OSError:
        return Finding(
            "socket",
            "failure",
            f"{path}: not there",
            "start Docker (sudo systemctl start docker), or set DOCKER_HOST",
        )
    group = _group(about.st_gid)
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(
            "socket",
            "failure",
            f"{path}: not yours to use; it is for group {group}",
            f"sudo usermod -aG {group} $USER, then log in again (or: newgrp {group})",
        )
    if stat.S_IMODE(about.st_mode) & 0o002:
        return Finding(
            "socket",
            "warning",
            f"{path}: open to every user, so every user can become root on this machine",
            f"sudo chmod o-rw {path}",
        )
    return Finding("socket", "ok", f"{path}, for group {group}")


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def check_version(version: Mapping[str, Any]) -> Finding:
    """Compare the engine's version with the oldest tested version."""
    said = str(version.get("Version", ""))
    found = re.match(r"(\d+)\.(\d+)", said)
    text = f"{_product(version)} {said}, API {version.get('ApiVersion')}"
    if found and (int(found[1]), int(found[2])) < OLDEST and _product(version) == "Docker":
        return Finding(
            "engine", "failure", f"{text}: too old", f"install {'.'.join(map(str, OLDEST))} or newer"
        )
    return Finding("engine", "ok", text)


def _product(version: Mapping[str, Any]) -> str:
    names = [str(part.get("Name", "")) for part in version.get("Components") or []]
    return "Podman" if any("podman" in name.lower() for name in names) else "Docker"


def check_limits(about: Mapping[str, Any]) -> Finding:
    """Check which limits the kernel's cgroups can enforce."""
    lacking = [
        words
        for key, words in (("MemoryLimit", "memory"), ("PidsLimit", "processes"), ("CPUSet", "cores"))
        if not about.get(key, True)
    ]
    remedy = "enable these cgroup controllers in the kernel (cgroup_enable=memory), and restart"
    if lacking:
        return Finding("limits", "failure", f"the kernel cannot limit {', '.join(lacking)}", remedy)
    version = f"cgroup v{about.get('CgroupVersion') or 1}"
    if not about.get("SwapLimit", True):
        return Finding(
            "limits",
            "warning",
            f"{version}; swap cannot be limited: replicas over their memory may swap before they are killed",
            "boot with swapaccount=1, or switch swap off",
        )
    return Finding("limits", "ok", f"{version}: memory, swap, processes and cores")


def check_machine(about: Mapping[str, Any]) -> Finding:
    """Report the engine's cores and memory."""
    cores, memory = int(about.get("NCPU") or 0), int(about.get("MemTotal") or 0)
    text = f"{cores} cores, {format_size(memory)} of memory"
    if memory < 2 * GIB:
        return Finding("machine", "warning", text, "a trainer needs 2 GB or more; use small images")
    return Finding("machine", "ok", text)


def check_clock(about: Mapping[str, Any], before: float, after: float) -> Finding:
    """Compare the engine's clock with this machine's; `before` and `after` are Unix seconds around the request."""
    try:
        there = datetime.fromisoformat(str(about.get("SystemTime", ""))).timestamp()
    except ValueError:
        return Finding("clock", "ok", "the engine does not report its time")
    skew = max(before - there, there - after, 0.0)
    if skew > MOST_SKEW_S:
        return Finding(
            "clock",
            "warning",
            f"the engine's clock is {skew:.0f} s off ours; times in `status` are off by as much",
            "set both by NTP",
        )
    return Finding("clock", "ok", "the engine's agrees with ours")


def check_gpu_runtime(about: Mapping[str, Any], gpus: tuple[Gpu, ...] | None) -> Finding:
    """Check for the NVIDIA runtime or CDI devices, which give GPUs to containers."""
    runtime = "nvidia" in (about.get("Runtimes") or {})
    cdi = any(
        str(device.get("ID", "")).startswith("nvidia.com/") for device in about.get("DiscoveredDevices") or []
    )
    if runtime or cdi:
        return Finding(
            "GPU runtime", "ok", "the NVIDIA runtime" if runtime else "devices by CDI, of the NVIDIA toolkit"
        )
    if not gpus:
        return Finding("GPU runtime", "ok", "none, and none is needed without a GPU")
    return Finding(
        "GPU runtime", "warning", "the engine lists none; the container below shows it", GPU_REMEDY
    )


def check_docker_disk(about: Mapping[str, Any], *, remote: bool) -> Finding:
    """Check the free space of the engine's folder for images, containers and logs."""
    folder = Path(str(about.get("DockerRootDir") or "/var/lib/docker"))
    if remote:
        return Finding("engine's disk", "ok", f"{folder} is on the other machine: not checked")
    return check_space("engine's disk", folder, "docker system prune removes what nothing uses")


def check_space(check: str, folder: Path, remedy: str) -> Finding:
    """Check the free space at a folder, which need not exist yet."""
    try:
        free = disk_space(folder)
    except OSError as error:
        return Finding(check, "ok", f"{folder}: cannot be read ({error.strerror})")
    return judge_space(check, folder, free.bytes, remedy)


def judge_space(check: str, folder: Path, free: int, remedy: str) -> Finding:
    """Return the finding for a folder with `free` bytes of free space."""
    text = f"{folder}: {format_size(free)} free"
    status = "failure" if free < NO_DISK else "warning" if free < LITTLE_DISK else "ok"
    return Finding(check, status, text, remedy)  # type: ignore[arg-type]


def check_compose() -> Finding:
    """Check for the Compose plugin, which starts the tracking servers."""
    remedy = "install docker-compose-plugin (or docker-compose-v2); only the tracking servers need it"
    try:
        done = subprocess.run(
            ["docker", "compose", "version", "--short"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding("compose", "warning", "no `docker` command here", remedy)
    if done.returncode:
        return Finding("compose", "warning", "no Compose plugin", remedy)
    return Finding("compose", "ok", f"Compose {done.stdout.strip()[:40]}")

"""Checks of the machine: its GPUs, the runs folder and its file system, the tracking server."""

from __future__ import annotations

import http.client
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from launcher.devices.inventory import Driver, Gpu
from launcher.doctor.engine_checks import check_space, judge_space
from launcher.doctor.findings import Finding
from launcher.engines.base import Image
from launcher.hosts.host import Host
from launcher.plan.check import check_driver
from starling.core.errors import StarlingError
from starling.core.files.folder import Folder
from starling.core.lock import lock_own
from starling.core.paths import real_path
from starling.core.redaction import masked
from starling.core.units import format_size

NO_GPU = "no GPU here; CPU replicas work"
ANSWER_S = 2.0
MORE_SPACE = "remove old runs: launcher clean --runs-too, or give another --runs"

_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "afs",
    "ceph",
    "lustre",
    "gluster",
    "beegfs",
    "gpfs",
    "fuse.sshfs",
    "ocfs2",
)
"""Prefixes of the types of file systems that several machines can mount at once."""

_PCI = Path("/sys/bus/pci/devices")


def check_gpus(gpus: tuple[Gpu, ...] | None, *, remote: bool, pci: Path = _PCI) -> Finding:
    """Report the GPUs that the driver lists; an NVIDIA card whose driver does not answer is a failure."""
    broken = [f"{gpu.index}: {gpu.problem}" for gpu in gpus or () if gpu.problem]
    if broken:
        remedy = (
            "leave it out of --gpus, and reset it or restart the machine; `nvidia-smi` and dmesg say more"
        )
        return Finding("GPUs", "failure", f"not usable: {'; '.join(broken)}", remedy)
    if gpus:
        names = ", ".join(f"{gpu.index} {gpu.name} ({format_size(gpu.memory_bytes)})" for gpu in gpus)
        return Finding("GPUs", "ok", names)
    if remote:
        return Finding(
            "GPUs", "ok", "none that can be listed from here; name them by --gpus 0-3, or use --cpu N"
        )
    if _nvidia_cards(pci):
        return Finding(
            "GPUs",
            "failure",
            f"{_nvidia_cards(pci)} NVIDIA cards on the bus, but the driver does not answer",
            "install or reload NVIDIA's driver; `nvidia-smi` says what is wrong",
        )
    return Finding("GPUs", "ok", NO_GPU)


def check_driver_for(image: Image, driver: Driver | None) -> list[Finding]:
    """Compare the driver with the CUDA in the image; empty without a driver, which `check_gpus` reports."""
    if driver is None:
        return []
    try:
        check_driver(image, driver)
    except StarlingError as error:
        return [Finding.of_error("driver", error)]
    serves = f"serves CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    return [
        Finding("driver", "ok", f"{driver.version} {serves}; the image holds CUDA {image.cuda or 'none'}")
    ]


def first_usable(gpus: Sequence[Gpu]) -> str | None:
    """Return the UUID of the first usable GPU or MIG slice."""
    for gpu in gpus:
        if gpu.mig and gpu.slices:
            return gpu.slices[0].uuid
        if not gpu.mig and not gpu.problem:
            return gpu.uuid
    return None


def _nvidia_cards(pci: Path) -> int:
    """Return the number of NVIDIA's display and 3D controllers on the bus."""
    count = 0
    for place in pci.glob("*"):
        try:
            vendor, kind = (place / "vendor").read_text().strip(), (place / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def check_runs_folder(host: Host, runs: Path) -> list[Finding]:
    """Check that the folder can be written and locked, and check its file system and free space."""
    try:
        host.check_runs(runs)
        if host.address:
            found = [Finding("runs folder", "ok", f"{runs} on {host.name}: may be written")]
            free = host.disk_space(runs)
            return found + ([] if free is None else [judge_space("runs' disk", runs, free.bytes, MORE_SPACE)])
    except StarlingError as error:
        return [Finding.of_error("runs folder", error)]
    writable = (
        check_locks(runs) if runs.is_dir() else Finding("runs folder", "ok", f"{runs}: `up` will make it")
    )
    return [writable, check_file_system(runs, _mounts()), check_space("runs' disk", runs, MORE_SPACE)]


def check_locks(runs: Path) -> Finding:
    """Write and lock a file in the folder, as trainers do."""
    try:
        with Folder.resolve(runs) as folder:
            name = f".doctor-{secrets.token_hex(8)}"
            descriptor = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                lock_own(descriptor)
            finally:
                os.close(descriptor)
                os.unlink(name, dir_fd=folder.descriptor)
    except OSError as error:
        return Finding(
            "runs folder",
            "failure",
            f"{runs}: no file can be written and locked there ({error.strerror})",
            "give another --runs; on NFS mount with locks (not `nolock`) and start rpc.statd",
        )
    return Finding("runs folder", "ok", f"{runs}: can be written and locked")


def check_file_system(runs: Path, mounts: Mapping[str, str]) -> Finding:
    """Check the file system of the folder; `mounts` maps mount points to types."""
    real = real_path(runs)
    point = max(
        (point for point in mounts if real.is_relative_to(point)),
        key=lambda point: len(Path(point).parts),
        default="",
    )
    kind = mounts.get(point, "unknown")
    if kind.startswith(_NETWORK):
        return Finding(
            "file system",
            "warning",
            f"{kind} at {point}: other machines may not see this one's locks",
            "fine for one machine; for a search of several give --study postgresql://…",
        )
    return Finding("file system", "ok", f"{kind} at {point or '/'}")


def _mounts() -> dict[str, str]:
    import psutil

    return {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}


def check_tracking(environment: Mapping[str, str] = os.environ) -> Finding:
    """Check that the MLflow server in MLFLOW_TRACKING_URI answers."""
    address = environment.get("MLFLOW_TRACKING_URI", "")
    shown = masked(address)
    parts = urlsplit(address)
    if not address:
        return Finding("MLflow", "ok", "MLFLOW_TRACKING_URI is not set: runs land in runs/mlflow")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return Finding("MLflow", "ok", f"{shown}: no server to ask")
    try:
        socket.getaddrinfo(parts.hostname, None)
    except OSError:
        return Finding(
            "MLflow",
            "warning",
            f"{shown}: {parts.hostname} cannot be resolved here; replicas can resolve it only on its Docker network",
            "give that network: launcher up --network starling",
        )
    try:
        status = _ask(parts.scheme, parts.hostname, parts.port, f"{parts.path.rstrip('/')}/health")
    except (OSError, http.client.HTTPException) as error:
        return Finding(
            "MLflow",
            "warning",
            f"{shown}: does not answer ({error}); training goes on without, and sends later",
            "docker compose up -d starts one; or correct MLFLOW_TRACKING_URI",
        )
    if status >= 500:
        return Finding("MLflow", "warning", f"{shown}: answers {status}", "look at the server's log")
    return Finding("MLflow", "ok", f"{shown}: answers")


def _ask(scheme: str, host: str, port: int | None, path: str) -> int:
    """Return the status of one GET; redirects are not followed."""
    connection = (
        http.client.HTTPSConnection(host, port, timeout=ANSWER_S)
        if scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    )
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()

"""The machine's inventory: GPUs and slices from NVML, cores and memory from the engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

DESKTOP_BYTES = 1024**3
"""A process that draws as well as computes, and uses less GPU memory than this, belongs to the desktop."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU; `memory_bytes` is None if the driver does not report it."""

    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MigSlice:
    """A MIG instance: a part of a GPU that a replica can use like a GPU. `index` counts within the GPU."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One whole GPU. `index` is NVML's, in PCI bus order, as container runtimes count GPUs."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    mig: bool = False
    """Whether the GPU is in MIG mode: replicas can then use its slices only."""
    slices: tuple[MigSlice, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    problem: str = ""
    """Why the GPU cannot be used, in the driver's words; the other fields may then be empty."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine can give to replicas: the numbers of its cores, and its memory in bytes."""

    cores: tuple[int, ...]
    memory_bytes: int
    maps_users: bool = False
    """Whether user ids inside a replica differ from those on the host; `up` can then not check permissions."""


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA (major, minor) that it serves."""

    version: str
    cuda: tuple[int, int]


def read_gpus() -> tuple[Gpu, ...] | None:
    """Return this host's GPUs, or None if NVML does not answer (no driver, or no NVML)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML's own errors, a missing library, a missing module: all mean "no answer"
        return None
    try:
        return tuple(_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int) -> Gpu:
    """Return one GPU; an error of NVML goes into `problem`, so a GPU off the bus does not hide the others."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        mig = _mig_mode(nvml, handle)
        return Gpu(
            index=index,
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=_memory(nvml, handle),
            mig=mig,
            slices=_read_slices(nvml, handle) if mig else (),
            # Processes are read from each slice: in MIG mode NVML lists the whole GPU's processes to root only.
            processes=() if mig else _processes(nvml, handle),
        )
    except nvml.NVMLError as error:
        return Gpu(index=index, uuid="", name="", memory_bytes=0, problem=str(error))


def _mig_mode(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return False


def _read_slices(nvml: Any, gpu: Any) -> tuple[MigSlice, ...]:
    slices = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue  # no slice has this index
        slices.append(
            MigSlice(
                index=index,
                uuid=str(nvml.nvmlDeviceGetUUID(handle)),
                name=str(nvml.nvmlDeviceGetName(handle)),
                memory_bytes=_memory(nvml, handle),
                processes=_processes(nvml, handle),
            )
        )
    return tuple(slices)


def _memory(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError_NotSupported:
        return 0  # a GPU that shares the machine's memory


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """Return the processes that compute on a device, without those that only draw (a desktop)."""
    drawing = {process.pid for process in _running(nvml, handle, "Graphics")}
    return tuple(
        GpuProcess(int(process.pid), process.usedGpuMemory)
        for process in _running(nvml, handle, "Compute")
        if process.pid not in drawing or (process.usedGpuMemory or 0) >= DESKTOP_BYTES
    )


def _running(nvml: Any, handle: Any, kind: str) -> list[Any]:
    """Return NVML's list of processes; an older driver has only version 2 of the call, or no version."""
    for version in ("", "_v2"):
        with contextlib.suppress(nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return list(getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}")(handle))
    return []


def read_driver() -> Driver | None:
    """Return this host's NVIDIA driver, or None if NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # as in read_gpus
        return None
    try:
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return Driver(str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()

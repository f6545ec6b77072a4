"""What the machine has: GPUs and their slices as NVML lists them, cores and memory as the engine sees them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

DESKTOP_BYTES = 1024**3
"""A process that draws as well as computes, and takes less than this of a GPU, is the desktop's."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU; `memory_bytes` is None where the driver does not tell."""

    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MigSlice:
    """A MIG instance: a part of a GPU, handed out like a GPU. `index` counts within its GPU."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One whole GPU. `index` is NVML's, in PCI bus order, which is what container runtimes count by."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    mig: bool = False
    """In MIG mode: only its slices can be handed out."""
    slices: tuple[MigSlice, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    problem: str = ""
    """Why it cannot be used, in the driver's words; its other fields may then be empty."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine can hand out: the numbers of its cores, and its memory in bytes."""

    cores: tuple[int, ...]
    memory_bytes: int
    maps_users: bool = False
    """Whether user ids inside a replica are other ids on the host, so that permissions cannot be judged from here."""


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA (major, minor) that it serves."""

    version: str
    cuda: tuple[int, int]


def read_gpus() -> tuple[Gpu, ...] | None:
    """Return this host's GPUs, or None where NVML does not answer (no driver, or no NVML)."""
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
    """Return one GPU; one that has fallen off the bus must not hide the others."""
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
            # A slice's processes are asked of the slice: of the whole, only root gets an answer.
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
            continue  # numbers without a slice
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
    """Return the processes that compute on a device; those that only draw (a desktop) hold nothing back."""
    drawing = {process.pid for process in _running(nvml, handle, "Graphics")}
    return tuple(
        GpuProcess(int(process.pid), process.usedGpuMemory)
        for process in _running(nvml, handle, "Compute")
        if process.pid not in drawing or (process.usedGpuMemory or 0) >= DESKTOP_BYTES
    )


def _running(nvml: Any, handle: Any, kind: str) -> list[Any]:
    """Return NVML's list of processes; an older driver has only the second form of the call, some have none."""
    for version in ("", "_v2"):
        with contextlib.suppress(nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return list(getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}")(handle))
    return []


def read_driver() -> Driver | None:
    """Return this host's NVIDIA driver, or None where NVML does not answer."""
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

"""What the machine has: GPUs as NVML lists them, cores and memory as the engine sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One whole GPU. `index` is NVML's, in PCI bus order, which is what container runtimes count by."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


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
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


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

"""A double of NVIDIA's `pynvml`: the part that launcher and trackers call, over GPUs described in a JSON file.

Put this folder on PYTHONPATH (or `sys.path`) before the real module, and name the file in STARLING_NVML_DOUBLE:

    {"gpus": [{"uuid": "GPU-0", "name": "H100", "memory": 85899345920, "mig": null, "slices": [], "error": "GpuIsLost",
               "processes": [{"pid": 1, "memory": null}], "graphics": []}],
     "driver": "new", "init": "DriverNotLoaded", "count": "Unknown"}

A GPU may tell `used` bytes of its memory, `load` in percent, `milliwatts` and `celsius`.
`mig` is true, false, or null for a GPU that knows no MIG; a slice has the keys of a GPU, and null stands for a number
without one; `driver` "old" lacks the third form of the process calls, "ancient" every form. `error`, `init` and `count`
name the error raised.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_DEVICE_MIG_DISABLE = 0
NVML_DEVICE_MIG_ENABLE = 1
NVML_TEMPERATURE_GPU = 0

_CODES = {
    "Uninitialized": (1, "Uninitialized"),
    "InvalidArgument": (2, "Invalid Argument"),
    "NotSupported": (3, "Not Supported"),
    "NoPermission": (4, "Insufficient Permissions"),
    "NotFound": (6, "Not Found"),
    "DriverNotLoaded": (9, "Driver Not Loaded"),
    "LibraryNotFound": (12, "NVML Shared Library Not Found"),
    "FunctionNotFound": (13, "Function Not Found"),
    "GpuIsLost": (15, "GPU is lost"),
    "Unknown": (999, "Unknown Error"),
}


class NVMLError(Exception):
    """NVML's error; `value` is its number."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return next(text for code, text in _CODES.values() if code == self.value)


class NVMLLibraryMismatchError(Exception):
    """Raised, beside NVML's own errors, by a call that the driver has only an older form of."""


def _error_class(code: int) -> type[NVMLError]:
    class Error(NVMLError):
        def __init__(self) -> None:
            super().__init__(code)

    return Error


for _name, (_code, _text) in _CODES.items():
    globals()[f"NVMLError_{_name}"] = _error_class(_code)


@dataclass
class _Memory:
    total: int
    free: int
    used: int


@dataclass
class _Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815


_machine: dict[str, Any] | None = None


def _raise(name: str | None) -> None:
    if name:
        raise globals()[f"NVMLError_{name}"]


def _read() -> dict[str, Any]:
    _raise(None if _machine else "Uninitialized")
    assert _machine is not None
    return _machine


def nvmlInit() -> None:  # noqa: N802
    global _machine
    machine = json.loads(Path(os.environ["STARLING_NVML_DOUBLE"]).read_text())
    _raise(machine.get("init"))
    _machine = machine


def nvmlShutdown() -> None:  # noqa: N802
    global _machine
    _read()
    _machine = None


def nvmlDeviceGetCount() -> int:  # noqa: N802
    _raise(_read().get("count"))
    return len(_read()["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:  # noqa: N802
    gpu: dict[str, Any] = _read()["gpus"][index]
    _raise(gpu.get("error"))
    return gpu


def nvmlDeviceGetUUID(handle: dict[str, Any]) -> str:  # noqa: N802
    return str(handle["uuid"])


def nvmlDeviceGetName(handle: dict[str, Any]) -> str:  # noqa: N802
    return str(handle["name"])


def nvmlDeviceGetMemoryInfo(handle: dict[str, Any], version: Any = None) -> _Memory:  # noqa: N802
    _raise(None if handle.get("memory") is not None else "NotSupported")
    used = handle.get("used", 0)
    return _Memory(handle["memory"], handle["memory"] - used, used)


def _told(handle: dict[str, Any], name: str) -> int:
    _raise(None if name in handle else "NotSupported")
    return int(handle[name])


def nvmlDeviceGetUtilizationRates(handle: dict[str, Any]) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(gpu=_told(handle, "load"), memory=0)


def nvmlDeviceGetPowerUsage(handle: dict[str, Any]) -> int:  # noqa: N802
    return _told(handle, "milliwatts")


def nvmlDeviceGetTemperature(handle: dict[str, Any], sensor: int) -> int:  # noqa: N802
    assert sensor == NVML_TEMPERATURE_GPU
    return _told(handle, "celsius")


def nvmlDeviceGetMigMode(device: dict[str, Any]) -> list[int]:  # noqa: N802
    _raise(None if device.get("mig") is not None else "NotSupported")
    return [int(device["mig"]), int(device["mig"])]


def nvmlDeviceGetMaxMigDeviceCount(device: dict[str, Any]) -> int:  # noqa: N802
    return len(device["slices"])


def nvmlDeviceGetMigDeviceHandleByIndex(device: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: N802
    found: dict[str, Any] | None = device["slices"][index]
    _raise(None if found else "NotFound")
    assert found is not None
    return found


def _processes(handle: dict[str, Any], kind: str, form: int) -> list[_Process]:
    driver = _read().get("driver", "new")
    if form == 3 and driver == "old":
        raise NVMLLibraryMismatchError
    _raise("FunctionNotFound" if driver == "ancient" else None)
    return [_Process(item["pid"], item["memory"]) for item in handle.get(kind, [])]


def nvmlDeviceGetComputeRunningProcesses(handle: dict[str, Any]) -> list[_Process]:  # noqa: N802
    return _processes(handle, "processes", 3)


def nvmlDeviceGetComputeRunningProcesses_v2(handle: dict[str, Any]) -> list[_Process]:  # noqa: N802
    return _processes(handle, "processes", 2)


def nvmlDeviceGetGraphicsRunningProcesses(handle: dict[str, Any]) -> list[_Process]:  # noqa: N802
    return _processes(handle, "graphics", 3)


def nvmlDeviceGetGraphicsRunningProcesses_v2(handle: dict[str, Any]) -> list[_Process]:  # noqa: N802
    return _processes(handle, "graphics", 2)

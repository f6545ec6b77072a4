"""The machine that a task runs on, for the task's page."""

from __future__ import annotations

import platform
import sys


def describe_machine() -> dict[str, str]:
    """Return the description of the machine for the task's page, under the SDK's names."""
    import psutil

    return {
        "hostname": platform.node(),
        "OS": platform.platform(aliased=True),
        "platform": sys.platform,
        "processor": platform.machine(),
        "python_version": platform.python_version(),
        "python_exec": sys.executable,
        "cpu_cores": str(psutil.cpu_count()),
        "memory_gb": f"{psutil.virtual_memory().total / 2**30:.1f}",
        **_gpus(),
    }


def _gpus() -> dict[str, str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        memory = [f"{pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30:.0f}GB" for handle in handles]
        driver = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no driver, no library, a driver of another version
        return {"gpu_count": "0"}
    return {
        "gpu_count": str(len(names)),
        "gpu_type": ", ".join(names),
        "gpu_memory": ", ".join(memory),
        "gpu_driver_version": str(driver),
    }

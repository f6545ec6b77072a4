"""Samples of the machine that a trainer runs on; the bridge takes them, never the trainer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from starling.tracking.process_identity import ProcessIdentity

EVERY_S = 10.0
_MB = 1e6
Sample = dict[str, float]


class SystemSampler:
    """Read processor, memory, network and GPUs, under the names that MLflow's page groups as system metrics.

    The load of the process `trainer` is sampled separately. Unreadable values are left out.
    """

    def __init__(
        self,
        trainer: ProcessIdentity | None,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import psutil

        self._every_s, self._clock = every_s, clock
        self._due = clock() + min(every_s, 1.0)
        # psutil reports loads since its last call: the first sample covers the time from here on.
        psutil.cpu_percent()
        self._trainer: Any = None
        if trainer is not None:
            with contextlib.suppress(psutil.Error):
                self._trainer = psutil.Process(trainer.pid)
                self._trainer.cpu_percent()
        self._gpus: dict[int, Any] | None = None
        self._network_at_start: tuple[int, int] | None = None

    def sample(self) -> Sample | None:
        """Return a sample if one is due, else None."""
        now = self._clock()
        if now < self._due:
            return None
        self._due = now + self._every_s
        values = self._host()
        values.update(self._own())
        for index, gpu in self._found_gpus().items():
            values.update(_gpu(index, gpu))
        return values

    def _host(self) -> Sample:
        import psutil

        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
        if self._network_at_start is None:
            self._network_at_start = (network.bytes_recv, network.bytes_sent)
        received, sent = self._network_at_start
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / _MB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_percentage": disk.percent,
            "system/network_receive_megabytes": (network.bytes_recv - received) / _MB,
            "system/network_transmit_megabytes": (network.bytes_sent - sent) / _MB,
        }

    def _own(self) -> Sample:
        """Return the trainer's own load: percent of one core, and memory."""
        import psutil

        if self._trainer is None:
            return {}
        with contextlib.suppress(psutil.Error):
            return {
                "system/trainer_cpu_percentage": self._trainer.cpu_percent(),
                "system/trainer_memory_megabytes": self._trainer.memory_info().rss / _MB,
            }
        return {}

    def _found_gpus(self) -> dict[int, Any]:
        """Return NVML's handles by number: in a container, of its GPUs. A lost GPU has no handle."""
        if self._gpus is None:
            self._gpus = {}
            with contextlib.suppress(Exception):  # no driver, no library, a driver of another version
                import pynvml

                pynvml.nvmlInit()
                for index in range(pynvml.nvmlDeviceGetCount()):
                    with contextlib.suppress(pynvml.NVMLError):
                        self._gpus[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
        return self._gpus


def _gpu(index: int, handle: Any) -> Sample:
    """Return one GPU's load, memory, power and temperature, as far as they are readable."""
    import pynvml

    values: Sample = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values[f"system/gpu_{index}_memory_usage_megabytes"] = memory.used / _MB
        values[f"system/gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(pynvml.NVMLError):
        use = pynvml.nvmlDeviceGetUtilizationRates(handle)
        values[f"system/gpu_{index}_utilization_percentage"] = float(use.gpu)
    with contextlib.suppress(pynvml.NVMLError):
        values[f"system/gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    with contextlib.suppress(pynvml.NVMLError):
        heat = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        values[f"system/gpu_{index}_temperature_celsius"] = float(heat)
    return values

"""The current usage of replicas: CPU from two readings, memory, and GPU utilisation from NVML."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.devices.devices import replica_gpus
from launcher.engines.base import Engine, ReplicaState
from launcher.hosts.usage import Usage
from launcher.status.report import Figures

WINDOW_S = 0.05
"""The least time between two readings: the kernel's CPU accounts lag some milliseconds behind."""
SLOW_S = 0.3
"""If the first reading takes longer than this, the first report does not wait for a second one."""


class Meter:
    """Reads the usage of replicas repeatedly; a CPU rate needs the previous reading."""

    def __init__(
        self,
        engine: Engine,
        gpus: GpuMeter | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._gpus = GpuMeter() if gpus is None else gpus
        self._sleep, self._clock = sleep, clock
        self._before: dict[str, Usage] = {}
        self._is_slow = False

    def begin(self, states: Sequence[ReplicaState]) -> None:
        """Take the first reading, which `read` compares with."""
        begun = self._clock()
        self._before = dict(self._engine.usage(states))
        self._is_slow = self._clock() - begun > SLOW_S

    def read(self, states: Sequence[ReplicaState]) -> dict[str, Figures]:
        """Return the figures of running replicas by id; waits until the last reading is `WINDOW_S` old.

        If the first reading was slow, the first `read` returns it without rates; the next `read` has rates.
        """
        live = [state for state in states if state.live]
        if not live:
            return {}
        before = self._before
        if self._is_slow:
            self._is_slow = False
            now: Mapping[str, Usage] = before
        else:
            youngest = max((usage.at for usage in before.values()), default=None)
            if youngest is not None:
                self._sleep(max(0.0, youngest + WINDOW_S - time.monotonic()))
            now = self._engine.usage(live)
        self._before = dict(now)
        gpus = {} if self._engine.host.remote else self._gpus.read(live)
        return {
            state.id: Figures(
                memory_bytes=now[state.id].memory_bytes if state.id in now else None,
                cpu_percent=_rate(before.get(state.id), now.get(state.id)),
                gpu_percent=gpus.get(state.id),
            )
            for state in live
        }


def _rate(before: Usage | None, now: Usage | None) -> float | None:
    """Return the CPU usage in percent of one core; None if the two readings do not give a rate."""
    if before is None or now is None or before.cpu_s is None or now.cpu_s is None:
        return None
    by_clock = before.clock is not None and now.clock is not None
    elapsed = (now.clock or 0) - (before.clock or 0) if by_clock else now.at - before.at
    used = now.cpu_s - before.cpu_s
    return 100 * used / elapsed if elapsed > 0 and used >= 0 else None


class GpuMeter:
    """Reads GPU utilisation; NVML is opened for the first GPU replica and kept open. No figures if NVML fails."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._opened = False

    def read(self, states: Sequence[ReplicaState]) -> dict[str, float]:
        """Return the mean utilisation of each replica's GPUs in percent, by replica id."""
        with_gpus = [state for state in states if state.device.startswith("gpu:")]
        if not with_gpus or not self._open():
            return {}
        busy = {
            state.id: [self._busy(device) for device in replica_gpus(state.device, state.plan)]
            for state in with_gpus
        }
        return {
            replica_id: sum(known) / len(known)
            for replica_id, values in busy.items()
            if (known := [value for value in values if value is not None])
        }

    def _open(self) -> bool:
        if not self._opened:
            self._opened = True
            try:
                if self._nvml is None:
                    import pynvml

                    self._nvml = pynvml
                self._nvml.nvmlInit()
            except Exception:  # NVML's own errors, a missing library, a missing module: all mean "no answer"
                self._nvml = None
        return self._nvml is not None

    def _busy(self, device: str) -> float | None:
        with contextlib.suppress(Exception):  # a MIG slice, or a GPU off the bus, has no figure
            by_name = device.startswith(("GPU-", "MIG-"))
            find = self._nvml.nvmlDeviceGetHandleByUUID if by_name else self._nvml.nvmlDeviceGetHandleByIndex
            handle = find(device if by_name else int(device))
            return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return None

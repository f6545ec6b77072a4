"""Choose the device, the number format and the number of threads, within the container's limits."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import cv2
import psutil
import torch

from starling.core.cgroups import container_cpu_count
from starling.core.errors import UsageError

logger = logging.getLogger(__name__)

MOST_THREADS = 4096
OWN_LAUNCH = "STARLING_LAUNCHED"
"""Set for the processes that `--device 0,1` starts: all other variables of their environment come from the user."""


@dataclass(frozen=True, slots=True)
class Compute:
    """The device and the number format of a model."""

    device: torch.device
    bfloat16: bool
    """Autocast of convolutions and matrix products to bfloat16; weights, statistics and loss stay float32."""
    cores: int
    """The number of cores that this process may use."""

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs on the CPU."""
        return self.device.type == "cpu"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context for a forward pass."""
        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def image_bytes(self, share: float) -> int | None:
        """Return a share of the GPU's free bytes, for decoded images; None on the CPU."""
        if self.on_cpu:
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free * share)

    def loader_threads(self, asked: int) -> int:
        """Return the number of threads that prepare batches: one on the CPU, because more take the model's cores."""
        return min(asked, 1 if self.on_cpu else self.cores)

    def memory_bytes(self) -> int:
        """Return the bytes of memory used: the GPU's peak, or this process's resident memory on the CPU."""
        if self.on_cpu:
            return int(psutil.Process().memory_info().rss)
        return torch.cuda.max_memory_reserved(self.device)

    def describe(self) -> str:
        """Return the device and the number format in a few words."""
        number_format = "bfloat16 autocast" if self.bfloat16 else "float32"
        if self.on_cpu:
            return f"CPU, {torch.get_num_threads()} threads, {number_format}"
        return f"{torch.cuda.get_device_name(self.device)} (cuda:{self.device.index}), {number_format}"


def select_compute(device: str, amp: str, processes: int = 1, *, deterministic: bool = False) -> Compute:
    """Return the compute that `--device` and `--amp` ask for, threads set to the container's share of cores.

    `processes` that train together on this host share the cores; `OMP_NUM_THREADS` sets the threads of torch and OpenCV
    in each of them. `deterministic` selects GPU kernels that give the same numbers in every run, if they exist.

    Raises UsageError that names the available devices if the device does not exist.
    """
    chosen = _select_device(device.strip().lower().removeprefix("cuda:"))
    cores = max(container_cpu_count() // processes, 1)
    asked = asked_threads()
    cv2.setNumThreads(asked or cores)
    if chosen.type == "cpu" or asked:
        torch.set_num_threads(asked or cores)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Shapes repeat, so searching the fastest kernels pays off; the fastest may differ between runs.
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    has_bfloat16 = cpu_has_bfloat16() if chosen.type == "cpu" else torch.cuda.is_bf16_supported(False)
    if amp == "on" and not has_bfloat16:
        logger.warning("--amp on: this hardware has no bfloat16, going on in float32")
    return Compute(chosen, amp != "off" and has_bfloat16, cores)


def asked_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the threads of one process that `OMP_NUM_THREADS` asks for; None where nobody has set it.

    `torchrun` sets it to 1 for several processes of a host, which then is not the user's choice; Starling's own launch
    does not.
    """
    given = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # the outermost of nested levels
    if not given:
        return None
    if not (given.isdecimal() and given.isascii() and 0 < int(given[:9]) <= MOST_THREADS):
        logger.warning(f"OMP_NUM_THREADS={given[:40]}: not a number from 1 to {MOST_THREADS}, and not obeyed")
        return None
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment and OWN_LAUNCH not in environment
    if by_torchrun and given == "1" and int(environment.get("LOCAL_WORLD_SIZE") or 1) > 1:
        return None
    return int(given)


def check_device(device: str) -> None:
    """Raise UsageError if `--device` names a device that does not exist here."""
    _select_device(device.strip().lower().removeprefix("cuda:"))


def _select_device(device: str) -> torch.device:
    """Return the torch device for `''`, `cpu` or a GPU's number."""
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "" and count == 0):
        return torch.device("cpu")
    index = 0 if device == "" else _gpu_index(device)
    if index >= count:
        there = f"GPUs 0 to {count - 1} are" if count > 1 else "only GPU 0 is" if count else "no GPU is"
        raise UsageError(f"--device {device}: {there} visible here; use one that is, or --device cpu")
    return torch.device("cuda", index)


def _gpu_index(device: str) -> int:
    if not device.isdecimal():
        raise UsageError(f"--device {device}: not a device; use cpu, or a GPU's number such as 0")
    return int(device)


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags

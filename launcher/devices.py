"""What `--gpus` and `--cpu` mean: the grammar, checked against the GPUs that NVML reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.errors import UsageError
from launcher.inventory import Gpu

MOST_DEVICES = 256
"""More than any machine has; a typing error such as `1-50000` stops here."""

_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/_-]{4,80}")
_REMEDY = "write --gpus all, 3, 1-5, 0,2-4, or UUIDs as `nvidia-smi -L` lists them"


@dataclass(frozen=True, slots=True)
class Device:
    """One replica's device: a GPU by index or UUID, or the number of a CPU replica."""

    kind: Literal["gpu", "cpu"]
    id: str

    @property
    def label(self) -> str:
        """The form that labels and records hold: `gpu:3`, `cpu:0`."""
        return f"{self.kind}:{self.id}"

    @property
    def slug(self) -> str:
        """The end of a replica's name: `gpu3`, `cpu0`, `gpu-1a2b3c4d` (the head of a UUID)."""
        if self.id.isdigit():
            return f"{self.kind}{self.id}"
        head = re.sub(r"[^0-9a-z]", "", self.id.lower())
        return f"{head[:3]}-{head[3:15]}"


def parse_gpus(text: str) -> tuple[str, ...] | None:
    """Return the ids that `--gpus` names, in the order given; None for `all`.

    Raises UsageError for anything outside the grammar: `all`, or a comma-separated list of indices,
    ranges and UUIDs.
    """
    if text.strip().lower() == "all":
        return None
    ids: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        ids.extend(_expand(item, text))
        if len(ids) > MOST_DEVICES:
            raise UsageError(f"--gpus {text}: names over {MOST_DEVICES} devices; {_REMEDY}")
    twice = sorted({item for item in ids if ids.count(item) > 1})
    if twice:
        raise UsageError(f"--gpus {text}: names {', '.join(twice)} twice; one replica runs on one GPU")
    return tuple(ids)


def _expand(item: str, text: str) -> list[str]:
    if _UUID.fullmatch(item):
        return [item]
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", item, flags=re.ASCII)
    if not match:
        raise UsageError(f"--gpus {text}: {item or 'an empty item'!r} is not a device; {_REMEDY}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UsageError(f"--gpus {text}: {item} runs backwards; write {last}-{first}")
    return [str(number) for number in range(first, min(last, first + MOST_DEVICES) + 1)]


def resolve_gpus(text: str, gpus: Sequence[Gpu] | None) -> tuple[Device, ...]:
    """Return the devices that `--gpus` names on this machine.

    `gpus` is NVML's list, or None where NVML does not answer (a remote engine): ids then stand as given, and
    the engine is the judge of them at the start. A full GPU named by UUID takes its index, so that one GPU has
    one name. Raises UsageError for a device that is not there.
    """
    ids = parse_gpus(text)
    if gpus is None:
        if ids is None:
            raise UsageError(
                "--gpus all: NVML does not answer here, so GPUs cannot be counted; name them: --gpus 0-3"
            )
        return tuple(Device("gpu", item) for item in ids)
    if ids is None:
        if not gpus:
            raise UsageError("--gpus all: this machine has no GPU; use --cpu N")
        return tuple(Device("gpu", str(gpu.index)) for gpu in gpus)
    devices = tuple(_find(item, text, gpus) for item in ids)
    if len(set(devices)) < len(devices):
        raise UsageError(f"--gpus {text}: names one GPU by index and by UUID; one replica runs on one GPU")
    return devices


def _find(item: str, text: str, gpus: Sequence[Gpu]) -> Device:
    for gpu in gpus:
        if item in (str(gpu.index), gpu.uuid):
            return Device("gpu", str(gpu.index))
    if item.startswith("MIG-"):  # NVML lists whole GPUs; the engine judges their slices.
        return Device("gpu", item)
    have = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus) or "none"
    raise UsageError(f"--gpus {text}: no GPU {item} on this machine; there are: {have}")


def split_cores(cores: Sequence[int], replicas: int) -> tuple[tuple[int, ...], ...]:
    """Return each CPU replica's own cores: contiguous, none shared, sizes differing by one at most.

    Raises UsageError when there are fewer cores than replicas.
    """
    if replicas < 1:
        raise UsageError(f"--cpu {replicas}: must be at least 1")
    if replicas > len(cores):
        raise UsageError(
            f"--cpu {replicas}: this machine has {len(cores)} cores and each replica needs one of its own; "
            f"use --cpu {len(cores)} at most"
        )
    base, extra = divmod(len(cores), replicas)
    shares, start = [], 0
    for number in range(replicas):
        end = start + base + (number < extra)
        shares.append(tuple(cores[start:end]))
        start = end
    return tuple(shares)


def format_cores(cores: Sequence[int]) -> str:
    """Return cores as a cpuset list: `0-3,6`."""
    parts: list[str] = []
    start = previous = None
    for core in [*sorted(cores), None]:
        if start is None or previous is None:
            start = previous = core
        elif core is not None and core == previous + 1:
            previous = core
        else:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = previous = core
    return ",".join(parts)

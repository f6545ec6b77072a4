"""The grammar of `--gpus` and `--cpu`, checked against the GPUs that NVML reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.devices.inventory import Gpu
from starling.core.errors import UsageError
from starling.core.units import format_cores

MOST_DEVICES = 256
"""More than any machine has; this limit catches a typing error such as `1-50000`."""

_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/_-]{4,80}")
_SLICE = re.compile(r"(\d{1,6}):(\d{1,6})", re.ASCII)
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_FREE = re.compile(r"free(?::(\d{1,6}))?", re.ASCII)
_REMEDY = "write --gpus all, free, free:2, 3, 1-5, 0,2-4, or UUIDs as `nvidia-smi -L` lists them"


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one replica: a GPU, a MIG slice of a GPU, several GPUs, or a CPU replica's number.

    `id` is the form that people read and write: `3`, `3:0` (the first slice of GPU 3), `0-3` or `0,2-3` (several), or
    a UUID if NVML does not answer.
    """

    kind: Literal["gpu", "cpu"]
    id: str
    uuids: tuple[str, ...] = ()
    """The UUIDs of its GPUs, which stay the same when indices change; empty if NVML does not answer."""

    @property
    def label(self) -> str:
        """The form in labels and records: `gpu:3`, `gpu:0-3`, `cpu:0`."""
        return f"{self.kind}:{self.id}"

    @property
    def slug(self) -> str:
        """The end of a replica's name: `gpu3`, `gpu0-3`, `gpu3-mig0`, `cpu0`, `gpu-1a2b3c4d` (the head of a UUID)."""
        if re.fullmatch(r"[0-9,:-]+", self.id):
            return self.kind + self.id.replace(":", "-mig").replace(",", "_")
        first, *others = self.members
        head = re.sub(r"[^0-9a-z]", "", first.lower())
        return f"{head[:3]}-{head[3:15]}" + (f"-x{len(others) + 1}" if others else "")

    @property
    def members(self) -> tuple[str, ...]:
        """The ids of the single devices that this device consists of."""
        return expand_ids(self.id)

    @property
    def handles(self) -> tuple[str, ...]:
        """The names that an engine gives to the GPU runtime: UUIDs if they are known, else the ids."""
        return self.uuids or self.members

    @property
    def inside(self) -> str:
        """The trainer's `--device`: GPUs count from 0 within a replica, and `cpu` appears once per process."""
        count = len(self.members)
        return ",".join(["cpu"] * count if self.kind == "cpu" else map(str, range(count)))


@dataclass(frozen=True, slots=True)
class Selection:
    """The devices that `--gpus` asks for: `all`, free GPUs, or the GPUs with these ids."""

    kind: Literal["all", "free", "ids"]
    ids: tuple[str, ...] = ()
    count: int | None = None
    """The number of free GPUs wanted; None for all free GPUs."""


def parse_gpus(text: str) -> Selection:
    """Return the selection that `--gpus` asks for, ids in the order given.

    Raises UsageError for anything outside the grammar: `all`, `free`, `free:N`, or a comma-separated list of indices,
    ranges, slices as GPU:SLICE, and UUIDs.
    """
    asked = text.strip().lower()
    if asked == "all":
        return Selection("all")
    if free := _FREE.fullmatch(asked):
        count = int(free[1]) if free[1] else None
        if count is not None and not 1 <= count <= MOST_DEVICES:
            raise UsageError(f"--gpus {text}: must ask for 1 to {MOST_DEVICES}; {_REMEDY}")
        return Selection("free", count=count)
    ids: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        ids.extend(_expand(item, text))
        if len(ids) > MOST_DEVICES:
            raise UsageError(f"--gpus {text}: names over {MOST_DEVICES} devices; {_REMEDY}")
    twice = sorted({item for item in ids if ids.count(item) > 1})
    if twice:
        raise UsageError(f"--gpus {text}: names {', '.join(twice)} twice; one replica runs on one GPU")
    for item in ids:
        if (slice_ := _SLICE.fullmatch(item)) and slice_[1] in ids:
            raise UsageError(f"--gpus {text}: names GPU {slice_[1]} and its slice {item}; name one of them")
    return Selection("ids", tuple(ids))


def expand_ids(text: str) -> tuple[str, ...]:
    """Return the ids that a device's `id` stands for: `0,2-3` is 0, 2 and 3; a slice or a UUID stays as given."""
    ids: list[str] = []
    for item in text.split(","):
        if match := _RANGE.fullmatch(item):
            first, last = int(match[1]), int(match[2] or match[1])
            ids += [str(number) for number in range(first, min(last, first + MOST_DEVICES) + 1)]
        else:
            ids.append(item)
    return tuple(ids)


def replica_gpus(label: str, plan: Mapping[str, object]) -> tuple[str, ...]:
    """Return a replica's GPUs: the UUIDs of its plan, else the ids of its label; empty for a CPU replica."""
    kind, _, text = label.partition(":")
    uuids = plan.get("uuids")
    if kind != "gpu":
        return ()
    return tuple(map(str, uuids)) if isinstance(uuids, list) and uuids else expand_ids(text)


def _expand(item: str, text: str) -> Sequence[str]:
    if _UUID.fullmatch(item):
        return [item]
    if match := _SLICE.fullmatch(item):
        return [f"{int(match[1])}:{int(match[2])}"]
    match = _RANGE.fullmatch(item)
    if not match:
        alone = (
            "cannot be combined"
            if item.lower() == "all" or _FREE.fullmatch(item.lower())
            else "is not a device"
        )
        raise UsageError(f"--gpus {text}: {item or 'an empty item'!r} {alone}; {_REMEDY}")
    if match[2] and int(match[2]) < int(match[1]):
        raise UsageError(f"--gpus {text}: {item} runs backwards; write {int(match[2])}-{int(match[1])}")
    return expand_ids(item)


def resolve_ids(ids: Sequence[str], text: str, gpus: Sequence[Gpu] | None) -> tuple[Device, ...]:
    """Return the devices with these ids, which `--gpus text` names.

    `gpus` is NVML's list, or None if NVML does not answer (a remote engine): ids then stay as given, and the engine
    checks them when replicas start. A device given by UUID is named by its index, since one device has one name.
    Raises UsageError for a device that does not exist or cannot be used.
    """
    if gpus is None:
        return tuple(Device("gpu", item) for item in ids)
    devices = tuple(_find(item, text, gpus) for item in ids)
    if len(set(devices)) < len(devices):
        raise UsageError(f"--gpus {text}: names one GPU by index and by UUID; one replica runs on one GPU")
    return devices


def every_device(gpus: Sequence[Gpu]) -> tuple[Device, ...]:
    """Return all devices that replicas can use: whole GPUs, and the slices of GPUs in MIG mode."""
    devices = []
    for gpu in gpus:
        if gpu.mig:
            devices += [Device("gpu", f"{gpu.index}:{part.index}", (part.uuid,)) for part in gpu.slices]
        elif not gpu.problem:
            devices.append(Device("gpu", str(gpu.index), (gpu.uuid,)))
    return tuple(devices)


def all_gpus(text: str, gpus: Sequence[Gpu] | None) -> tuple[Device, ...]:
    """Return the devices of `all`; raises UsageError if there is no GPU, or if a GPU cannot be used."""
    if gpus is None:
        raise UsageError(
            f"--gpus {text}: NVML does not answer here, so GPUs cannot be counted; name them: --gpus 0-3"
        )
    if not gpus:
        raise UsageError(f"--gpus {text}: this machine has no GPU; use --cpu N")
    for gpu in gpus:
        if gpu.problem or (gpu.mig and not gpu.slices):
            _refuse(gpu, text)
    return every_device(gpus)


def _find(item: str, text: str, gpus: Sequence[Gpu]) -> Device:
    for gpu in gpus:
        if item in (str(gpu.index), gpu.uuid):
            if gpu.problem or gpu.mig:
                _refuse(gpu, text)
            return Device("gpu", str(gpu.index), (gpu.uuid,))
        for part in gpu.slices:
            if item in (f"{gpu.index}:{part.index}", part.uuid):
                return Device("gpu", f"{gpu.index}:{part.index}", (part.uuid,))
    what = "MIG slice" if item.startswith("MIG-") or ":" in item else "GPU"
    if not gpus:
        raise UsageError(f"--gpus {text}: no {what} {item} on this machine, which has none; use --cpu N")
    have = ", ".join(_describe(gpu) for gpu in gpus)
    raise UsageError(f"--gpus {text}: no {what} {item} on this machine; there are: {have}")


def _refuse(gpu: Gpu, text: str) -> None:
    """Raise UsageError for a GPU that cannot be used, or cannot be used whole."""
    if gpu.problem:
        raise UsageError(
            f"--gpus {text}: GPU {gpu.index} cannot be used ({gpu.problem}); name others, or see `nvidia-smi`"
        )
    remedy = (
        f"name its slices: {_slices(gpu)}"
        if gpu.slices
        else f"it has none: make some (sudo nvidia-smi mig -i {gpu.index} -cgi … -C), or name other GPUs"
    )
    raise UsageError(
        f"--gpus {text}: GPU {gpu.index} is in MIG mode, so it is handed out in slices and never whole; {remedy}"
    )


def _describe(gpu: Gpu) -> str:
    return f"{gpu.index} ({gpu.name or gpu.problem}" + (f"; slices {_slices(gpu)})" if gpu.slices else ")")


def _slices(gpu: Gpu) -> str:
    return ", ".join(f"{gpu.index}:{part.index} ({part.name}, {part.uuid})" for part in gpu.slices)


def join_devices(devices: Sequence[Device]) -> Device:
    """Return one device made of all of these, for one training on several devices."""
    ids = [device.id for device in devices]
    whole = all(item.isdigit() for item in ids)
    together = format_cores([int(item) for item in ids]) if whole else ",".join(ids)
    ordered = sorted(devices, key=lambda device: int(device.id)) if whole else devices
    return Device(devices[0].kind, together, tuple(uuid for device in ordered for uuid in device.uuids))


def split_cores(cores: Sequence[int], replicas: int) -> tuple[tuple[int, ...], ...]:
    """Return each CPU replica's own cores: contiguous and disjoint, with sizes that differ by at most one.

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

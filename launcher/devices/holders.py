"""Which GPUs are held by whom, and which GPUs `--gpus` may use. Pure: the holders come in as an argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.devices.devices import (
    Device,
    Selection,
    all_gpus,
    every_device,
    join_devices,
    parse_gpus,
    resolve_ids,
)
from launcher.devices.inventory import Gpu
from starling.core.errors import UsageError

EVERY = "all"


@dataclass(frozen=True, slots=True)
class GpuHolder:
    """A container, a replica or a process that has GPUs of this machine assigned, or computes on them."""

    name: str
    """The holder, in words that follow "held by"."""
    gpus: tuple[str, ...]
    """Indices, UUIDs, slices as GPU:SLICE, or `all`; empty for a container without a GPU."""
    id: str = ""
    """The id of the container or the replica; empty for a process outside both."""
    remedy: str = ""
    """The command that ends the holder; empty if the user may not end it."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The holders of GPUs outside the fleet, and the GPUs that the fleet already has."""

    holders: tuple[GpuHolder, ...] = ()
    own: tuple[str, ...] = ()
    """The GPUs of the fleet's existing replicas, as UUIDs or ids."""
    settled: tuple[str, ...] = ()
    """The GPUs in `own` whose replicas run or have finished; `up` ignores other holders of these GPUs."""


NOBODY = Occupancy()


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """The devices that `--gpus` selects, and the other holders of these devices."""

    devices: tuple[Device, ...]
    held: Mapping[Device, tuple[GpuHolder, ...]] = field(default_factory=dict)

    def shared_notes(self) -> list[str]:
        """Return a note for each device that the fleet shares with other holders."""
        return [f"{_held(device, found)}; shared as --force says" for device, found in self.held.items()]

    def check_free(self, text: str, gpus: Sequence[Gpu] | None, occupancy: Occupancy) -> None:
        """Raise UsageError with the holders and the remedies if others hold a device."""
        if self.held:
            raise UsageError(_busy(text, gpus, self.held, occupancy))


NO_DEVICE = GpuChoice(())


def choose_gpus(text: str, gpus: Sequence[Gpu] | None, occupancy: Occupancy = NOBODY) -> GpuChoice:
    """Return the devices that `--gpus` selects.

    `gpus` is NVML's list, or None if NVML does not answer. A fleet that exists keeps its devices, so a second call
    with `free` selects the same devices as the first. Raises UsageError for devices that do not exist or are not free.
    """
    selection = parse_gpus(text)
    if selection.kind == "all":
        devices = all_gpus(text, gpus)
    elif selection.kind == "ids":
        devices = resolve_ids(selection.ids, text, gpus)
    else:
        devices = _choose_free(selection, text, gpus, occupancy)
    settled = _parts(occupancy.settled, gpus)
    held = {
        device: found
        for device in devices
        if not _parts(device.handles, gpus) <= settled
        and (found := holders_of(device, gpus, occupancy.holders))
    }
    return GpuChoice(devices, held)


def holders_of(
    device: Device, gpus: Sequence[Gpu] | None, holders: Iterable[GpuHolder]
) -> tuple[GpuHolder, ...]:
    """Return the holders of the device, or of a part of the device."""
    wanted = _parts(device.handles, gpus)
    return tuple(holder for holder in holders if EVERY in holder.gpus or wanted & _parts(holder.gpus, gpus))


def _parts(ids: Iterable[str], gpus: Sequence[Gpu] | None) -> set[str]:
    """Return the UUIDs that the ids cover: a GPU covers itself and all its slices, so any overlap is a shared UUID."""
    parts: set[str] = set()
    for item in ids:
        known = set()
        for gpu in gpus or ():
            if item in (gpu.uuid, str(gpu.index)):
                known = {gpu.uuid or item, *(part.uuid for part in gpu.slices)}
            for part in gpu.slices:
                if item in (part.uuid, f"{gpu.index}:{part.index}"):
                    known = {part.uuid}
        parts |= known or {item}
    return parts


def _choose_free(
    selection: Selection, text: str, gpus: Sequence[Gpu] | None, occupancy: Occupancy
) -> tuple[Device, ...]:
    everything = every_device(gpus or ()) or all_gpus(text, gpus)
    mine = _parts(occupancy.own, gpus)
    own = [device for device in everything if mine & set(device.uuids)]
    if own and selection.count is None:
        return tuple(own)
    free = [
        device
        for device in everything
        if device not in own and not holders_of(device, gpus, occupancy.holders)
    ]
    chosen = sorted([*own, *free][: selection.count], key=everything.index)
    if not chosen or len(chosen) < (selection.count or 0):
        taken = [device for device in everything if device not in own and device not in free]
        lines = [_held(device, holders_of(device, gpus, occupancy.holders)) for device in taken]
        have = f"{len(chosen)} of {len(everything)} are free" if chosen else "none is free"
        remedy = f"wait, or take --gpus free:{len(chosen)}" if chosen else "wait for one"
        raise UsageError("\n  ".join([f"--gpus {text}: {have}", *lines]) + f"\n{remedy}")
    return tuple(chosen)


def _busy(
    text: str,
    gpus: Sequence[Gpu] | None,
    held: Mapping[Device, tuple[GpuHolder, ...]],
    occupancy: Occupancy,
) -> str:
    """Return the message that names each holder and the remedies."""
    lines = [_held(device, found) for device, found in held.items()]
    free = [device for device in every_device(gpus or ()) if not holders_of(device, gpus, occupancy.holders)]
    ends = dict.fromkeys(holder.remedy for found in held.values() for holder in found if holder.remedy)
    remedies = [
        f"choose others (free: {join_devices(free).id})" if free else "choose others, or wait",
        *(f"end what holds it: {end}" for end in ends),
        "or share with --force",
    ]
    if len(lines) == 1:
        return f"--gpus {text}: {lines[0]}; {', '.join(remedies)}"
    return "\n  ".join([f"--gpus {text}: {len(lines)} devices are held", *lines]) + f"\n{', '.join(remedies)}"


def _held(device: Device, found: Sequence[GpuHolder]) -> str:
    return f"GPU {device.id} is held by {' and '.join(dict.fromkeys(holder.name for holder in found))}"

"""What one training on several devices asks of them and of its arguments. The trainer is asked for nothing here."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.devices.devices import Device
from launcher.options.training_args import TrainingArgs
from starling.core.errors import UsageError


def check_together(args: TrainingArgs, devices: Sequence[Device]) -> None:
    """Raise UsageError for devices, or a training, that cannot be one training on all of them."""
    config = args.command.config
    if config.evolve:
        raise UsageError(
            "--ddp: a search gives each device candidates of its own, which finishes more of them in the same time; "
            "leave out --ddp, or --evolve"
        )
    sliced = [item for device in devices for item in device.handles if ":" in item or item.startswith("MIG-")]
    if sliced and len(devices) > 1:
        raise UsageError(
            f"--ddp: {', '.join(device.id for device in devices)}: CUDA gives a program one MIG slice and no more; "
            "name whole GPUs, or leave out --ddp"
        )
    # A resumed training has the batch of its checkpoint, which the host does not read.
    if len(devices) > 1 and ("batch_size" in args.command.given or not config.resume):
        config.check_split(len(devices))


def check_device_argument(asked: str, device: Device) -> None:
    """Refuse a training `--device` that the replica does not have: inside, GPUs count from 0."""
    several = len(device.members) > 1
    allowed = (device.inside,) if several or device.kind == "cpu" else ("0", "cuda:0")
    if asked and asked not in allowed:
        raise UsageError(
            f"--device {asked}: each replica finds its own {'devices' if several else 'device'} by itself; leave "
            "--device out and choose devices with `launcher up --gpus` or `--cpu`"
            + ("" if several or "," not in asked else ", and --ddp for one training on several")
        )

"""Several processes that train one model: their ranks, what they exchange, and how they end together.

Each process holds the whole model and a part of every batch. torchrun or `--device 0,1` starts the processes (see
relaunch.py); they meet at MASTER_ADDR:MASTER_PORT. Gradients travel over NCCL between GPUs and over Gloo between CPUs;
everything else that the processes exchange (stop signals, results, files) travels over Gloo.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from starling.core.errors import StarlingError, UsageError
from starling.core.files.refusals import refusal
from starling.core.settings.train import TrainConfig
from starling.data.loader.loader import Batch
from starling.device import Compute
from starling.distributed.heartbeat import STORE_S, Heartbeat, LostRank, end_process
from starling.errors import Stopped, print_error
from starling.model.loss import Share

Value = TypeVar("Value")

JOIN_S = 300
"""Maximum seconds until all processes have arrived."""
COLLECTIVE_S = 3600
"""Maximum seconds of a collective; rank 0 may draw and save for long, and the heartbeat detects lost ranks."""


class RankLost(StarlingError):
    """Another process of the group is lost; this process cannot continue alone."""

    def __init__(self, lost: LostRank) -> None:
        super().__init__(lost.message)
        self.exit_code = lost.exit_code
        self.lost = lost


@dataclass(frozen=True, slots=True)
class Rank:
    """The place of this process among the processes that torchrun, or another starter, has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    serves: bool
    """Whether this process hosts the meeting point; under torchrun, torchrun's agent hosts it."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank | None:
        """Return the place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; None for a single process."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(environment.get(name) for name in names) or environment["WORLD_SIZE"] == "1":
            return None
        try:
            rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local = (
                environment.get("LOCAL_RANK", str(rank)),
                environment.get("LOCAL_WORLD_SIZE", str(world_size)),
            )
            port = int(environment["MASTER_PORT"])
            place = cls(rank, world_size, int(local[0]), int(local[1]), environment["MASTER_ADDR"], port,
                        rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True")  # fmt: skip
        except ValueError:
            given = ", ".join(f"{name}={environment[name]!r}" for name in names)
            raise UsageError(
                f"{given}: not a place in a group of processes; start through torchrun"
            ) from None
        if not 0 <= rank < world_size:
            raise UsageError(f"RANK={rank}: must be from 0 to below WORLD_SIZE={world_size}")
        return place

    def device(self, config: TrainConfig) -> str:
        """Return this process's device of those in `--device`; raises UsageError if their number is wrong."""
        devices = config.devices
        if set(devices) == {"cpu"} or (not devices and not torch.cuda.is_available()):
            return "cpu"
        if not devices:
            return str(self.local_rank)
        if len(devices) != self.local_world_size:
            raise UsageError(
                f"--device {config.device}: {len(devices)} devices for the {self.local_world_size} processes of this "
                "host; name one for each with --device"
            )
        return devices[self.local_rank]


class Group:
    """A single process: every operation returns its argument. `ProcessGroup` is the group of several processes."""

    rank = 0
    world_size = 1
    local_world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, writes files and reports: rank 0."""
        return self.rank == 0

    def device(self, config: TrainConfig) -> str:
        """Return the device of this process."""
        return config.device

    def wrap(self, model: nn.Module, compute: Compute) -> Callable[..., Any]:
        """Return the model to call in training; its backward pass averages gradients over all ranks."""
        return model

    def share(self, batch: Batch) -> Share | None:
        """Return the share that the loss needs if other ranks have parts of the batch; None for a single process."""
        return None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, equal on each rank."""
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks."""

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the tensor of rank 0."""

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return for each value the highest of all ranks, equal on each rank."""
        return values

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, by rank, on rank 0; an empty list on other ranks."""
        return [value]

    def from_main(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Raise RankLost for an error, or in place of hanging, if another rank has ended."""
        yield

    def training_is_over(self) -> None:
        """Declare that no rank waits for another from now on."""


SINGLE = Group()
"""The group of a single process."""


class ProcessGroup(Group):
    """This process in a group of processes that train one model."""

    def __init__(self, place: Rank, heartbeat: Heartbeat, control: dist.ProcessGroup) -> None:
        self.rank, self.world_size = place.rank, place.world_size
        self.local_world_size = place.local_world_size
        self._place, self._heartbeat, self._control = place, heartbeat, control

    def device(self, config: TrainConfig) -> str:
        """Return this process's device of those in `--device`."""
        return self._place.device(config)

    def wrap(self, model: nn.Module, compute: Compute) -> Callable[..., Any]:
        """Return the model under DistributedDataParallel; it begins with the weights of rank 0."""
        # Buffers are averaged in each step instead: BatchNorm's statistics cover all images, not only rank 0's.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=None if compute.on_cpu else [compute.device.index], broadcast_buffers=False
        )

    def share(self, batch: Batch) -> Share | None:
        """Return this rank's share of the batch."""
        return Share(batch.whole, batch.share, self.sum)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, equal on each rank."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks, in one exchange."""
        if not tensors:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors])) / self.world_size
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the tensor of rank 0."""
        for tensor in tensors:
            dense = tensor.contiguous()  # broadcast needs it; channels-last weights are not contiguous
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return for each value the highest of all ranks, equal on each rank."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tuple(tensor.tolist())

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, by rank, on rank 0; an empty list on other ranks."""
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self._control)
        return values or []

    def from_main(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._control)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Raise RankLost for an error that the end of another rank has caused."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            lost = self._heartbeat.verdict()
            if lost is None:
                raise
            raise RankLost(lost) from None

    def training_is_over(self) -> None:
        """Declare that no rank waits for another from now on."""
        self._heartbeat.disarm()


@contextlib.contextmanager
def joined(config: TrainConfig, place: Rank | None) -> Iterator[Group]:
    """Enter the group of `place`; without a place, yield the group of a single process.

    Raises UsageError if the group cannot form, RankLost if one of its processes ends early. Other processes can read
    how this process ends.
    """
    if place is None:
        yield SINGLE
        return
    config.check_split(place.world_size)
    own = place.device(config)
    heartbeat, control = _meet(place, on_cpu=own == "cpu")
    group = ProcessGroup(place, heartbeat, control)
    try:
        with group.watch():
            yield group
    except BaseException as error:
        _leave_word(error, heartbeat, place)
        raise
    else:
        heartbeat.end(0)
        gc.collect()  # the trainer's reference cycles hold torch's groups, whose threads end with them
        dist.destroy_process_group()


def _leave_word(error: BaseException, heartbeat: Heartbeat, place: Rank) -> None:
    """Record for the other ranks how this process ends; print the error here if rank 0 is lost."""
    known = refusal(error) if isinstance(error, OSError) else error
    if isinstance(known, StarlingError):
        code, words = known.exit_code, str(known)
    else:
        code, words = 1, f"{type(error).__name__}: {error}"
    heartbeat.end(code, words)
    if isinstance(error, RankLost) and heartbeat.speaks(error.lost) and place.rank:
        _tell(error)
    if place.serves and not isinstance(error, Stopped):  # all ranks stop together, in a short grace
        heartbeat.linger()  # what the others read ends with this process


def _meet(place: Rank, *, on_cpu: bool) -> tuple[Heartbeat, dist.ProcessGroup]:
    """Return the heartbeat, and a group for control messages; the default group carries tensors."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"starling/{attempt}"
    try:
        meeting = _connect(place, serves=place.serves)
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            store=PrefixStore(prefix, meeting),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_S))
    except dist.DistError as error:
        raise UsageError(_cannot_meet(place, error)) from None
    # A separate connection: the heartbeat thread must not wait while the training uses the store.
    pulse = PrefixStore(prefix, _connect(place, serves=False, timeout=STORE_S))
    who = f"process {os.getpid()} on {socket.gethostname()}"
    heartbeat = Heartbeat(pulse, place.rank, place.world_size, who, _give_up(place.rank))
    heartbeat.first()
    dist.barrier(group=control)
    heartbeat.start()
    return heartbeat, control


def _connect(place: Rank, *, serves: bool, timeout: int = JOIN_S) -> TCPStore:
    return TCPStore(
        place.address,
        place.port,
        is_master=serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def _cannot_meet(place: Rank, error: Exception) -> str:
    where = f"{place.address}:{place.port}"
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return (
            f"port {place.port} is taken by another program on {socket.gethostname()}, so the processes cannot meet at "
            f"{where}; set MASTER_PORT (torchrun --master_port) to a free port, the same on every node"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (
        f"rank {place.rank} of {place.world_size} cannot meet the others at {where} ({reason}); check that every node "
        "was started with the same --nnodes, --master_addr and --master_port, and that the port is open between them"
    )


def _give_up(rank: int) -> Callable[[LostRank], None]:
    def give_up(lost: LostRank) -> None:
        if rank == (1 if lost.rank == 0 else 0):
            _tell(RankLost(lost))
        end_process(lost)

    return give_up


def _tell(error: RankLost) -> None:
    print_error(f"error: {error}")

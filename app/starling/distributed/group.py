"""Several processes that train one model: who they are, what they share, and how they end together.

Each holds the whole model and a part of every batch. The processes are started by torchrun, or by `--device 0,1`
(see relaunch); they meet at MASTER_ADDR:MASTER_PORT. Gradients travel over NCCL between GPUs and over Gloo between
CPUs; what the processes agree on besides (a stop, results, files) travels over Gloo.
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
"""Seconds for all processes to arrive."""
COLLECTIVE_S = 3600
"""Longest wait for each other. Generous, as rank 0 may draw and save for long; the dead are found by heartbeat."""


class RankLost(StarlingError):
    """Another process of the group is gone; this one cannot go on alone."""

    def __init__(self, lost: LostRank) -> None:
        super().__init__(lost.message)
        self.exit_code = lost.exit_code
        self.lost = lost


@dataclass(frozen=True, slots=True)
class Rank:
    """Where this process stands among those that torchrun, or another starter, has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    serves: bool
    """Whether this process hosts the meeting point; under torchrun its agent does."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank | None:
        """Return the place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; None for a process alone."""
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
        """Return this process's own device out of `--device`; raises UsageError where they do not add up."""
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
    """One process by itself: every operation returns what it is given. `ProcessGroup` is the one of several."""

    rank = 0
    world_size = 1
    local_world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, writes files and reports: rank 0."""
        return self.rank == 0

    def device(self, config: TrainConfig) -> str:
        """Return this process's own device."""
        return config.device

    def wrap(self, model: nn.Module, compute: Compute) -> Callable[..., Any]:
        """Return the model to call in training; its backward pass averages gradients over all ranks."""
        return model

    def share(self, batch: Batch) -> Share | None:
        """Return what the loss must know where other ranks have the rest of the batch."""
        return None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, the same on each."""
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks."""

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by rank 0's."""

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return for each value the highest of all ranks, the same on each."""
        return values

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank, on rank 0; nothing elsewhere."""
        return [value]

    def from_main(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Raise RankLost for an error that another rank's end has caused, and where it would hang for one."""
        yield

    def training_is_over(self) -> None:
        """Tell that no rank waits for another from here on."""


SINGLE = Group()
"""What a process alone belongs to."""


class ProcessGroup(Group):
    """This process among those that train one model together."""

    def __init__(self, place: Rank, heartbeat: Heartbeat, control: dist.ProcessGroup) -> None:
        self.rank, self.world_size = place.rank, place.world_size
        self.local_world_size = place.local_world_size
        self._place, self._heartbeat, self._control = place, heartbeat, control

    def device(self, config: TrainConfig) -> str:
        """Return this process's own device out of `--device`."""
        return self._place.device(config)

    def wrap(self, model: nn.Module, compute: Compute) -> Callable[..., Any]:
        """Return the model under DistributedDataParallel; it begins with rank 0's weights."""
        # Buffers are averaged with each step instead: BatchNorm's figures are then of all images, not of rank 0's.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=None if compute.on_cpu else [compute.device.index], broadcast_buffers=False
        )

    def share(self, batch: Batch) -> Share | None:
        """Return this rank's share of the batch."""
        return Share(batch.whole, batch.share, self.sum)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, the same on each."""
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
        """Replace each tensor by rank 0's."""
        for tensor in tensors:
            dense = tensor.contiguous()  # a channels-last weight is not, and a broadcast wants it so
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return for each value the highest of all ranks, the same on each."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tuple(tensor.tolist())

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank, on rank 0; nothing elsewhere."""
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
        """Raise RankLost for an error that another rank's end has caused."""
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
        """Tell that no rank waits for another from here on."""
        self._heartbeat.disarm()


@contextlib.contextmanager
def joined(config: TrainConfig, place: Rank | None) -> Iterator[Group]:
    """Enter the group of `place`, or stay alone.

    Raises UsageError where the group cannot form, and RankLost where one of its processes ends early. How this one
    ends is left for the others to read.
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
        gc.collect()  # the trainer's cycles hold torch's groups, whose threads end with them
        dist.destroy_process_group()


def _leave_word(error: BaseException, heartbeat: Heartbeat, place: Rank) -> None:
    """Leave for the others to read how this process ends; say it where rank 0, which would, is gone."""
    known = refusal(error) if isinstance(error, OSError) else error
    if isinstance(known, StarlingError):
        code, words = known.exit_code, str(known)
    else:
        code, words = 1, f"{type(error).__name__}: {error}"
    heartbeat.end(code, words)
    if isinstance(error, RankLost) and heartbeat.speaks(error.lost) and place.rank:
        _tell(error)
    if place.serves and not isinstance(error, Stopped):  # all stop together, and their grace is short
        heartbeat.linger()  # what the others are to read ends with this process


def _meet(place: Rank, *, on_cpu: bool) -> tuple[Heartbeat, dist.ProcessGroup]:
    """Return the heartbeat, and the group for what the processes agree on; the default group carries tensors."""
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
    # A connection of its own: the thread must not wait behind the training's own use of the store.
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

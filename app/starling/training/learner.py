"""Run a batch forward and backward, in parts whose gradients add up where the batch does not fit into memory.

A loss or weights that are not finite are noticed without reading the device in every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from starling.data.loader.loader import Batch
from starling.data.loader.prepare import filled_up
from starling.device import Compute
from starling.distributed.group import Group
from starling.errors import is_out_of_memory
from starling.model.loss import Loss
from starling.prediction.predictor import to_input


class Learner:
    """What one iteration does up to the gradients."""

    parts: int
    """Parts that a batch goes through in; above 1 after memory ran out."""

    def __init__(
        self,
        forward: Callable[..., Any],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        group: Group,
        say: Callable[[str], None],
        *,
        back_off: bool,
    ) -> None:
        """`forward` takes images [B,3,H,W]; `back_off` allows parts, which several processes cannot take."""
        self._forward, self._loss, self._optimizer = forward, loss, optimizer
        self._compute, self._group, self._say = compute, group, say
        self._back_off = back_off and group.world_size == 1
        self.parts = 1

    def learn(self, batch: Batch) -> Tensor:
        """Add the batch's gradients, and return its [3] box, objectness and class losses, detached.

        Raises what torch raises where memory runs out even for a single image, or parts are not allowed.
        """
        losses = self._try(batch)
        while losses is None:
            losses = self._try(batch)
        return losses

    def _try(self, batch: Batch) -> Tensor | None:
        """Return the losses; None where the batch must be tried in smaller parts."""
        losses = torch.zeros(3, device=self._compute.device)
        try:
            for part in split(batch, self.parts) if self.parts > 1 else (batch,):
                with self._compute.autocast():
                    predictions = self._forward(to_input(part.images, self._compute, part.scaled_hw))
                targets = part.targets.to(self._compute.device, non_blocking=True)
                if not self._compute.on_cpu:
                    targets = filled_up(targets)
                total, part_losses = self._loss(predictions, targets, self._group.share(part))
                # Several processes average their gradients, which have to add up.
                (total * (part.loss_scale * self._group.world_size)).backward()
                losses += part_losses * (len(part.indices) / len(batch.indices))
        except (RuntimeError, MemoryError) as error:
            if not self._back_off or not is_out_of_memory(error) or self.parts >= len(batch.indices):
                raise
        else:
            return losses
        # Outside the handler, whose traceback would keep the tensors that are to go.
        self.parts *= 2
        self._optimizer.zero_grad(set_to_none=True)
        if not self._compute.on_cpu:
            torch.cuda.empty_cache()
        self._say(
            f"out of memory: from here a batch goes through in {self.parts} parts; "
            "a smaller --batch or --imgsz is faster"
        )
        return None


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Yield the batch in at most `parts` parts of near equal size, targets numbered anew in each."""
    size = math.ceil(len(batch.indices) / parts)
    for first in range(0, len(batch.indices), size):
        rows = (batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + size)
        targets = batch.targets[rows]
        targets[:, 0] -= first
        yield replace(
            batch,
            images=batch.images[first : first + size],
            targets=targets,
            indices=batch.indices[first : first + size],
            original_hw=batch.original_hw[first : first + size],
        )


class LossWatch:
    """Remember the first iteration whose loss was NaN or infinite, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def look(self, total: Tensor, position: int) -> None:
        """Look at one iteration's loss; queues work on the device and does not wait for it."""
        fresh = ~torch.isfinite(total.detach()) & (self._first < 0)
        self._first.masked_fill_(fresh, position)

    def first_bad(self) -> int | None:
        """Return the first bad iteration's position, None if there was none; waits for the device."""
        position = int(self._first)
        return None if position < 0 else position

    def reset(self) -> None:
        """Forget what was seen."""
        self._first.fill_(-1)


@torch.no_grad()
def is_finite(model: nn.Module) -> bool:
    """Return whether every floating point number of the model is finite; waits for the device once."""
    states = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(states))).all())

"""Run a batch forward and backward, in parts if the whole batch does not fit into memory: gradients of parts add up.

`LossWatch` and `is_finite` notice a loss or a weight that is not finite, without reading the device in every iteration.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)


class Learner:
    """Compute the loss and the gradients of one iteration."""

    parts: int
    """Number of parts that each batch is split into; above 1 after an out-of-memory error."""

    def __init__(
        self,
        forward: Callable[..., Any],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        group: Group,
        *,
        back_off: bool,
    ) -> None:
        """`forward` takes images [B,3,H,W]; `back_off` allows smaller parts, but only in training with one process."""
        self._forward, self._loss, self._optimizer = forward, loss, optimizer
        self._compute, self._group = compute, group
        self._back_off = back_off and group.world_size == 1
        self.parts = 1

    def learn(self, batch: Batch) -> Tensor:
        """Add the batch's gradients, and return its [3] box, objectness and class losses, detached.

        Raises torch's out-of-memory error if a single image does not fit into memory, or if parts are not allowed.
        """
        losses = self._try(batch)
        while losses is None:
            losses = self._try(batch)
        return losses

    def _try(self, batch: Batch) -> Tensor | None:
        """Return the losses; None if memory ran out, and the batch must be tried again in smaller parts."""
        losses = torch.zeros(3, device=self._compute.device)
        try:
            for part in split(batch, self.parts) if self.parts > 1 else (batch,):
                with self._compute.autocast():
                    predictions = self._forward(to_input(part.images, self._compute, part.scaled_hw))
                targets = part.targets.to(self._compute.device, non_blocking=True)
                if not self._compute.on_cpu:
                    targets = filled_up(targets)
                total, part_losses = self._loss(predictions, targets, self._group.share(part))
                # Several processes average their gradients, but the sum is needed: therefore times world_size.
                (total * (part.loss_scale * self._group.world_size)).backward()
                losses += part_losses * (len(part.indices) / len(batch.indices))
        except (RuntimeError, MemoryError) as error:
            if not self._back_off or not is_out_of_memory(error) or self.parts >= len(batch.indices):
                raise
        else:
            return losses
        # Outside the except block: inside it, the traceback would keep the tensors in memory.
        self.parts *= 2
        self._optimizer.zero_grad(set_to_none=True)
        if not self._compute.on_cpu:
            torch.cuda.empty_cache()
        logger.warning(
            f"out of memory: from here a batch goes through in {self.parts} parts; "
            "a smaller --batch or --imgsz is faster"
        )
        return None


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Yield the batch in at most `parts` parts of near equal size; targets count images from 0 in each part."""
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
        """Check the loss of one iteration; queue the check on the device without waiting for the result."""
        fresh = ~torch.isfinite(total.detach()) & (self._first < 0)
        self._first.masked_fill_(fresh, position)

    def first_bad(self) -> int | None:
        """Return the position of the first bad iteration; None if all were finite. Waits for the device."""
        position = int(self._first)
        return None if position < 0 else position

    def reset(self) -> None:
        """Forget the bad iteration."""
        self._first.fill_(-1)


@torch.no_grad()
def is_finite(model: nn.Module) -> bool:
    """Return whether every floating point number of the model is finite; waits for the device once."""
    states = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(states))).all())

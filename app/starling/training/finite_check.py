"""Notice a loss or weights that are no numbers, without reading the device in every iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

"""When a search may end, from how long its trainings took so far."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from datetime import datetime

from starling.search.outcome import Attempt, Progress, State


def seconds_left(attempts: Sequence[Attempt], progress: Progress, now: datetime) -> float | None:
    """Return the seconds until the budget is met, if the workers that train now go on.

    None before as much has been trained as one training of full length takes: what a training that was cut short took
    is mostly its start.

    A training costs what all ended attempts took together, divided by how many of full length they make: what fails
    or is lost is in the price. The trainings that are left are dealt out to whoever is free first.
    """
    if progress.over:
        return 0.0
    price = _price(attempts, progress.spent)
    running = [a for a in attempts if a.state is State.RUNNING and a.began is not None]
    if price is None or not running:
        return None
    free_at = [max(price - _seconds(a.began, now), 0.0) for a in running]
    end = max(free_at)
    heapq.heapify(free_at)
    for _ in range(int(progress.budget - progress.spent) - len(running)):
        done = free_at[0] + price
        heapq.heapreplace(free_at, done)
        end = max(end, done)
    return end


def _price(attempts: Sequence[Attempt], trainings: float) -> float | None:
    """Return the seconds that a training of full length costs; None before as much has been trained."""
    seconds = sum(_seconds(a.began, a.ended) for a in attempts if a.state is not State.RUNNING)
    return seconds / trainings if trainings >= 1 else None


def _seconds(began: datetime | None, ended: datetime | None) -> float:
    if began is None or ended is None:
        return 0.0
    return max((ended - began).total_seconds(), 0.0)

"""Wait for a lock that somebody else holds: told once, and not for ever."""

from __future__ import annotations

from collections.abc import Callable

from launcher.errors import EngineError
from starling.core.lock import wait_for

LOCK_WAIT_S = 120.0
POLL_S = 0.1

Say = Callable[[str], None]


def wait_for_lock(
    take: Callable[[], bool],
    *,
    wait: Callable[[], str],
    give_up: Callable[[], str],
    say: Say,
    limit_s: float = LOCK_WAIT_S,
    poll_s: float = POLL_S,
) -> None:
    """Return once `take` has the lock; says `wait` the first time that it has not.

    Raises EngineError with the words of `give_up` after `limit_s`.
    """
    if not wait_for(take, limit_s=limit_s, tell=lambda: say(wait()), poll_s=poll_s):
        raise EngineError(give_up())

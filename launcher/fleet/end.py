"""End replicas: stop, kill, or kill and remove."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from launcher.engines.base import Engine, ReplicaState
from launcher.engines.limits import STOP_GRACE_S
from launcher.parallel import Done, in_parallel
from launcher.status.words import words_for
from starling.core.errors import StarlingError

logger = logging.getLogger(__name__)

POLL_S, KILL_POLL_S = 0.25, 0.1
KILL_S = 10.0
"""The time to wait for killed processes; if one still exists then, the kernel waits for a disk or a driver."""


def stop(
    engine: Engine,
    states: Sequence[ReplicaState],
    *,
    grace_s: float = STOP_GRACE_S,
) -> list[ReplicaState]:
    """Send SIGTERM to all, wait, send SIGKILL to those that still run after the grace; return the final states."""
    live = [state for state in states if state.live]
    _raise_any(in_parallel(lambda state: engine.terminate(state.id), live))
    deadline = time.monotonic() + grace_s
    waiting = {state.id: state.name for state in live}
    while waiting and time.monotonic() < deadline:
        time.sleep(POLL_S)
        for replica_id in list(waiting):
            now = engine.state(replica_id)
            if now is None or not now.live:
                name = waiting.pop(replica_id)
                logger.info(f"{name}: {words_for(now) if now else 'gone'}")
    for name in waiting.values():
        logger.warning(f"{name}: still running after {grace_s:g} s; killing it (its last checkpoint stands)")
    kill(engine, [state for state in live if state.id in waiting])
    return _now(engine, states)


def kill(engine: Engine, states: Sequence[ReplicaState]) -> list[ReplicaState]:
    """Send SIGKILL to all live replicas, wait for their ends, and return the states of all."""
    _raise_any(in_parallel(lambda state: engine.kill(state.id), [state for state in states if state.live]))
    deadline = time.monotonic() + KILL_S
    while True:
        found = _now(engine, states)
        if not any(state.live for state in found) or time.monotonic() > deadline:
            return found
        time.sleep(KILL_POLL_S)


def _now(engine: Engine, states: Sequence[ReplicaState]) -> list[ReplicaState]:
    return [now for state in states if (now := engine.state(state.id)) is not None]


def _raise_any(ended: Iterable[Done[Any, None]]) -> None:
    for done in ended:
        if done.error is not None:
            raise done.error


def discard(engine: Engine, states: Iterable[ReplicaState]) -> list[str]:
    """Kill and remove replicas by id; return a line for each failure. A replica that no longer exists is no failure."""
    failures = []
    for done in in_parallel(lambda state: engine.remove(state.id), states):
        if isinstance(done.error, StarlingError):
            failures.append(f"{done.item.name}: {done.error}")
        elif done.error is not None:
            raise done.error
    return failures

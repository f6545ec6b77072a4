"""Select the replicas that a command names."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.engines.base import ReplicaState
from starling.core.errors import UsageError


def select(states: Sequence[ReplicaState], names: Sequence[str]) -> list[ReplicaState]:
    """Return the replicas that `names` select, each a replica, or a fleet as `project/name`; all without names.

    Raises UsageError for a name that selects none.
    """
    if not names:
        return list(states)
    chosen: dict[str, ReplicaState] = {}
    for name in names:
        found = [state for state in states if name in (state.name, state.fleet)]
        if not found:
            known = sorted({state.name for state in states} | {state.fleet for state in states})
            raise UsageError(f"{name}: no such replica or fleet; there are: {', '.join(known) or 'none'}")
        chosen.update((state.id, state) for state in found)
    return list(chosen.values())

"""Carry out a plan: start all replicas of a fleet, or none."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from launcher.engines.base import Engine, ReplicaSpec
from launcher.errors import EngineError, ReplicaFailed
from launcher.fleet.end import POLL_S, discard, stop
from launcher.parallel import Done, in_parallel
from launcher.plan.changes import Changes
from launcher.problems import raise_all
from launcher.status.words import device_words, words_for
from starling.core.errors import StarlingError

logger = logging.getLogger(__name__)

LAST_WORDS = 15
"""The number of lines of a failed replica's output in the message."""


def bring_up(
    engine: Engine,
    changes: Changes,
    *,
    settle_s: float = 0.0,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Change the fleet: stop and remove old replicas, then create, start and verify all new ones, or undo all of it.

    On any failure or Ctrl-C, all replicas created here are removed in any state, and the error is raised again.
    `started` is called after all have started, before they are watched for `settle_s` seconds.
    """
    if changes.stop:
        stop(engine, changes.stop)
        discard(engine, changes.stop)
    for state in changes.dead:
        logger.info(f"{state.name}: {words_for(state)}; starting it again")
        engine.remove(state.id)
    _start_all(engine, changes.start, settle_s, started)


def _start_all(
    engine: Engine, specs: Sequence[ReplicaSpec], settle_s: float, started: Callable[[], None]
) -> None:
    """Create all in parallel, then start all in parallel, then verify all."""
    if not specs:
        return
    before = {state.id for state in engine.list()}
    created: dict[str, str] = {}
    wrote = False

    def create(spec: ReplicaSpec) -> None:
        created[spec.name] = engine.create(spec)

    def start(spec: ReplicaSpec) -> None:
        engine.start(created[spec.name])

    try:
        _raise_failures(in_parallel(create, specs))
        _raise_failures(in_parallel(start, specs), named=True)
        wrote = True
        for spec in specs:
            logger.info(f"started {spec.name} on {device_words(spec.device.label)}")
        started()
        _verify(engine, [created[spec.name] for spec in specs], settle_s)
    except BaseException:
        _roll_back(engine, specs, list(created.values()), before, wrote=wrote)
        raise


def _raise_failures(ended: Sequence[Done[ReplicaSpec, None]], *, named: bool = False) -> None:
    """Raise the failures, one for all replicas with the same message; raise an unexpected error unchanged.

    `named` puts the replicas' names before the message, which does not contain them yet.
    """
    failed: dict[str, tuple[StarlingError, list[str]]] = {}
    for done in ended:
        if isinstance(done.error, StarlingError):
            name = f"{done.item.name} ({device_words(done.item.device.label)})"
            failed.setdefault(str(done.error), (done.error, []))[1].append(name)
        elif done.error is not None:
            raise done.error
    raise_all(
        [
            EngineError(f"{', '.join(names)}: {words}") if named else error
            for words, (error, names) in failed.items()
        ]
    )


def _verify(engine: Engine, ids: Sequence[str], settle_s: float) -> None:
    """Watch the replicas for `settle_s` seconds; raises ReplicaFailed with the last lines of a replica that fails."""
    deadline = time.monotonic() + settle_s
    while ids:
        for replica_id in ids:
            state = engine.state(replica_id)
            failed = state is not None and state.phase == "exited" and not state.finished
            last = "\n  ".join(engine.logs(replica_id, tail=LAST_WORDS)) if failed else ""
            if state is None or (
                failed and engine.state(replica_id) is None
            ):  # `remove` kills before it removes
                raise EngineError(
                    f"replica {replica_id[:12]} disappeared during its start; another command removed it"
                )
            if failed:
                raise ReplicaFailed(
                    f"{state.name} {words_for(state)}; it said:\n  {last}", state.exit_code or 0
                )
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_S)


def _roll_back(
    engine: Engine,
    specs: Sequence[ReplicaSpec],
    created: Iterable[str],
    before: set[str],
    *,
    wrote: bool,
) -> None:
    """Remove the replicas created here, also a replica whose creation was interrupted before it returned an id.

    `wrote` means that all had started and may have written results.
    """
    wanted = {spec.name: spec.public() for spec in specs}
    ids = dict.fromkeys(created)
    with contextlib.suppress(StarlingError):
        for state in engine.list():
            if state.id not in before and wanted.get(state.name) == state.plan:
                ids[state.id] = None
    left = 0
    for done in in_parallel(engine.remove, ids):
        if done.error is not None:
            left += 1
            logger.warning(f"could not remove {done.item[:12]}: {done.error}; `launcher kill-all` will")
    if ids and not left:
        rest = "what they wrote stays in the runs folder" if wrote else "nothing is left behind"
        logger.info(f"rolled back: {len(ids)} replica{'s' * (len(ids) != 1)} removed, {rest}")

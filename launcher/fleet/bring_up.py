"""Act on a plan: bring a fleet up whole or not at all, end it gently, or end everything of ours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.engines.base import Engine, ReplicaSpec, ReplicaState
from launcher.engines.limits import STOP_GRACE_S
from launcher.errors import EngineError, ReplicaFailed
from launcher.parallel import Done, in_parallel
from launcher.status.words import device_words, words_for
from starling.core.errors import StarlingError, UsageError

POLL_S = 0.25
LAST_WORDS = 15
"""Lines of a failed replica's output that are shown."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `bring_up` did: the replicas it started, those that ran already, and those that had finished."""

    started: tuple[str, ...]
    running: tuple[str, ...]
    finished: tuple[str, ...]


def bring_up(
    engine: Engine,
    specs: Sequence[ReplicaSpec],
    *,
    recreate: bool = False,
    settle_s: float = 0.0,
    say: Say = lambda line: None,
    started: Callable[[], None] = lambda: None,
) -> Outcome:
    """Make the fleet of `specs` run: create all, start all, verify all, or undo all of it.

    Replicas that run, or have finished, stay as they are; dead ones are made anew and resume. A fleet that differs
    from `specs` raises UsageError with the difference unless `recreate`. On any failure, or Ctrl-C, everything
    created here is removed, in whatever state, and the error passes on. `started` is called when all have started,
    before the watch over them.
    """
    fleet = specs[0].fleet
    existing = [state for state in engine.list() if state.fleet == fleet]
    check_existing(engine, specs, existing, recreate=recreate)
    if recreate and existing:
        stop(engine, existing, say=say)
        discard(engine, existing)
        existing = []
    kept = {state.name: state for state in existing if state.live or state.finished}
    dead = [state for state in existing if state.name not in kept]
    for state in dead:
        say(f"{state.name}: {words_for(state)}; starting it again")
        engine.remove(state.id)
    missing = [spec for spec in specs if spec.name not in kept]
    _start_all(engine, missing, settle_s, say, started)
    return Outcome(
        started=tuple(spec.name for spec in missing),
        running=tuple(state.name for state in kept.values() if state.live),
        finished=tuple(state.name for state in kept.values() if state.finished),
    )


def check_existing(
    engine: Engine, specs: Sequence[ReplicaSpec], existing: Sequence[ReplicaState], *, recreate: bool
) -> None:
    """Raise NameTaken for a name that a stranger's has, and UsageError for a fleet that exists and is not to be changed."""
    from launcher.plan.changes import differences

    engine.check_names([spec.name for spec in specs])
    changed = differences(engine, specs, existing)
    if changed and not recreate:
        raise UsageError(
            f"fleet {specs[0].fleet} exists and differs:\n  " + "\n  ".join(changed) + "\n"
            "give --recreate to stop it (checkpoints are saved) and start it like this"
        )


def _start_all(
    engine: Engine, specs: Sequence[ReplicaSpec], settle_s: float, say: Say, started: Callable[[], None]
) -> None:
    """Create all at once, then start all at once, then verify all."""
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
            say(f"started {spec.name} on {device_words(spec.device.label)}")
        started()
        _verify(engine, [created[spec.name] for spec in specs], settle_s)
    except BaseException:
        _roll_back(engine, specs, list(created.values()), before, say, wrote=wrote)
        raise


def _raise_failures(outcomes: Sequence[Done[ReplicaSpec, None]], *, named: bool = False) -> None:
    """Raise what went wrong, once for all replicas that failed in the same words; anything unexpected as it is.

    `named` puts the replicas' names before the words, which do not have them yet.
    """
    from launcher.problems import Problems

    failed: dict[str, tuple[StarlingError, list[str]]] = {}
    for outcome in outcomes:
        if isinstance(outcome.error, StarlingError):
            name = f"{outcome.item.name} ({device_words(outcome.item.device.label)})"
            failed.setdefault(str(outcome.error), (outcome.error, []))[1].append(name)
        elif outcome.error is not None:
            raise outcome.error
    problems = Problems()
    for words, (error, names) in failed.items():
        problems.found.append(EngineError(f"{', '.join(names)}: {words}") if named else error)
    problems.raise_any()


def _verify(engine: Engine, ids: Sequence[str], settle_s: float) -> None:
    """Watch the replicas for a moment; raise ReplicaFailed with its last words when one ends in error."""
    deadline = time.monotonic() + settle_s
    while ids:
        for replica_id in ids:
            state = engine.state(replica_id)
            failed = state is not None and state.phase == "exited" and not state.finished
            last = "\n  ".join(engine.logs(replica_id, tail=LAST_WORDS)) if failed else ""
            if state is None or (failed and engine.state(replica_id) is None):  # killed first, then removed
                raise EngineError(
                    f"replica {replica_id[:12]} vanished while it was starting; somebody removed it"
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
    say: Say,
    *,
    wrote: bool,
) -> None:
    """Remove what was created here, also a replica whose creation was interrupted before it told its id.

    `wrote` says that all had started, and may have written results.
    """
    wanted = {spec.name: spec.public() for spec in specs}
    ids = dict.fromkeys(created)
    with contextlib.suppress(StarlingError):
        for state in engine.list():
            if state.id not in before and wanted.get(state.name) == state.plan:
                ids[state.id] = None
    left = 0
    for outcome in in_parallel(engine.remove, ids):
        if outcome.error is not None:
            left += 1
            say(f"could not remove {outcome.item[:12]}: {outcome.error}; `launcher kill-all` will")
    if ids and not left:
        rest = "what they wrote stays in the runs folder" if wrote else "nothing is left behind"
        say(f"rolled back: {len(ids)} replica{'s' * (len(ids) != 1)} removed, {rest}")


def stop(
    engine: Engine,
    states: Sequence[ReplicaState],
    *,
    grace_s: float = STOP_GRACE_S,
    say: Say = lambda line: None,
) -> list[ReplicaState]:
    """Send SIGTERM to all, wait for all, SIGKILL those that outlast the grace; return how they ended."""
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
                say(f"{name}: {words_for(now) if now else 'gone'}")
    for name in waiting.values():
        say(f"{name}: still running after {grace_s:g} s; killing it (its last checkpoint stands)")
    _raise_any(in_parallel(engine.kill, waiting))
    for replica_id in waiting:
        _await_end(engine, replica_id)
    return [now for state in states if (now := engine.state(state.id)) is not None]


def _raise_any(outcomes: Iterable[Done[Any, None]]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error


def _await_end(engine: Engine, replica_id: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        now = engine.state(replica_id)
        if now is None or not now.live:
            return
        time.sleep(POLL_S)


def discard(engine: Engine, states: Iterable[ReplicaState]) -> list[str]:
    """Kill and remove replicas by id; return a line for each that resisted. One that has vanished is fine."""
    failures = []
    for outcome in in_parallel(lambda state: engine.remove(state.id), states):
        if isinstance(outcome.error, StarlingError):
            failures.append(f"{outcome.item.name}: {outcome.error}")
        elif outcome.error is not None:
            raise outcome.error
    return failures

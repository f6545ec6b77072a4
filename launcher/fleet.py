"""Act on a plan: bring a fleet up whole or not at all, end it gently, or end everything of ours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.engines.base import Engine, ReplicaSpec, ReplicaState
from launcher.errors import EngineError, LauncherError, ReplicaFailed, UsageError
from launcher.report import device_words, words_for

GRACE_S = 60.0
"""A trainer told to stop ends its step and saves a checkpoint; a large model on a slow disk takes a while."""

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
    settle_s: float = 2.0,
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
    changed = differences(engine, specs, existing)
    if changed and not recreate:
        raise UsageError(
            f"fleet {fleet} exists and differs:\n  " + "\n  ".join(changed) + "\n"
            "give --recreate to stop it (checkpoints are saved) and start it like this"
        )
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


def _start_all(
    engine: Engine, specs: Sequence[ReplicaSpec], settle_s: float, say: Say, started: Callable[[], None]
) -> None:
    before = {state.id for state in engine.list()}
    created: list[str] = []
    try:
        for spec in specs:
            created.append(engine.create(spec))
        for spec, replica_id in zip(specs, created, strict=True):
            _start(engine, spec, replica_id)
            say(f"started {spec.name} on {device_words(spec.device.label)}")
        started()
        _verify(engine, created, settle_s)
    except BaseException:
        _roll_back(engine, specs, created, before, say)
        raise


def _start(engine: Engine, spec: ReplicaSpec, replica_id: str) -> None:
    try:
        engine.start(replica_id)
    except EngineError as error:
        raise EngineError(f"{spec.name} ({device_words(spec.device.label)}): {error}") from error


def _verify(engine: Engine, ids: Sequence[str], settle_s: float) -> None:
    """Watch the replicas for a moment; raise ReplicaFailed with its last words when one ends in error."""
    deadline = time.monotonic() + settle_s
    while ids:
        for replica_id in ids:
            state = engine.state(replica_id)
            if state is None:
                raise EngineError(
                    f"replica {replica_id[:12]} vanished while it was starting; somebody removed it"
                )
            if state.phase == "exited" and not state.finished:
                last = "\n  ".join(engine.logs(replica_id, tail=LAST_WORDS))
                raise ReplicaFailed(
                    f"{state.name} {words_for(state)}; it said:\n  {last}", state.exit_code or 0
                )
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_S)


def _roll_back(
    engine: Engine, specs: Sequence[ReplicaSpec], created: Iterable[str], before: set[str], say: Say
) -> None:
    """Remove what was created here, also a replica whose creation was interrupted before it told its id."""
    wanted = {spec.name: spec.public() for spec in specs}
    ids = dict.fromkeys(created)
    with contextlib.suppress(LauncherError):
        for state in engine.list():
            if state.id not in before and wanted.get(state.name) == state.plan:
                ids[state.id] = None
    for replica_id in ids:
        try:
            engine.remove(replica_id)
        except LauncherError as error:
            say(f"could not remove {replica_id[:12]}: {error}; `launcher kill-all` will")
    if ids:
        say(f"rolled back: {len(ids)} replica{'s' * (len(ids) != 1)} removed, nothing is left behind")


def differences(engine: Engine, specs: Sequence[ReplicaSpec], existing: Sequence[ReplicaState]) -> list[str]:
    """Return what a changed `up` would change, a line each; empty for the same fleet, or for none.

    Variables passed by the user are compared with what the replica was started with, and named, never shown.
    """
    if not existing:
        return []
    old = {state.name: state for state in existing}
    new = {spec.name: spec for spec in specs}
    lines = [f"{name}: no longer wanted" for name in old if name not in new]
    lines += [f"{name}: new" for name in new if name not in old]
    shared: dict[str, list[str]] = {}
    for name in sorted(old.keys() & new.keys()):
        for line in _changed_fields(dict(old[name].plan), new[name].public()):
            shared.setdefault(line, []).append(name)
        had = engine.environment(old[name].id) if old[name].live else None
        for variable, value in new[name].passed.items():
            if had is not None and variable in had and had[variable] != value:
                shared.setdefault(f"{variable}: has another value (not shown)", []).append(name)
    return lines + [f"{_who(names, new)}: {line}" for line, names in shared.items()]


def _who(names: Sequence[str], new: dict[str, ReplicaSpec]) -> str:
    return "every replica" if len(names) == len(new) > 1 else ", ".join(names)


def _changed_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for key in new:
        if old.get(key) == new[key]:
            continue
        if key == "command":
            lines.append(_changed_words(old.get(key) or [], new[key]))
        elif key == "environment":
            lines += [
                f"{name}: {old[key].get(name, '(unset)')} -> {new[key].get(name, '(unset)')}"
                for name in sorted({**old.get(key, {}), **new[key]})
                if old[key].get(name) != new[key].get(name)
            ]
        else:
            lines.append(f"{key}: {old.get(key)} -> {new[key]}")
    return lines


def _changed_words(old: Sequence[str], new: Sequence[str]) -> str:
    """Return the part of a command line that differs: `command: --epochs 10 -> --epochs 20`."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    # The option before a changed value says what the value is.
    if head and head < len(new) - tail and not new[head].startswith("--") and new[head - 1].startswith("--"):
        head -= 1
    cut = [" ".join(words[head : len(words) - tail]) or "(nothing)" for words in (old, new)]
    return f"command: {cut[0]} -> {cut[1]}"


def stop(
    engine: Engine, states: Sequence[ReplicaState], *, grace_s: float = GRACE_S, say: Say = lambda line: None
) -> list[ReplicaState]:
    """Send SIGTERM to all, wait for all, SIGKILL those that outlast the grace; return how they ended."""
    live = [state for state in states if state.live]
    for state in live:
        engine.terminate(state.id)
    deadline = time.monotonic() + grace_s
    waiting = {state.id: state.name for state in live}
    while waiting and time.monotonic() < deadline:
        time.sleep(POLL_S)
        for replica_id in list(waiting):
            now = engine.state(replica_id)
            if now is None or not now.live:
                name = waiting.pop(replica_id)
                say(f"{name}: {words_for(now) if now else 'gone'}")
    for replica_id, name in waiting.items():
        say(f"{name}: still running after {grace_s:g} s; killing it (its last checkpoint stands)")
        engine.kill(replica_id)
    for replica_id in waiting:
        _await_end(engine, replica_id)
    return [now for state in states if (now := engine.state(state.id)) is not None]


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
    for state in states:
        try:
            engine.remove(state.id)
        except LauncherError as error:
            failures.append(f"{state.name}: {error}")
    return failures


def select(states: Sequence[ReplicaState], names: Sequence[str]) -> list[ReplicaState]:
    """Return the replicas that `names` mean, each a replica, or a fleet as `project/name`; all for no names.

    Raises UsageError for a name that means none.
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

"""The changes of `up` to an existing fleet: replicas to keep, stop and start, and differences to the old command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.engines.base import ReplicaSpec, ReplicaState
from starling.core.units import format_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """The actions of `up` on a fleet, in this order."""

    stop: tuple[ReplicaState, ...] = ()
    """Replicas of a fleet to recreate: stopped, then removed."""
    dead: tuple[ReplicaState, ...] = ()
    """Replicas that have failed or were stopped: removed, then started again."""
    keep: tuple[ReplicaState, ...] = ()
    """Replicas that run or have finished: unchanged."""
    start: tuple[ReplicaSpec, ...] = ()

    @property
    def running(self) -> tuple[str, ...]:
        """The names of the replicas that already run."""
        return tuple(state.name for state in self.keep if state.live)

    @property
    def finished(self) -> tuple[str, ...]:
        """The names of the replicas that have already finished."""
        return tuple(state.name for state in self.keep if state.finished)


NO_CHANGES = Changes()


def plan_changes(
    specs: Sequence[ReplicaSpec], existing: Sequence[ReplicaState], *, recreate: bool
) -> Changes:
    """Return the changes that turn the existing replicas into the fleet of `specs`."""
    if recreate:
        return Changes(stop=tuple(existing), start=tuple(specs))
    keep = tuple(state for state in existing if state.live or state.finished)
    kept = {state.name for state in keep}
    return Changes(
        dead=tuple(state for state in existing if state.name not in kept),
        keep=keep,
        start=tuple(spec for spec in specs if spec.name not in kept),
    )


def differences(
    specs: Sequence[ReplicaSpec],
    existing: Sequence[ReplicaState],
    environments: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Return the differences to the existing fleet, one line each; empty if there are none, or no fleet.

    `environments` are the variables that live replicas were started with, by id; the lines show names, never values.
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
        had = environments.get(old[name].id, {})
        for variable, value in new[name].passed.items():
            if variable in had and had[variable] != value:
                shared.setdefault(f"{variable}: has another value (not shown)", []).append(name)
    return lines + [f"{_who(names, new)}: {line}" for line, names in shared.items()]


def _who(names: Sequence[str], new: Mapping[str, ReplicaSpec]) -> str:
    return "every replica" if len(names) == len(new) > 1 else ", ".join(names)


def _changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        line
        for key in new
        if old.get(key) != new[key]
        for line in _WORDS.get(key, _changed_value)(key, old.get(key), new[key])
    ]


def _changed_value(key: str, old: Any, new: Any) -> list[str]:
    return [f"{key}: {_plain(old)} -> {_plain(new)}"]


def _changed_size(key: str, old: Any, new: Any) -> list[str]:
    """Return sizes as they are written on the command line: `memory: 20 GB -> 10 GB`."""
    words = [format_size(size) if isinstance(size, int) else _plain(size) for size in (old, new)]
    # Two sizes that round to the same text are shown in bytes.
    words = words if words[0] != words[1] else [f"{size} bytes" for size in (old, new)]
    return [f"{key.removesuffix('_bytes')}: {words[0]} -> {words[1]}"]


def _changed_image(key: str, old: Any, new: Any) -> list[str]:
    """Return the line for a name that now means another image: rebuilt, or tagged anew."""
    return [f"image: built again or tagged anew, {_short(old)} -> {_short(new)}"]


def _changed_environment(key: str, old: Any, new: Any) -> list[str]:
    return [
        f"{name}: {_plain(old.get(name))} -> {_plain(new.get(name))}"
        for name in sorted({**(old or {}), **new})
        if old.get(name) != new.get(name)
    ]


def _changed_names(key: str, old: Any, new: Any) -> list[str]:
    """Return a line for each variable that is newly passed or no longer passed."""
    lines = [f"{name}: passed now" for name in new if name not in (old or [])]
    return lines + [f"{name}: no longer passed" for name in old or [] if name not in new]


def _changed_mounts(key: str, old: Any, new: Any) -> list[str]:
    had, has = ([_mount_words(mount) for mount in mounts or []] for mounts in (old, new))
    lines = [f"mount {words}: added" for words in has if words not in had]
    return lines + [f"mount {words}: dropped" for words in had if words not in has]


def _mount_words(mount: Mapping[str, Any]) -> str:
    source, target = mount.get("source"), mount.get("target")
    where = str(source) if source == target else f"{source} at {target}"
    return where + (" (read-only)" if mount.get("read_only") else " (writable)")


def _changed_words(key: str, old: Any, new: Any) -> list[str]:
    """Return the part of a command line that differs: `command: --epochs 10 -> --epochs 20`."""
    old = old or []
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    # Include the option before a changed value, because it names the value.
    if head and head < len(new) - tail and not new[head].startswith("--") and new[head - 1].startswith("--"):
        head -= 1
    cut = [" ".join(words[head : len(words) - tail]) or "(nothing)" for words in (old, new)]
    return [f"{key}: {cut[0]} -> {cut[1]}"]


def _plain(value: Any) -> str:
    return "(unset)" if value in (None, "") else str(value)


def _short(image_id: Any) -> str:
    return str(image_id or "(unset)").removeprefix("sha256:")[:12]


_WORDS: Mapping[str, Callable[[str, Any, Any], list[str]]] = {
    "command": _changed_words,
    "environment": _changed_environment,
    "passed_environment": _changed_names,
    "mounts": _changed_mounts,
    "image_id": _changed_image,
    "memory_bytes": _changed_size,
    "shm_bytes": _changed_size,
    "tmp_bytes": _changed_size,
}
"""The formatter of each field; `_changed_value` formats the others."""

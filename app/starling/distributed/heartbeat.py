"""Know within seconds which of the processes that train together is gone.

A collective that fails, or never returns, does not say whose fault it is. So every rank beats: a thread writes a
counter into the group's store once a second and reads everybody else's. The counter of a rank that was killed, frozen
or cut off stands still; a rank that ends by itself leaves its reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starling.core.plain_json import NotJson, parse_json
from starling.core.words import printable

BEAT_S = 1.0
STORE_S = 10
"""Longest wait for an answer of the store."""
SUSPECT_S = 5.0
"""Silence that is enough once a collective has failed."""
LOST_S = 20.0
"""Silence that is enough by itself."""
GRACE_S = 10.0
"""Seconds the training itself has to find out, before the process is ended from outside of it."""
LINGER_S = 15.0
"""Longest wait of the process that hosts the store for the others to read how it ended: more than GRACE_S."""
_MOST_BYTES = 64 * 1024
"""Of a rank's sign of life; an error's message is the longest part of it."""
VERDICT_S = 12.0
"""Longest wait for a name after a collective has failed."""


class Store(Protocol):
    """What is needed of torch's store."""

    def set(self, key: str, value: str) -> None:
        """Set one key."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values of keys that exist."""


@dataclass(frozen=True, slots=True)
class LostRank:
    """A rank that is gone, and why."""

    rank: int
    message: str
    exit_code: int


class Heartbeat:
    """Beat for one rank and watch the others. `give_up` ends the process where the training itself cannot."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        who: str,
        give_up: Callable[[LostRank], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self.rank, self.world_size, self._who = store, rank, world_size, who
        self._give_up, self._clock = give_up, clock
        self._count = 0
        self._silent_since = [clock()] * world_size
        self._lives: list[dict[str, object]] = [{} for _ in range(world_size)]
        self._store_lost_at: float | None = None
        self._armed = True
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def first(self) -> None:
        """Write the first beat. Everyone's must be there before anyone starts."""
        self._write({"beat": 0, "who": self._who})

    def start(self) -> None:
        """Beat and watch in a thread from here on."""
        self._silent_since = [self._clock()] * self.world_size
        self._thread.start()

    def disarm(self) -> None:
        """Go on beating, but end nothing any more: the training is over, what is left is this rank's own."""
        self._armed = False

    def end(self, exit_code: int, message: str = "") -> None:
        """Leave word of how this rank ends, and stop beating."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # nobody may be left to read it
            self._write({"who": self._who, "ended": exit_code, "message": message})
        if self._thread.is_alive():
            # A thread inside torch's store when the interpreter ends would abort the process.
            self._thread.join(STORE_S + BEAT_S)

    def linger(self) -> None:
        """Return when every other rank has left word or is silent, or after LINGER_S; to be called after `end`."""
        deadline = self._clock() + LINGER_S
        while self._clock() < deadline and any(map(self._may_read, range(self.world_size))):
            time.sleep(0.2)
            self._beat()

    def _may_read(self, rank: int) -> bool:
        """Return whether another rank may still want to read how this one ended."""
        silent_s = self._clock() - self._silent_since[rank]
        return rank != self.rank and "ended" not in self._lives[rank] and silent_s <= SUSPECT_S

    def find_lost(self, silence: float) -> LostRank | None:
        """Return a rank that ended in a failure, else the one silent for longest if for more than `silence` seconds."""
        now = self._clock()
        for rank, life in enumerate(self._lives):
            code = life.get("ended")
            if rank != self.rank and isinstance(code, int) and code:
                return LostRank(rank, f"{self._name(rank)} ended: {life.get('message')}", code)
        if self._store_lost_at is not None and now - self._store_lost_at > silence:
            return LostRank(
                0, f"{self._name(0)} is gone: its rendezvous no longer answers; resume on what is left", 1
            )
        waiting = [
            rank for rank in range(self.world_size) if rank != self.rank and "ended" not in self._lives[rank]
        ]
        quiet = max(waiting, key=lambda rank: now - self._silent_since[rank], default=None)
        if quiet is None or now - self._silent_since[quiet] <= silence:
            return None
        seconds = now - self._silent_since[quiet]
        return LostRank(
            quiet,
            f"{self._name(quiet)} is gone: not a sign of life for {seconds:.0f} s; it was killed, is frozen or cut off. "
            "The last checkpoint is whole: look at that process's log (out of memory?), then --resume",
            1,
        )

    def verdict(self) -> LostRank | None:
        """Return who is gone, after a collective has failed; None where everyone is well."""
        deadline = self._clock() + VERDICT_S
        while self._clock() < deadline:
            lost = self.find_lost(SUSPECT_S)
            if lost is not None:
                return lost
            time.sleep(0.2)
        return None

    def speaks(self, lost: LostRank) -> bool:
        """Return whether this rank tells about it: rank 0, or the next one if rank 0 is the lost one."""
        return self.rank == (1 if lost.rank == 0 else 0)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._lives[rank].get('who', 'never seen')})"

    def _write(self, life: dict[str, object]) -> None:
        with self._writing:
            self._store.set(f"life/{self.rank}", json.dumps(life))

    def _run(self) -> None:
        lost_at: float | None = None
        while not self._over.wait(BEAT_S):
            self._beat()
            lost = self.find_lost(LOST_S)
            if lost is None or not self._armed:
                lost_at = None
                continue
            lost_at = self._clock() if lost_at is None else lost_at
            if self._clock() - lost_at >= GRACE_S and not self._over.is_set():
                with contextlib.suppress(RuntimeError):
                    self._write({"who": self._who, "ended": lost.exit_code, "message": lost.message})
                self._give_up(lost)

    def _beat(self) -> None:
        """Write this rank's counter, read everyone's, and note whose has moved."""
        self._count += 1
        try:
            if not self._over.is_set():
                self._write({"beat": self._count, "who": self._who})
            values = self._store.multi_get([f"life/{rank}" for rank in range(self.world_size)])
        except RuntimeError:
            if self._store_lost_at is None:
                self._store_lost_at = self._clock()
            return
        self._store_lost_at = None
        for rank, value in enumerate(values):
            life = _life(value)
            if life != self._lives[rank]:
                self._lives[rank], self._silent_since[rank] = life, self._clock()


def _life(value: bytes) -> dict[str, object]:
    """Return what a rank wrote; an empty one where something else than a rank of ours wrote into the store."""
    try:
        told = parse_json(value) if len(value) <= _MOST_BYTES else None
    except NotJson:
        return {}
    if not isinstance(told, dict):
        return {}
    beat, ended = told.get("beat"), told.get("ended")
    life: dict[str, object] = {"who": printable(told.get("who", "never seen"))}
    if type(ended) is int and 0 <= ended < 256:
        message = "\n".join(map(printable, str(told.get("message", "")).splitlines()))
        return life | {"ended": ended, "message": message}
    return life | {"beat": beat if type(beat) is int else None}


def end_process(lost: LostRank) -> None:
    """End this process at once: its training hangs in a collective that no exception reaches."""
    os._exit(lost.exit_code)

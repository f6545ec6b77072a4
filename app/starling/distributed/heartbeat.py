"""Detect within seconds that one of the processes that train together is lost.

A collective that fails, or never returns, does not show which process is the cause. So every rank has a heartbeat: a
thread writes a counter into the group's store once a second, and reads the counters of all ranks. The counter of a rank
that was killed, frozen or disconnected stands still; a rank that ends by itself records the reason.
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
"""Maximum seconds of waiting for an answer of the store."""
SUSPECT_S = 5.0
"""Seconds of silence after which a rank counts as lost, once a collective has failed."""
LOST_S = 20.0
"""Seconds of silence after which a rank counts as lost in any case."""
GRACE_S = 10.0
"""Seconds for the training to notice a lost rank, before the heartbeat thread ends the process."""
LINGER_S = 15.0
"""Maximum seconds that the host of the store waits for other ranks to read how it ended: more than GRACE_S."""
_MOST_BYTES = 64 * 1024
"""Maximum size of a rank's entry in the store; the longest part is the message of an error."""
VERDICT_S = 12.0
"""Maximum seconds of searching for the lost rank after a collective has failed."""


class Store(Protocol):
    """The methods of torch's store that the heartbeat needs."""

    def set(self, key: str, value: str) -> None:
        """Set one key."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values of keys that exist."""


@dataclass(frozen=True, slots=True)
class LostRank:
    """A lost rank, and the reason."""

    rank: int
    message: str
    exit_code: int


class Heartbeat:
    """Write the beats of one rank and watch the others. `give_up` ends the process if the training cannot."""

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
        """Write the first beat. The first beats of all ranks must exist before any rank calls `start`."""
        self._write({"beat": 0, "who": self._who})

    def start(self) -> None:
        """Write beats and watch the others in a thread from now on."""
        self._silent_since = [self._clock()] * self.world_size
        self._thread.start()

    def disarm(self) -> None:
        """Continue the beats, but never end the process: the training is over, and the rest concerns this rank only."""
        self._armed = False

    def end(self, exit_code: int, message: str = "") -> None:
        """Record how this rank ends, and stop the beats."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._write({"who": self._who, "ended": exit_code, "message": message})
        if self._thread.is_alive():
            # A thread inside torch's store at the end of the interpreter would abort the process.
            self._thread.join(STORE_S + BEAT_S)

    def linger(self) -> None:
        """Return when every other rank has ended or is silent, or after LINGER_S; call it after `end`."""
        deadline = self._clock() + LINGER_S
        while self._clock() < deadline and any(map(self._may_read, range(self.world_size))):
            time.sleep(0.2)
            self._beat()

    def _may_read(self, rank: int) -> bool:
        """Return whether another rank may still need to read how this rank ended."""
        silent_s = self._clock() - self._silent_since[rank]
        return rank != self.rank and "ended" not in self._lives[rank] and silent_s <= SUSPECT_S

    def find_lost(self, silence: float) -> LostRank | None:
        """Return a rank that ended in a failure, else the rank silent for longest, if for over `silence` seconds."""
        now = self._clock()
        for rank, life in enumerate(self._lives):
            code = life.get("ended")
            if rank != self.rank and isinstance(code, int) and code:
                return LostRank(rank, f"{self._name(rank)} ended: {life.get('message')}", code)
        if self._store_lost_at is not None and now - self._store_lost_at > silence:
            return LostRank(
                0,
                f"{self._name(0)} is gone: its rendezvous no longer answers; resume on the remaining machines",
                1,
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
        """Return the lost rank after a collective has failed; None if no rank is lost."""
        deadline = self._clock() + VERDICT_S
        while self._clock() < deadline:
            lost = self.find_lost(SUSPECT_S)
            if lost is not None:
                return lost
            time.sleep(0.2)
        return None

    def speaks(self, lost: LostRank) -> bool:
        """Return whether this rank reports the loss: rank 0, or rank 1 if rank 0 is lost."""
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
        """Write this rank's counter, read all counters, and note which ones have changed."""
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
    """Return the entry of a rank; an empty one if another program wrote into the store."""
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
    """End this process at once, because its training hangs in a collective that no exception reaches."""
    os._exit(lost.exit_code)

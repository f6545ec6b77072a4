"""Leases in PostgreSQL: the same promises as the files of `leases.py`, between hosts that share nothing else.

A worker keeps a row for as long as it trains a candidate, in a session of its own. Others read it in two ways:

- The session holds an advisory lock, which the server drops with the session. A lock that stays free for some seconds
  while the row does not change means that the worker died: one whose connection alone broke, or whose server was
  restarted, is back by then.
- The worker counts the row's beat up again and again. A beat that has not changed for `lease_s` by the
  *observer's* monotonic clock means frozen or out of reach.

Whoever takes a candidate over deletes the row, by which the old holder, should it wake up, learns that it lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy

from starling.search.outcome import LeaseLost
from starling.search.storage.leases import Stillness

RETURN_S = 10.0
"""Seconds within which a living worker has another session after it lost one."""
BEAT_S = 2.0
"""Longest time between two beats, so that several fall into RETURN_S."""

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS starling_leases (
    study text NOT NULL,
    number integer NOT NULL,
    token text NOT NULL,
    lock_key bigint NOT NULL,
    worker text NOT NULL,
    beat bigint NOT NULL,
    abandoned boolean NOT NULL,
    PRIMARY KEY (study, number)
)"""

_TAKE = """
INSERT INTO starling_leases (study, number, token, lock_key, worker, beat, abandoned)
VALUES (:study, :number, :token, :key, :worker, 0, false)
ON CONFLICT (study, number) DO UPDATE
SET token = excluded.token, lock_key = excluded.lock_key, worker = excluded.worker, beat = 0, abandoned = false"""

_MINE = "WHERE study = :study AND number = :number AND token = :token"

_LOOK = """
SELECT token, beat, abandoned, EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
    AND classid = ((lock_key >> 32) & 4294967295)::oid AND objid = (lock_key & 4294967295)::oid
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
) FROM starling_leases WHERE study = :study AND number = :number"""


class DatabaseLease:
    """A worker's own lease; to be taken while the study is locked. Raises what `connect` raises."""

    def __init__(
        self,
        connect: Callable[[], Any],
        study: str,
        number: int,
        worker: str,
        new_token: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._connect = connect
        self._number = number
        token = new_token()
        self._row = {"study": study, "number": number, "token": token}
        # 63 bits of the token: no two leases share a lock, not even two of one candidate.
        self._key = int(token, 16) % 2**63
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._lost = self._closed = False
        self._session: Any = connect()
        self._locked = False
        try:
            self._lock()
            # Over one that a worker left which died between taking the lease and recording the candidate.
            self._session.run(_TAKE, **self._row, key=self._key, worker=worker)
            # A beat that a crash of the server forgets is soon followed by the next.
            self._session.run("SET synchronous_commit = off")
        except BaseException:
            self._disconnect()
            raise

    def keep_alive(self, every_s: float) -> None:
        """Renew the lease from a thread, so that a long epoch is not taken for death."""
        self._beats = threading.Thread(
            target=self._beat_until_stopped, args=(min(every_s, BEAT_S),), daemon=True
        )
        self._beats.start()

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over.

        While the server is out of reach nobody can say so, and the training goes on.
        """
        # The thread, if it is at work, does the same; and only it waits for a server that is away.
        if (self._session is not None or self._beats is None) and self._mutex.acquire(blocking=False):
            try:
                self._beat()
            finally:
                self._mutex.release()
        if self._lost or self._closed:
            raise LeaseLost(self._number)

    def close(self) -> None:
        """Give the lease back: its candidate has ended."""
        self._end(f"DELETE FROM starling_leases {_MINE}")

    def abandon(self) -> None:
        """Let go but leave the row, as death would: others take the candidate over at once."""
        self._end(f"UPDATE starling_leases SET abandoned = true {_MINE}")

    def _end(self, statement: str) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        with self._mutex:
            if self._session is not None:
                # Without it the row stays: of an ended candidate nobody reads it, any other is taken over.
                with contextlib.suppress(Exception):
                    self._session.run(statement, **self._row)
                self._disconnect()
            self._closed = True

    def _beat_until_stopped(self, every_s: float) -> None:
        while not self._stop.wait(every_s) and not self._lost:
            with self._mutex:
                self._beat()

    def _beat(self) -> None:
        """Count one beat, in a new session if need be. What fails is tried again at the next beat."""
        if self._closed or self._lost:
            return
        try:
            if self._session is None:
                self._session = self._connect()
            if not self._locked:
                self._lock()
            rows = self._session.run(
                f"UPDATE starling_leases SET beat = beat + 1 {_MINE} RETURNING beat", **self._row
            )
            self._lost = not rows
        except Exception:
            self._disconnect()

    def _lock(self) -> None:
        """Hold the advisory lock; an old session that the server still believes in may be in the way for a while."""
        self._locked = bool(self._session.run(f"SELECT pg_try_advisory_lock({self._key})")[0][0])

    def _disconnect(self) -> None:
        session, self._session, self._locked = self._session, None, False
        with contextlib.suppress(Exception):
            session.close()


class DatabaseLeaseWatch:
    """An observer's memory of other workers' leases."""

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        study: str,
        lease_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._study = study
        self._lease_s = lease_s
        self._stillness = Stillness(monotonic)

    def verdict(self, number: int) -> str | None:
        """Return why the candidate's worker is gone, or None while it may be alive. The study is locked."""
        with self._engine.begin() as connection:
            row = connection.execute(
                sqlalchemy.text(_LOOK), {"study": self._study, "number": number}
            ).one_or_none()
        # No row: whoever reclaimed it died half way, or the table was emptied.
        mark = None if row is None else (str(row[0]), int(row[1]))
        if row is not None and row[2]:
            return "its worker died"
        quiet_s = self._stillness.seconds(number, mark)
        if row is not None and not row[3] and quiet_s >= min(RETURN_S, self._lease_s):
            return "its worker died"
        if quiet_s >= self._lease_s:
            return f"its worker gave no sign of life for {self._lease_s:g} s"
        return None

    def revoke(self, number: int) -> None:
        """Remove a lease, so that its holder stops."""
        with self._engine.begin() as connection:
            connection.execute(
                sqlalchemy.text("DELETE FROM starling_leases WHERE study = :study AND number = :number"),
                {"study": self._study, "number": number},
            )
        self._stillness.forget(number)

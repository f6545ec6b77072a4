"""Leases in PostgreSQL: the guarantees of the lease files in `leases.py`, between hosts that share no folder.

A worker keeps a row while it trains a candidate, in a separate session. Other workers check the row in two ways:

- The session holds an advisory lock, which the server drops with the session. If the lock stays free for some seconds
  while the row does not change, the worker is dead: a worker whose connection broke, or whose server was
  restarted, has a new session by then.
- The worker keeps increasing the row's beat. If the beat has not changed for `lease_s` by the
  *observer's* monotonic clock, the worker is frozen or unreachable.

The worker that takes a candidate over deletes the row; an old holder that wakes up learns from that that it lost.
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
"""Seconds within which a living worker opens another session after losing one."""
BEAT_S = 2.0
"""Maximum seconds between two beats, so that several beats fall into RETURN_S."""

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
    """A worker's own lease; the caller holds the study's lock. Raises the exceptions of `connect`."""

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
        # 63 bits of the token, so that no two leases share a lock, not even two leases of one candidate.
        self._key = int(token, 16) % 2**63
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._lost = self._closed = False
        self._session: Any = connect()
        self._locked = False
        try:
            self._lock()
            # Replaces the row of a worker that died between taking the lease and recording the candidate.
            self._session.run(_TAKE, **self._row, key=self._key, worker=worker)
            # Losing a beat in a crash of the server does no harm: the next beat follows soon.
            self._session.run("SET synchronous_commit = off")
        except BaseException:
            self._disconnect()
            raise

    def keep_alive(self, every_s: float) -> None:
        """Renew the lease from a thread, so that a long epoch does not look like a dead worker."""
        self._beats = threading.Thread(
            target=self._beat_until_stopped, args=(min(every_s, BEAT_S),), daemon=True
        )
        self._beats.start()

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over.

        While the server is unreachable, a takeover cannot be noticed, and the training goes on.
        """
        # A running thread does the same, and only the thread waits for an unreachable server.
        if (self._session is not None or self._beats is None) and self._mutex.acquire(blocking=False):
            try:
                self._beat()
            finally:
                self._mutex.release()
        if self._lost or self._closed:
            raise LeaseLost(self._number)

    def close(self) -> None:
        """Return the lease after the end of its candidate."""
        self._end(f"DELETE FROM starling_leases {_MINE}")

    def abandon(self) -> None:
        """Release the lock but leave the row, as a dead worker does: others take the candidate over at once."""
        self._end(f"UPDATE starling_leases SET abandoned = true {_MINE}")

    def _end(self, statement: str) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        with self._mutex:
            if self._session is not None:
                # If this fails, the row stays: nobody reads the row of an ended candidate; others are taken over.
                with contextlib.suppress(Exception):
                    self._session.run(statement, **self._row)
                self._disconnect()
            self._closed = True

    def _beat_until_stopped(self, every_s: float) -> None:
        while not self._stop.wait(every_s) and not self._lost:
            with self._mutex:
                self._beat()

    def _beat(self) -> None:
        """Count one beat, in a new session if necessary. A failure is retried at the next beat."""
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
        """Take the advisory lock; an old session that the server has not ended yet may block it for a while."""
        self._locked = bool(self._session.run(f"SELECT pg_try_advisory_lock({self._key})")[0][0])

    def _disconnect(self) -> None:
        session, self._session, self._locked = self._session, None, False
        with contextlib.suppress(Exception):
            session.close()


class DatabaseLeaseWatch:
    """An observer of other workers' leases, which remembers when each last changed."""

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
        """Return why the candidate's worker is gone; None while it may be alive. The caller holds the study's lock."""
        with self._engine.begin() as connection:
            row = connection.execute(
                sqlalchemy.text(_LOOK), {"study": self._study, "number": number}
            ).one_or_none()
        # No row: a worker died during a takeover, or the table was emptied.
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
        """Delete a lease, so that its holder stops."""
        with self._engine.begin() as connection:
            connection.execute(
                sqlalchemy.text("DELETE FROM starling_leases WHERE study = :study AND number = :number"),
                {"study": self._study, "number": number},
            )
        self._stillness.forget(number)

"""A study in PostgreSQL, for workers on any number of hosts.

Everything that a worker writes while it holds the study's lock goes through the session that holds the lock. The lock
is an advisory lock of PostgreSQL and ends with its session. So if a server restarts, a network breaks or a worker
freezes, another worker gets the lock, and the old holder has no session for its remaining writes. The
old holder gets an error, and repeats the whole step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from starling.core.errors import StarlingError, UsageError
from starling.core.settings.study_url import StudyUrl
from starling.errors import ServerError
from starling.search.storage.database import (
    ANSWER_S,
    IDLE_S,
    LOCK_NOT_AVAILABLE,
    Database,
    DatabaseLost,
    DriverError,
    close_quietly,
    is_transient,
    reason_of,
    refusal,
    sql_state,
)
from starling.search.storage.database_leases import CREATE_TABLE, DatabaseLease, DatabaseLeaseWatch

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 600.0
"""Seconds for which a step is retried while the database is unreachable."""
COMPLAIN_S = 30.0
"""Seconds of waiting for the study's lock after which a line is printed."""
LOCK_IDLE_S = IDLE_S
"""Seconds of silence after which the server ends the session that holds the study's lock."""


def lock_key(name: str) -> int:
    """Return the number of PostgreSQL's advisory lock for a name: 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


class DatabaseStudyStorage:
    """One study in a database that may hold many studies."""

    def __init__(
        self,
        url: StudyUrl,
        study_name: str,
        *,
        create: bool = True,
        check_stop: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] = os.environ,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.where = f"{url} (study {study_name})"
        self.study_name = study_name
        self.spans_hosts = True
        self._database = Database(url, environment)
        self._key = lock_key(f"starling study {study_name}")
        self._check_stop, self._sleep, self._monotonic = check_stop, sleep, monotonic
        self._holding = False
        """Whether this worker is inside a step under the study's lock."""
        self._gave_up = False
        """Whether retries were given up since the database last answered: later steps then fail at once."""
        with self._refusals():
            self._rdb = self._create() if create else self._look()
        self._storage = optuna.storages.get_storage(self._rdb)  # with Optuna's cache of ended trials

    @property
    def optuna(self) -> BaseStorage:
        """The storage for Optuna."""
        return self._storage

    def close(self) -> None:
        """Close the connection; the storage stays usable, and opens a new connection when needed."""
        self._rdb.scoped_session.remove()
        self._rdb.engine.dispose()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude all other workers of the study while the context lasts. Not reentrant."""
        self._acquire()
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            self._release()

    def persist(self, operation: Callable[[], T]) -> T:
        """Run an operation, and repeat it for up to `PATIENCE_S` while the database is unreachable.

        Raises ServerError if the database stays unreachable, and a StarlingError if the database refuses.
        """
        if self._holding:
            return operation()  # the lock is lost with the connection, so only the whole step can be repeated
        since, pause = None, 0.1
        while True:
            try:
                result = operation()
            except Exception as error:
                if not is_transient(error):
                    if isinstance(error, (SQLAlchemyError, StorageInternalError, DriverError)):
                        raise refusal(self._database.url, error) from error
                    raise
                since = self._wait(error, since, pause)
                pause = min(pause * 2, 2.0)
            else:
                if since is not None:
                    logger.info(f"{self._database.url}: answers again")
                self._gave_up = False
                return result

    def take_lease(self, number: int, worker: str) -> DatabaseLease:
        """Take the lease of a candidate before the candidate is recorded. The caller holds the study's lock."""
        return DatabaseLease(
            lambda: self._database.session("starling lease"), self.study_name, number, worker
        )

    def watch(self, lease_s: float, monotonic: Callable[[], float] = time.monotonic) -> DatabaseLeaseWatch:
        """Return an observer of other workers' leases."""
        return DatabaseLeaseWatch(self._rdb.engine, self.study_name, lease_s, monotonic)

    def _create(self) -> RDBStorage:
        """Return Optuna's storage; create its tables and the lease table if they are missing."""
        guard = self._database.session()
        try:
            # Two workers that create the same tables at the same time would make each other fail.
            _lock_patiently(lambda: guard.run(f"SELECT pg_advisory_lock({lock_key('starling tables')})"))
            storage = self._rdb_storage(skip_table_creation=False)
            guard.run(CREATE_TABLE)
            return storage
        finally:
            close_quietly(guard)

    def _look(self) -> RDBStorage:
        """Return Optuna's storage of a database that already has its tables."""
        session = self._database.session()
        try:
            if session.run("SELECT to_regclass('studies')")[0][0] is None:
                raise UsageError(f"{self._database.url}: holds no search; check the database's name")
        finally:
            close_quietly(session)
        return self._rdb_storage(skip_table_creation=True)

    def _rdb_storage(self, *, skip_table_creation: bool) -> RDBStorage:
        # One connection is kept, so that the session that holds the lock writes what Optuna writes; `_connection`
        # opens no other connection meanwhile. The URL for Optuna and SQLAlchemy, which may print it, holds no data.
        engine = {"creator": self._connection, "pool_size": 1, "max_overflow": 1, "pool_timeout": ANSWER_S}
        try:
            return RDBStorage(
                "postgresql+pg8000://", engine_kwargs=engine, skip_table_creation=skip_table_creation
            )
        except RuntimeError:
            raise UsageError(
                f"{self._database.url}: its tables are of another version of Optuna than {optuna.__version__}; "
                "take another database, or upgrade this one with `optuna storage upgrade`"
            ) from None

    def _connection(self) -> Any:
        if self._holding:
            raise DatabaseLost(f"{self._database.url}: the connection was lost")
        return self._database.connection()

    def _execute(self, statement: str) -> None:
        with self._rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement))

    def _acquire(self) -> None:
        """Wait for the lock. Holders need milliseconds, so a long wait means a frozen holder and is worth a line."""
        complain_at = self._monotonic() + COMPLAIN_S
        idle_ms = round(LOCK_IDLE_S * 1000)
        while True:
            try:
                # The server's queue, for as long as its lock_timeout allows.
                self._execute(
                    f"SELECT set_config('idle_session_timeout', '{idle_ms}', false), pg_advisory_lock({self._key})"
                )
                return
            except SQLAlchemyError as error:
                if sql_state(error) != LOCK_NOT_AVAILABLE:
                    raise
            self._check_stop()
            if self._monotonic() > complain_at:
                complain_at = self._monotonic() + COMPLAIN_S
                logger.warning(
                    f"still waiting for the lock of {self.where}; is the worker that holds it paused (docker pause, "
                    f"SIGSTOP)? After {LOCK_IDLE_S:g} s it loses the lock"
                )

    def _release(self) -> None:
        try:
            self._execute(
                f"SELECT pg_advisory_unlock({self._key}), set_config('idle_session_timeout', '0', false)"
            )
        except Exception as error:
            # All writes are done; the lock ends with the connection.
            self.close()
            if not is_transient(error):
                raise

    def _wait(self, error: Exception, since: float | None, pause: float) -> float:
        """Wait a moment for the database; return the start of the outage. Raises ServerError after `PATIENCE_S`."""
        with contextlib.suppress(Exception):
            self.close()
        now, url = self._monotonic(), self._database.url
        if self._gave_up or (since is not None and now - since >= PATIENCE_S):
            self._gave_up = True
            raise ServerError(
                f"{url}: the study's database has been out of reach for {PATIENCE_S / 60:g} minutes "
                f"({reason_of(error)}); nothing recorded is lost: start the worker again when it answers"
            ) from None
        if since is None:
            since = now
            logger.warning(
                f"{url}: does not answer ({reason_of(error)}); tried again for {PATIENCE_S / 60:g} minutes"
            )
        try:
            self._check_stop()
        except StarlingError:
            self._gave_up = True
            raise
        self._sleep(pause * random.uniform(0.5, 1.0))
        return since

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn exceptions of the driver, SQLAlchemy and Optuna into StarlingErrors."""
        try:
            yield
        except (SQLAlchemyError, StorageInternalError, DriverError, OSError) as error:
            raise refusal(self._database.url, error) from None


def _lock_patiently(lock: Callable[[], Any]) -> None:
    """Take a lock that another worker holds for some seconds while it creates tables."""
    for attempt in range(15):
        try:
            lock()
            return
        except DriverError as error:
            if sql_state(error) != LOCK_NOT_AVAILABLE or attempt == 14:
                raise

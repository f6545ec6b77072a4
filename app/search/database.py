"""A study in PostgreSQL, for the workers of any number of hosts.

Everything a worker writes while it holds the study's lock goes through the one session that holds it. The lock is
PostgreSQL's advisory one and ends with its session; so when a server restarts, a network breaks or a worker is frozen,
the lock goes to another and what its old holder still tries to write has no session to be written by. The
holder hears of that as an error, and begins the whole step anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from app.config.study_url import StudyUrl
from app.errors import CheckpointError, ServerError, StarlingError, UsageError
from app.search.database_leases import CREATE_TABLE, DatabaseLease, DatabaseLeaseWatch
from app.search.password import REMEDY, find_password

try:
    import pg8000.legacy
    import pg8000.native
    from pg8000.exceptions import Error as DriverError
    from pg8000.exceptions import InterfaceError
except ImportError:
    raise UsageError(
        "--study: the driver for PostgreSQL is not installed; pip install -r requirements.txt"
    ) from None

T = TypeVar("T")

CONNECT_S = 5.0
"""Seconds for each step of connecting."""
ANSWER_S = 30.0
"""Seconds for an answer, after which the connection counts as lost."""
PATIENCE_S = 600.0
"""Seconds for which a step is tried again while the database is out of reach."""
COMPLAIN_S = 30.0
"""Seconds after which waiting for the study's lock is worth a line."""
LOCK_IDLE_S = 120.0
"""Seconds of silence after which the server ends the session that holds the study's lock: its worker is frozen."""
OLDEST_VERSION = 14

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_TRANSIENT = ("08", "25006", "25P03", "40", "53", "55", "57")
"""Beginnings of SQLSTATE codes that may pass: connection, a standby before it takes over, conflict, resources, locks,
shutdown and start."""
_NOT_A_LOCK = "55P03"

# It prints a traceback for each broken connection that it throws away; what broke is told in our own words.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)


class ConnectionLost(ServerError):
    """The connection broke while the study was locked: the lock is gone, and the step has to begin anew."""


def lock_key(name: str) -> int:
    """Return the number of PostgreSQL's advisory lock for a name: 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


class Database:
    """Opens sessions with one server."""

    def __init__(self, url: StudyUrl, environment: Mapping[str, str] = os.environ) -> None:
        self.url = url
        self._environment = environment

    def session(self, name: str = "starling") -> Any:
        """Return a session in which each statement is a transaction of its own; `name` is what the server lists it as.

        Raises UsageError where the server refuses, ServerError where it does not answer.
        """
        return self._open(pg8000.native.Connection, name)

    def connection(self) -> Any:
        """Return a connection as SQLAlchemy wants it; raises as `session`."""
        return self._open(pg8000.legacy.Connection, "starling study")

    def _open(self, kind: Callable[..., Any], name: str) -> Any:
        password = find_password(self.url, self._environment)
        try:
            channel = self._connect()
            try:
                session = kind(
                    self.url.user, host=self.url.host, database=self.url.database, password=password, sock=channel,
                    ssl_context=False, application_name=name, startup_params=_session_settings(),
                )  # fmt: skip
            except BaseException:
                channel.close()
                raise
            channel.settimeout(ANSWER_S)
        except StarlingError:
            raise
        except Exception as error:
            if not sql_state(error) and not _is_silence(error):
                raise UsageError(
                    f"{self.url}: what answers there does not speak PostgreSQL's protocol ({reason_of(error)}); "
                    "check host and port"
                ) from None
            raise refusal(self.url, error, has_password=bool(password)) from None
        _check_version(self.url, session)
        return session

    def _connect(self) -> socket.socket:
        """Return a connected socket, encrypted as `sslmode` asks."""
        channel = socket.create_connection((self.url.host, self.url.port), CONNECT_S)
        try:
            # A host that vanishes without a word is noticed in about a minute, from either side.
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
            return channel if self.url.sslmode == "disable" else self._encrypt(channel)
        except BaseException:
            channel.close()
            raise

    def _encrypt(self, channel: socket.socket) -> socket.socket:
        channel.sendall(_SSL_REQUEST)
        answer = channel.recv(1)
        if answer == b"S":
            context = ssl.create_default_context(cafile=self.url.sslrootcert or None)
            if self.url.sslmode != "verify-full":
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context.wrap_socket(channel, server_hostname=self.url.host)
        if not answer:
            raise ConnectionError("it closed the connection")
        if answer != b"N":
            raise UsageError(f"{self.url}: what answers there is no PostgreSQL server; check host and port")
        if self.url.sslmode != "prefer":
            raise UsageError(
                f"{self.url}: the server does not encrypt, and sslmode={self.url.sslmode} asks for it; "
                "turn on ssl in postgresql.conf, or leave sslmode out where the network is trusted"
            )
        return channel


class DatabaseStudyStorage:
    """One study of a database that may hold many."""

    def __init__(
        self,
        url: StudyUrl,
        study_name: str,
        *,
        create: bool = True,
        say: Callable[[str], None] = lambda line: None,
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
        self._say, self._check_stop, self._sleep, self._monotonic = say, check_stop, sleep, monotonic
        self._holding = False
        """Whether this worker is in the middle of a step under the study's lock."""
        self._gave_up = False
        """Whether patience ran out since the database last answered: later steps then fail at once."""
        with self._refusals():
            self._rdb = self._create() if create else self._look()
        self._storage = optuna.storages.get_storage(self._rdb)  # with Optuna's cache of ended trials

    @property
    def optuna(self) -> BaseStorage:
        """The storage as Optuna knows it."""
        return self._storage

    def close(self) -> None:
        """Close the connection; the storage is usable all the same, and opens another."""
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
        """Run an operation, again and again for `PATIENCE_S` where the database is out of reach.

        Raises ServerError when it stays so, and our own error for what the database refuses.
        """
        if self._holding:
            return operation()  # a part cannot be repeated alone: the lock is gone with the connection
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
                    self._say(f"{self._database.url}: answers again")
                self._gave_up = False
                return result

    def take_lease(self, number: int, worker: str) -> DatabaseLease:
        """Take the lease of a candidate that is about to be recorded. The study is locked."""
        return DatabaseLease(
            lambda: self._database.session("starling lease"), self.study_name, number, worker
        )

    def watch(self, lease_s: float, monotonic: Callable[[], float] = time.monotonic) -> DatabaseLeaseWatch:
        """Return an observer of other workers' leases."""
        return DatabaseLeaseWatch(self._rdb.engine, self.study_name, lease_s, monotonic)

    def _create(self) -> RDBStorage:
        """Return Optuna's storage, its tables and ours created if they are not there."""
        guard = self._database.session()
        try:
            # Two workers that create the same tables at once would fail each other.
            _lock_patiently(lambda: guard.run(f"SELECT pg_advisory_lock({lock_key('starling tables')})"))
            storage = self._rdb_storage(skip_table_creation=False)
            guard.run(CREATE_TABLE)
            return storage
        finally:
            _close_quietly(guard)

    def _look(self) -> RDBStorage:
        """Return Optuna's storage of a database that has its tables."""
        session = self._database.session()
        try:
            if session.run("SELECT to_regclass('studies')")[0][0] is None:
                raise UsageError(f"{self._database.url}: holds no search; check the database's name")
        finally:
            _close_quietly(session)
        return self._rdb_storage(skip_table_creation=True)

    def _rdb_storage(self, *, skip_table_creation: bool) -> RDBStorage:
        # One connection is kept, so what Optuna writes is written by the session that holds the lock: `_connection`
        # makes no other meanwhile. The URL that Optuna and SQLAlchemy know, and may print, says nothing.
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
            raise ConnectionLost(f"{self._database.url}: the connection was lost")
        return self._database.connection()

    def _execute(self, statement: str) -> None:
        with self._rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement))

    def _acquire(self) -> None:
        """Wait for the lock. Holders need milliseconds, so one that takes long is frozen and worth a line."""
        complain_at = self._monotonic() + COMPLAIN_S
        idle_ms = round(LOCK_IDLE_S * 1000)
        while True:
            try:
                # In the server's queue, for as long as its lock_timeout lets a session wait.
                self._execute(
                    f"SELECT set_config('idle_session_timeout', '{idle_ms}', false), pg_advisory_lock({self._key})"
                )
                return
            except SQLAlchemyError as error:
                if sql_state(error) != _NOT_A_LOCK:
                    raise
            self._check_stop()
            if self._monotonic() > complain_at:
                complain_at = self._monotonic() + COMPLAIN_S
                self._say(
                    f"still waiting for the lock of {self.where}; is the worker that holds it paused (docker pause, "
                    f"SIGSTOP)? After {LOCK_IDLE_S:g} s it loses the lock"
                )

    def _release(self) -> None:
        try:
            self._execute(
                f"SELECT pg_advisory_unlock({self._key}), set_config('idle_session_timeout', '0', false)"
            )
        except Exception as error:
            # What was written is written; the lock goes with the connection.
            self.close()
            if not is_transient(error):
                raise

    def _wait(self, error: Exception, since: float | None, pause: float) -> float:
        """Wait a moment for the database to come back; returns since when it is away. Raises when that is too long."""
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
            self._say(
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
        """Turn what the driver, SQLAlchemy and Optuna raise into our own errors."""
        try:
            yield
        except (SQLAlchemyError, StorageInternalError, DriverError, OSError) as error:
            raise refusal(self._database.url, error) from None


def _session_settings() -> dict[str, str]:
    """Return the server's settings of every session: no statement, wait or dead client can hold others up for long."""
    return {
        "lock_timeout": "2s",
        "statement_timeout": f"{round(ANSWER_S * 0.8)}s",
        "idle_in_transaction_session_timeout": f"{round(LOCK_IDLE_S * 1000)}",
        "tcp_keepalives_idle": "30",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "3",
    }


def _check_version(url: StudyUrl, session: Any) -> None:
    text = str(session.parameter_statuses.get("server_version", ""))
    major = text.split(".")[0].split(" ")[0]
    if major.isdigit() and int(major) < OLDEST_VERSION:
        _close_quietly(session)
        raise UsageError(f"{url}: is PostgreSQL {text}; a study needs version {OLDEST_VERSION} or newer")


def _lock_patiently(lock: Callable[[], Any]) -> None:
    """Take a lock that another worker holds for the seconds in which it makes tables."""
    for attempt in range(15):
        try:
            lock()
            return
        except DriverError as error:
            if sql_state(error) != _NOT_A_LOCK or attempt == 14:
                raise


def _close_quietly(session: Any) -> None:
    with contextlib.suppress(Exception):
        session.close()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from or during, each once."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def _fields(error: BaseException) -> Mapping[str, str]:
    """Return the fields of the server's own error among the causes: C its SQLSTATE, M its message."""
    for cause in _causes(error):
        if isinstance(cause, DriverError) and cause.args and isinstance(cause.args[0], dict):
            return cause.args[0]
    return {}


def sql_state(error: BaseException) -> str:
    """Return the five letters by which the server says what is wrong; empty where it said nothing."""
    return str(_fields(error).get("C", ""))


def is_transient(error: Exception) -> bool:
    """Return whether an error may pass by itself: the server is away, starting, stopping, or too busy."""
    if isinstance(error, StarlingError):
        return isinstance(error, ServerError)
    if not isinstance(error, (SQLAlchemyError, StorageInternalError, DriverError, OSError)):
        return False
    state = sql_state(error)
    if state:
        return state.startswith(_TRANSIENT)
    return any(
        isinstance(cause, (InterfaceError, ConnectionError, TimeoutError, ServerError))
        for cause in _causes(error)
    )


def reason_of(error: BaseException) -> str:
    """Return in a few words why the database did not do as asked."""
    if isinstance(error, ConnectionLost):
        return "the connection was lost"
    said = _fields(error).get("M")
    if said:
        return said
    for cause in _causes(error):
        if isinstance(cause, TimeoutError):
            return "timed out"
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    first = list(_causes(error))[-1]
    return str(first).splitlines()[0] if str(first) else type(first).__name__


def refusal(url: StudyUrl, error: BaseException, *, has_password: bool = True) -> StarlingError:
    """Return our own error for what went wrong between us and the server."""
    state, reason = sql_state(error), reason_of(error)
    if state == "28P01":
        given = "the password is not the one of this user" if has_password else "it asks for a password"
        return UsageError(f"{url}: the server does not let {url.user} in: {given}; set it by {REMEDY}")
    if state.startswith("28"):
        return UsageError(
            f"{url}: the server does not let {url.user} in ({reason}); see its pg_hba.conf and the user's name"
        )
    if state == "3D000":
        return UsageError(
            f"{url}: has no database {url.database}; create it: createdb --owner {url.user} {url.database}"
        )
    if state == "42501":
        return UsageError(
            f"{url}: {url.user} may not write there ({reason}); name a database of its own, or let the owner of this one "
            f"say: ALTER DATABASE {url.database} OWNER TO {url.user}"
        )
    if state == "25006":
        return UsageError(f"{url}: can only be read ({reason}); name the primary server, not a standby")
    if not state and isinstance(error, ssl.SSLCertVerificationError):
        return UsageError(
            f"{url}: its certificate is not trusted ({error.verify_message}); name its authority by "
            "sslrootcert=FILE, and the server as its certificate does"
        )
    if not state and not _is_silence(error):
        return CheckpointError(f"{url}: cannot be used ({reason}); what is recorded is intact")
    if not state or state.startswith(_TRANSIENT):
        return ServerError(
            f"{url}: does not answer ({reason}); check host and port, that PostgreSQL runs and listens there, and that "
            "no firewall is between"
        )
    return CheckpointError(
        f"{url}: the database refused ({state}: {reason}); what is recorded is intact: see the server's log"
    )


def _is_silence(error: BaseException) -> bool:
    """Return whether there was no answer at all, rather than one that made no sense."""
    return any(isinstance(cause, (OSError, InterfaceError)) for cause in _causes(error))

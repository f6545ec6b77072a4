"""Sessions with a PostgreSQL server that keeps studies: find the password, connect, and explain errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from starling.core.budget import BudgetExceeded
from starling.core.errors import CheckpointError, StarlingError, UsageError
from starling.core.files.refusals import readable
from starling.core.files.regular import read_regular
from starling.core.settings.study_url import PASSWORD_FILE_VARIABLE, StudyUrl
from starling.core.utf8 import NotUtf8, text_of
from starling.errors import ServerError

try:
    import pg8000.legacy
    import pg8000.native
    from pg8000.exceptions import Error, InterfaceError
except ImportError:
    raise UsageError(
        "--study: the driver for PostgreSQL is not installed; pip install -r requirements.txt"
    ) from None

DriverError = Error
"""Base class of all exceptions of the driver."""

CONNECT_S = 5.0
"""Timeout in seconds for each step of connecting."""
ANSWER_S = 30.0
"""Timeout in seconds for an answer; after it the connection counts as lost."""
IDLE_S = 120.0
"""Seconds of silence within a transaction after which the server ends the session, because its worker is frozen."""
OLDEST_VERSION = 14

PASSWORD_REMEDY = f"{PASSWORD_FILE_VARIABLE}=FILE, PGPASSWORD or ~/.pgpass"
_MOST_PASSWORD_BYTES = 1 << 20
_PASSWORD_FIELD = re.compile(r"\\(.)|(:)|([^:\\]+|\\$)")

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
LOCK_NOT_AVAILABLE = "55P03"
"""SQLSTATE of a lock that could not be taken within lock_timeout."""
_TRANSIENT = ("08", "25006", "25P03", "40", "53", "55", "57")
"""Prefixes of SQLSTATE codes of temporary errors: connection, a standby before promotion, conflict, resources, locks,
shutdown and start."""

# SQLAlchemy's pool would print a traceback for each broken connection; this module reports it in one line.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)


class DatabaseLost(ServerError):
    """The connection broke while the study was locked: the lock is lost, and the step has to be repeated."""


class Database:
    """Opens sessions with one server."""

    def __init__(self, url: StudyUrl, environment: Mapping[str, str] = os.environ) -> None:
        self.url = url
        self._environment = environment

    def session(self, name: str = "starling") -> Any:
        """Return a session in which each statement is its own transaction; `name` is the session's name on the server.

        Raises UsageError if the server refuses, ServerError if the server does not answer.
        """
        return self._open(pg8000.native.Connection, name)

    def connection(self) -> Any:
        """Return a connection for SQLAlchemy; raises the same errors as `session`."""
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
                    f"{self.url}: the server there does not speak PostgreSQL's protocol ({reason_of(error)}); "
                    "check host and port"
                ) from None
            raise refusal(self.url, error, has_password=bool(password)) from None
        _check_version(self.url, session)
        return session

    def _connect(self) -> socket.socket:
        """Return a connected socket, encrypted as `sslmode` asks."""
        channel = socket.create_connection((self.url.host, self.url.port), CONNECT_S)
        try:
            # Keepalive notices a host that has vanished in about a minute, from either side.
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
            raise UsageError(f"{self.url}: the server there is not PostgreSQL; check host and port")
        if self.url.sslmode != "prefer":
            raise UsageError(
                f"{self.url}: the server does not encrypt, and sslmode={self.url.sslmode} asks for it; "
                "turn on ssl in postgresql.conf, or leave sslmode out if the network is trusted"
            )
        return channel


def _session_settings() -> dict[str, str]:
    """Return the server settings of a session, so that no statement, wait or dead client blocks others for long."""
    return {
        "lock_timeout": "2s",
        "statement_timeout": f"{round(ANSWER_S * 0.8)}s",
        "idle_in_transaction_session_timeout": f"{round(IDLE_S * 1000)}",
        "tcp_keepalives_idle": "30",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "3",
    }


def _check_version(url: StudyUrl, session: Any) -> None:
    text = str(session.parameter_statuses.get("server_version", ""))
    major = text.split(".")[0].split(" ")[0]
    if major.isdigit() and int(major) < OLDEST_VERSION:
        close_quietly(session)
        raise UsageError(f"{url}: is PostgreSQL {text}; a study needs version {OLDEST_VERSION} or newer")


def close_quietly(session: Any) -> None:
    with contextlib.suppress(Exception):
        session.close()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from or during, each once."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def _fields(error: BaseException) -> Mapping[str, str]:
    """Return the fields of the server's error among the causes: C is the SQLSTATE, M the message."""
    for cause in _causes(error):
        if isinstance(cause, DriverError) and cause.args and isinstance(cause.args[0], dict):
            return cause.args[0]
    return {}


def sql_state(error: BaseException) -> str:
    """Return the five characters of the server's SQLSTATE; an empty string if the server sent no error."""
    return str(_fields(error).get("C", ""))


def is_transient(error: Exception) -> bool:
    """Return whether an error may be temporary: the server is unreachable, starting, stopping, or too busy."""
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
    """Return in a few words why the database operation failed."""
    if isinstance(error, DatabaseLost):
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
    """Return a StarlingError with a remedy for an error of the server or the connection."""
    state, reason = sql_state(error), reason_of(error)
    if state == "28P01":
        given = "the password is not the one of this user" if has_password else "it asks for a password"
        return UsageError(
            f"{url}: the server does not let {url.user} in: {given}; set it by {PASSWORD_REMEDY}"
        )
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
            f"{url}: {url.user} may not write there ({reason}); name another database, or let the owner of this one "
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
    """Return whether the server did not answer at all; False for an answer that could not be understood."""
    return any(isinstance(cause, (OSError, InterfaceError)) for cause in _causes(error))


@readable(UsageError)
def find_password(url: StudyUrl, environment: Mapping[str, str]) -> str:
    """Return the password for `url`; an empty string if none is set.

    The first source that is set counts: the file that STARLING_STUDY_PASSWORD_FILE names, PGPASSWORD, and the line for
    this server in the file that PGPASSFILE names, or in ~/.pgpass.

    Raises UsageError for an unreadable file, and for a ~/.pgpass that other users can read.
    """
    named = environment.get(PASSWORD_FILE_VARIABLE)
    if named:
        return _read_password(Path(named), PASSWORD_FILE_VARIABLE).rstrip("\r\n")
    if environment.get("PGPASSWORD"):
        return environment["PGPASSWORD"]
    given = environment.get("PGPASSFILE")
    path = Path(given) if given else Path(environment.get("HOME") or "/") / ".pgpass"
    if not path.is_file():
        return ""
    if path.stat().st_mode & 0o077:
        raise UsageError(f"{path}: holds passwords and others may read it; chmod 600 it")
    return _look_up_password(_read_password(path, "PGPASSFILE"), url)


def _read_password(path: Path, variable: str) -> str:
    try:
        return text_of(read_regular(path, _MOST_PASSWORD_BYTES), path)
    except (OSError, NotUtf8, BudgetExceeded) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None)
        reason = reason or "not text of a password's length"
        raise UsageError(
            f"{path}: the database's password cannot be read ({reason}); correct {variable}"
        ) from None


def _look_up_password(text: str, url: StudyUrl) -> str:
    """Return the password of the first line `host:port:database:user:password` that matches; `*` matches anything."""
    wanted = (url.host, str(url.port), url.database, url.user)
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        fields = _password_fields(line)
        if len(fields) >= 5 and all(
            field in ("*", value) for field, value in zip(fields[:4], wanted, strict=True)
        ):
            return fields[4]
    return ""


def _password_fields(line: str) -> list[str]:
    r"""Return the fields of a line between its colons; `\:` and `\\` stand for the characters themselves."""
    fields: list[list[str]] = [[]]
    for escaped, colon, plain in _PASSWORD_FIELD.findall(line):
        if colon:
            fields.append([])
        else:
            fields[-1].append(escaped or plain)
    return ["".join(pieces) for pieces in fields]

"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, on a free port of the loopback interface.

It is made with the server's own programs, from PATH or from Debian's package `postgresql`. Where there are none the
tests skip, unless STARLING_REQUIRE_POSTGRES=1 says that they must not.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

USER = "starling"
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "unix_socket_permissions": "0700",
}


def find_programs() -> Path | None:
    """Return the folder of `initdb` and `postgres`, of the newest version; None where there is none."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda path: int(path.parent.name), default=None)


def missing(what: str) -> None:
    """Skip the test for want of `what`, or fail it where a server is required."""
    if os.environ.get("STARLING_REQUIRE_POSTGRES") == "1":
        pytest.fail(f"STARLING_REQUIRE_POSTGRES=1, but {what}")
    pytest.skip(what)


class PostgresServer:
    """One server. Its user `starling` has a password and may create no databases; tests get one each."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._owner = _unprivileged_user()
        self.folder = Path(tempfile.mkdtemp(prefix="starling-postgres-"))
        self.data = self.folder / "data"
        self.password = secrets.token_urlsafe(12)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        if self._owner:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._run("initdb", "--pgdata", str(self.data), "--username", "postgres", "--auth-local", "trust",
                  "--auth-host", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync")  # fmt: skip
        self.start()
        self.sql(f"CREATE ROLE {USER} LOGIN PASSWORD '{self.password}'")

    def start(self, **settings: str) -> None:
        """Start the server and wait until it answers."""
        words = [
            str(self._programs / "postgres"),
            "-D",
            str(self.data),
            "-p",
            str(self.port),
            "-k",
            str(self.folder),
        ]
        values = {"listen_addresses": "127.0.0.1", **_SETTINGS, **settings}
        words += [f"--{name}={value}" for name, value in values.items()]
        with open(self.folder / "log", "ab") as log:
            # Not without the tests: the kernel ends it should they be killed.
            self._process = subprocess.Popen(
                words, stdout=log, stderr=log, cwd="/", preexec_fn=_end_with_parent, **self._as_owner()
            )
        until = time.monotonic() + 60
        while self._try_run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text(errors="replace")[-2000:]
            assert time.monotonic() < until, "the server does not come up"
            time.sleep(0.05)

    def stop(self, signum: int = signal.SIGINT) -> None:
        """End the server: in order by SIGINT; by SIGQUIT as a power cut would, with recovery at the next start."""
        assert self._process is not None
        self._process.send_signal(signum)
        self._process.wait(30)
        self._process = None

    def remove(self) -> None:
        """End the server and remove its files."""
        if self._process is not None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as the superuser, over the local socket; returns the rows, columns divided by `|`."""
        answer = self._run("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", str(self.folder), "-p",
                           str(self.port), "-U", "postgres", "-d", database, "-c", statement)  # fmt: skip
        return answer.stdout.strip()

    def create_database(self, name: str, owner: str = USER) -> str:
        """Create a database; returns the URL that --study takes."""
        self.sql(f'CREATE DATABASE "{name}" OWNER {owner}')
        return self.url(name)

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def end_sessions(self, database: str, condition: str = "true") -> int:
        """Break the connections with a database for which a condition on pg_stat_activity holds; returns how many."""
        rows = self.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}' AND ({condition})"
        )
        return len(rows.splitlines())

    def _run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        answer = self._try_run(program, *words)
        assert answer.returncode == 0, f"{program}: {answer.stderr}"
        return answer

    def _try_run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._programs / program), *words], capture_output=True, text=True, cwd="/", check=False,
            **self._as_owner(),
        )  # fmt: skip

    def _as_owner(self) -> dict[str, Any]:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
        if self._owner is None:
            return {"env": environment}
        return {
            "env": environment,
            "user": self._owner.pw_uid,
            "group": self._owner.pw_gid,
            "extra_groups": [],
        }


def _end_with_parent() -> None:
    """Ask Linux for SIGQUIT when the parent dies; after the change of user, which would undo it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Return who is to run the server where this is root, which it refuses to run as."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    missing("there is no user to run PostgreSQL as: neither postgres nor nobody")
    return None

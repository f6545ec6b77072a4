"""`launcher track restore`: replace the servers' stored data with a backup.

Everything is first loaded beside the old data, and replaces it at the very end. If the backup does not load, nothing
changes.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.console import confirmed, say
from launcher.engines.docker.docker import DockerEngine
from launcher.engines.docker.services import Service
from launcher.errors import EngineError
from launcher.servers.archive import (
    ARTIFACTS,
    DATABASES,
    REPLACED,
    STAGED,
    Contents,
    database_member,
    held,
    is_left_over,
    members,
    verify,
)
from launcher.servers.backup import FOLDER
from launcher.servers.compose import Compose, last_words, run
from launcher.servers.track import connect, provide_images, start_all
from starling.core.errors import UsageError
from starling.core.paths import absolute

STAGE_ARTIFACTS = f"rm -rf {FOLDER}/{STAGED} && mkdir {FOLDER}/{STAGED} && tar -x -f - -C {FOLDER}/{STAGED}"
SWAP_ARTIFACTS = f"""cd {FOLDER} && rm -rf {REPLACED} && mkdir {REPLACED}
find . -mindepth 1 -maxdepth 1 ! -name {REPLACED} ! -name {STAGED} -exec mv -t {REPLACED} {{}} +
find {STAGED} -mindepth 1 -maxdepth 1 -exec mv -t . {{}} +
rm -rf {REPLACED} {STAGED}"""
_FIRST_START_S = 60.0


def restore(compose: Compose, file: Path, *, yes: bool, limit_s: float) -> None:
    """Replace the servers' stored data with the contents of FILE, and start the servers; raises DataError."""
    file = absolute(file)
    with held(file) as at:
        contents = verify(file, at)
        compose, engine = connect(compose)
        config = compose.config()
        say(f"{file}: whole; {contents.files} files of {contents.created or 'an unknown time'}")
        if not yes and not confirmed(
            f"replace all stored data of project {config['name']} with them?", "restore"
        ):
            raise UsageError("nothing changed")
        provide_images(compose, config, engine, build=False)
        servers = _database_up(compose, config, engine)
        try:
            _stage(file, at, contents, servers)
        except BaseException:
            _discard_stage(servers)
            raise
    _swap_databases(servers)
    if contents.has_artifacts:
        servers.in_artifacts(SWAP_ARTIFACTS)
    for database in DATABASES:
        servers.psql(f"DROP DATABASE IF EXISTS {database}_replaced WITH (FORCE)")
    say("everything is in place; starting the servers")
    start_all(compose, engine, build=False, limit_s=limit_s)


@dataclass(frozen=True, slots=True)
class _Servers:
    """The two servers that store data. Every method raises EngineError with the last lines of the failed command."""

    compose: Compose
    postgres: Service
    mlflow: Service

    def psql(self, statements: str) -> bytes:
        """Run SQL as the administrator of PostgreSQL and return the output."""
        words = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]
        words += ["--username=mlflow", "--dbname=postgres"]
        with tempfile.TemporaryFile() as script:
            script.write(statements.encode())
            script.seek(0)
            command = ["docker", "exec", "--interactive", self.postgres.id, *words]
            return run(command, self.compose.environment, stdin=script)

    def in_artifacts(self, script: str, send: Callable[[IO[bytes]], None] = lambda sink: None) -> None:
        """Run a shell script in a container with the artifacts' volume and no network; `send` writes to its stdin."""
        words = ["docker", "run", "--rm", "--interactive", "--network=none", "--cap-drop=ALL"]
        volumes = f"--volumes-from={self.mlflow.id}"
        self.feed([*words, volumes, "--entrypoint=sh", self.mlflow.image, "-ec", script], send, "artifacts")

    def feed(self, words: list[str], send: Callable[[IO[bytes]], None], what: str) -> None:
        """Run a command whose stdin `send` writes; `what` begins the message of an EngineError."""
        with tempfile.TemporaryFile() as said:
            with subprocess.Popen(
                words, env=self.compose.environment, stdin=subprocess.PIPE, stdout=said, stderr=said
            ) as receiver:
                assert receiver.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # the command has ended, and its output says why
                    send(receiver.stdin)
                    receiver.stdin.close()
            said.seek(0)
            if receiver.returncode:
                raise EngineError(f"{what}: {last_words(said.read())}")


def _database_up(compose: Compose, config: dict[str, Any], engine: DockerEngine) -> _Servers:
    """Create missing containers and volumes, start only PostgreSQL, and wait until its databases exist."""
    compose.read("up", "--no-start", "--no-build", "--pull", "never")
    compose.read("up", "--detach", "--no-build", "--pull", "never", "--wait", "postgres")
    services = {service.name: service for service in engine.services(config["name"])}
    servers = _Servers(compose, services["postgres"], services["mlflow"])
    until = time.monotonic() + _FIRST_START_S
    ready = "SELECT count(*) FROM pg_database WHERE datname IN ('mlflow', 'starling')"
    while servers.psql(ready).strip() != b"2":
        if time.monotonic() > until:
            raise EngineError("PostgreSQL did not set up its databases; see: docker compose logs postgres")
        time.sleep(0.5)
    return servers


def _stage(file: Path, at: Path, contents: Contents, servers: _Servers) -> None:
    """Load the dumps into new databases, and the artifacts into a new folder of their volume."""
    dumps = {database_member(name): (name, role) for name, role in DATABASES.items()}
    with members(file, at) as found:
        for member in found:
            if member.name in dumps:
                database, role = dumps[member.name]
                _load_database(servers, database, role, member.content)
                say(f"database {database}: loaded")
    if contents.has_artifacts:
        servers.in_artifacts(STAGE_ARTIFACTS, lambda sink: _send_artifacts(file, at, sink))
        say("artifacts: copied")


def _discard_stage(servers: _Servers) -> None:
    """Remove the staged databases and artifacts; the next restore would also remove them."""
    with contextlib.suppress(EngineError):
        for database in DATABASES:
            servers.psql(f"DROP DATABASE IF EXISTS {database}_restored WITH (FORCE)")
        servers.in_artifacts(f"rm -rf {FOLDER}/{STAGED}")


def _load_database(servers: _Servers, database: str, role: str, dump: IO[bytes]) -> None:
    new = f"{database}_restored"
    servers.psql(f"DROP DATABASE IF EXISTS {new} WITH (FORCE)")
    servers.psql(f"CREATE DATABASE {new} OWNER {role} TEMPLATE template0")
    servers.psql(f"REVOKE CONNECT ON DATABASE {new} FROM PUBLIC")
    words = ["pg_restore", "--username=mlflow", f"--dbname={new}", "--exit-on-error", "--single-transaction"]
    words += ["--no-owner", "--no-acl", f"--role={role}"]
    servers.feed(
        ["docker", "exec", "--interactive", servers.postgres.id, *words],
        lambda sink: shutil.copyfileobj(dump, sink),
        f"database {database} of the backup does not load; nothing was changed",
    )


def _swap_databases(servers: _Servers) -> None:
    """Replace the old databases with the restored ones; if that fails, the old ones go on."""
    servers.compose.read("stop", "--timeout", "30", "mlflow")
    try:
        servers.psql(_swap_statements())
    except BaseException:
        for database in DATABASES:
            with contextlib.suppress(EngineError):
                servers.psql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        servers.compose.read("start", "mlflow")
        raise


def _swap_statements() -> str:
    """Return the SQL that replaces the old databases with the restored ones, all of them or none."""
    shut = [f"ALTER DATABASE {name} ALLOW_CONNECTIONS false;" for name in DATABASES]
    names = ", ".join(f"'{name}'" for name in DATABASES)
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ({names});"
    drop = [f"DROP DATABASE IF EXISTS {name}_replaced WITH (FORCE);" for name in DATABASES]
    swap = [
        f"ALTER DATABASE {name} RENAME TO {name}_replaced; ALTER DATABASE {name}_restored RENAME TO {name};"
        for name in DATABASES
    ]
    return "\n".join([*drop, *shut, end, "BEGIN;", *swap, "COMMIT;"])


def _send_artifacts(file: Path, at: Path, sink: IO[bytes]) -> None:
    """Write the artifacts of a backup to `sink` as a separate tar."""
    with (
        members(file, at) as found,
        tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as out,
    ):
        for member in found:
            name = member.name.removeprefix(ARTIFACTS)
            if name != member.name and not is_left_over(name):
                copy = tarfile.TarInfo(name)
                copy.size, copy.mtime, copy.mode = member.size, member.mtime, 0o644
                out.addfile(copy, member.content)

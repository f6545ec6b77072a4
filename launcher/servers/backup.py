"""`launcher track backup`: dump the databases, then copy the artifacts, while the servers run.

In this order the backup holds every artifact that a dumped run names, because artifacts are only ever added.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from launcher.console import say
from launcher.engines.docker.docker import DockerEngine
from launcher.engines.docker.services import Service
from launcher.errors import EngineError, disk_full
from launcher.servers.archive import ARTIFACTS, DATABASES, ArchiveWriter, database_member, is_left_over
from launcher.servers.compose import Compose, last_words
from launcher.servers.track import connect
from starling.core.errors import UsageError
from starling.core.paths import absolute
from starling.core.units import format_size

FOLDER = "/mlflow/artifacts"
_TAR_CHANGED = 1
"""GNU tar's exit code for a file that changed during the read; the archive is complete."""


def back_up(compose: Compose, file: Path) -> None:
    """Write FILE atomically; raises UsageError if FILE exists, EngineError if the servers are down."""
    file = absolute(file)
    if file.exists():
        raise UsageError(f"{file}: exists; name a new file")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")
    compose, engine = connect(compose)
    postgres, mlflow = _running(engine, compose)
    elsewhere = (engine.environment(mlflow.id) or {}).get("MLFLOW_ARTIFACTS", "")
    about = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "has_artifacts": not elsewhere}
    with (
        _whole_or_nothing(file) as output,
        tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        writer = ArchiveWriter(archive, about)
        for database in DATABASES:
            _add_database(writer, compose, postgres, database, file.parent)
            say(f"database {database}: dumped")
        if not elsewhere:
            _add_artifacts(writer, compose, mlflow)
        files = writer.seal()
    if elsewhere:
        say(f"artifacts are in {elsewhere.partition('?')[0]}, not in this backup")
    say(
        f"{file}: {files} files, {format_size(file.stat().st_size)}; put back with: launcher track restore {file}"
    )


@contextmanager
def _whole_or_nothing(file: Path) -> Iterator[IO[bytes]]:
    """Yield a new file beside FILE, which is renamed to FILE once it is complete and synced."""
    name = ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with open(handle, "wb") as output:
            yield output
            output.flush()
            os.fsync(handle)
        os.rename(name, file)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_full(error) or UsageError(
                f"{file}: cannot be written ({error.strerror}); name another place"
            ) from None
        raise


def _running(engine: DockerEngine, compose: Compose) -> tuple[Service, Service]:
    services = {service.name: service for service in engine.services(compose.config()["name"])}
    for name in ("postgres", "mlflow"):
        if name not in services or services[name].state != "running":
            raise EngineError(f"{name} is not up, and a backup asks it; start the servers: launcher track up")
    return services["postgres"], services["mlflow"]


def _add_database(
    writer: ArchiveWriter, compose: Compose, postgres: Service, database: str, folder: Path
) -> None:
    with tempfile.TemporaryFile(dir=folder) as dump:
        words = ["pg_dump", "--username=mlflow", "--format=custom", f"--dbname={database}"]
        done = subprocess.run(
            ["docker", "exec", postgres.id, *words],
            env=compose.environment,
            stdout=dump,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            raise EngineError(f"database {database}: {last_words(done.stderr)}")
        size = dump.seek(0, os.SEEK_END)
        dump.seek(0)
        writer.add(database_member(database), size, dump)


def _add_artifacts(writer: ArchiveWriter, compose: Compose, mlflow: Service) -> None:
    """Stream every file of the artifacts' volume into the archive: the disk may have no room for a second copy."""
    words = ["tar", "--create", "--hard-dereference", "--directory", FOLDER, "--file=-", "."]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(
            ["docker", "exec", mlflow.id, *words],
            env=compose.environment,
            stdout=subprocess.PIPE,
            stderr=said,
        ) as sender:
            assert sender.stdout is not None
            try:
                with tarfile.open(fileobj=sender.stdout, mode="r|") as archive:
                    for member in archive:
                        file = archive.extractfile(member) if member.isreg() else None
                        if file is not None and not is_left_over(member.name):
                            name = ARTIFACTS + member.name.removeprefix("./")
                            writer.add(name, member.size, file, member.mtime)
            except tarfile.TarError as error:
                sender.kill()
                said.seek(0)
                raise EngineError(f"artifacts: {last_words(said.read())} ({error})") from None
        if sender.returncode not in (0, _TAR_CHANGED):
            said.seek(0)
            raise EngineError(f"artifacts: {last_words(said.read())}")

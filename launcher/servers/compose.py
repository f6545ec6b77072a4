"""Docker Compose by its command line: find the project's file, and run the commands for the tracking servers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launcher.errors import EngineError
from launcher.hosts.processes import caller_ids
from starling.core.errors import UsageError
from starling.core.files.regular import is_file, open_regular
from starling.core.paths import at_home

FILE_NAME = "docker-compose.yml"
FILE_VARIABLE = "STARLING_COMPOSE_FILE"
PROJECT = "starling"
"""The `name:` in the file; COMPOSE_PROJECT_NAME overrides it, for Compose and for the launcher."""


def project_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of the servers' compose project."""
    return environment.get("COMPOSE_PROJECT_NAME") or PROJECT


def find_compose_file(given: Path | None, cwd: Path | None = None) -> Path:
    """Return the compose file: the given file, else the file beside the launcher's package, else the file in `cwd`.

    Raises UsageError if there is none.
    """
    if given is not None:
        path = at_home(given).absolute()
        if not path.is_file():
            raise UsageError(f"--compose-file {given}: no such file; it is the {FILE_NAME} of this project")
        return path
    beside = Path(__file__).resolve().parents[2] / FILE_NAME
    here = (cwd or Path.cwd()) / FILE_NAME
    for path in (beside, here):
        if is_file(path) and _begins(path, b"# Experiment tracking"):
            owner = path.stat().st_uid
            if path != beside and owner not in (0, os.getuid(), caller_ids()[0]):
                raise UsageError(
                    f"{path}: belongs to another user (uid {owner}), who would decide what runs on this machine; read it, "
                    f"and name it if you trust it: --compose-file {path}"
                )
            return path
    raise UsageError(
        f"no {FILE_NAME} of this project beside the launcher nor here; work in the project's folder, "
        f"or name the file: --compose-file PATH (or {FILE_VARIABLE})"
    )


def _begins(path: Path, words: bytes) -> bool:
    with open_regular(path) as file:
        return file.read(len(words)) == words


@dataclass(frozen=True, kw_only=True, slots=True)
class Compose:
    """A compose file with the selected profiles. Every method raises EngineError if the command fails."""

    file: Path
    profiles: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    """The environment variables with which Docker's client reaches the engine."""

    def words(self, *words: str) -> list[str]:
        """Return the whole command line."""
        profiles = [word for profile in self.profiles for word in ("--profile", profile)]
        return ["docker", "compose", "--file", str(self.file), "--ansi", "never", *profiles, *words]

    def read(self, *words: str) -> bytes:
        """Run a command of Compose and return its output."""
        return run(self.words(*words), self.environment)

    def docker(self, *words: str) -> str:
        """Run another command of Docker's client and return its output."""
        return run(["docker", *words], self.environment).decode()

    def show(self, *words: str) -> None:
        """Run a command of Compose, and show its output to the user."""
        if _call(self.words(*words), env=self.environment, stdin=subprocess.DEVNULL).returncode:
            raise EngineError(f"docker compose {words[0]} failed; its messages are above")

    def config(self) -> dict[str, Any]:
        """Return the file as Compose reads it, with settings filled in."""
        config: dict[str, Any] = json.loads(self.read("config", "--format", "json"))
        return config


def run(words: Sequence[str], environment: Mapping[str, str], stdin: IO[bytes] | None = None) -> bytes:
    """Run a command and return its output; raises EngineError with the last lines of its messages."""
    done = _call(
        words,
        env=environment,
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        raise EngineError(f"{' '.join(words[:2])}: {last_words(done.stderr)}")
    return done.stdout


def last_words(stderr: bytes) -> str:
    """Return the last lines of a failed command's messages, on one line."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "failed without a message"


def _call(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(words, check=False, **options)
    except OSError as error:
        raise EngineError(f"docker: cannot be run ({error.strerror}); install Docker's client") from None
    said = done.stderr or b""
    if done.returncode and (b"not a docker command" in said or b"unknown command: docker compose" in said):
        raise EngineError(
            "Docker has no Compose v2; install its plugin (Debian: docker-compose, or docker-compose-plugin)"
        )
    return done

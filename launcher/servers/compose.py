"""Docker Compose, by its command line: the project's file, and the few commands that the tracking servers need."""

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
"""The `name:` of the file; COMPOSE_PROJECT_NAME overrides it, for Compose and so for us."""


def project_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the compose project that the servers run as."""
    return environment.get("COMPOSE_PROJECT_NAME") or PROJECT


def find_compose_file(given: Path | None, cwd: Path | None = None) -> Path:
    """Return the compose file: the one given, the one beside the launcher's package, or the one in this folder.

    Raises UsageError when there is none.
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
    """One compose file with the profiles that are wanted. Every method raises EngineError for what Docker refuses."""

    file: Path
    profiles: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    """The variables under which Docker's client reaches the engine."""

    def words(self, *words: str) -> list[str]:
        """Return the whole command line."""
        profiles = [word for profile in self.profiles for word in ("--profile", profile)]
        return ["docker", "compose", "--file", str(self.file), "--ansi", "never", *profiles, *words]

    def read(self, *words: str) -> bytes:
        """Run a command of Compose and return what it prints."""
        return run(self.words(*words), self.environment)

    def docker(self, *words: str) -> str:
        """Run another command of Docker's client and return what it prints."""
        return run(["docker", *words], self.environment).decode()

    def show(self, *words: str) -> None:
        """Run a command whose output the user wants to see."""
        if _call(self.words(*words), env=self.environment, stdin=subprocess.DEVNULL).returncode:
            raise EngineError(f"docker compose {words[0]} failed; its own words stand above")

    def config(self) -> dict[str, Any]:
        """Return the file as Compose understands it, settings filled in."""
        config: dict[str, Any] = json.loads(self.read("config", "--format", "json"))
        return config


def run(words: Sequence[str], environment: Mapping[str, str], stdin: IO[bytes] | None = None) -> bytes:
    """Run a command and return what it prints; raises EngineError with its last words."""
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
    """Return the end of what a failed command said, on one line."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "failed without a word"


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

"""The request to `launcher up`: the options and the training arguments, read and checked without an engine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.engines.base import Mount
from launcher.options.training_args import TrainingArgs, check_local_trainer, prepare_args
from launcher.options.training_words import setting_of
from launcher.problems import Problems
from starling.core import package
from starling.core.budget import BudgetExceeded
from starling.core.errors import UsageError
from starling.core.files.regular import read_regular
from starling.core.paths import absolute
from starling.core.units import parse_size
from starling.core.utf8 import NotUtf8, text_of

if TYPE_CHECKING:
    from launcher.devices.inventory import Gpu
    from launcher.hosts.host import Host

DEFAULT_IMAGE = "starling:latest"
RUNS_IN_IMAGE = "/usr/src/app/runs"
TRAINER_IN_IMAGE = ("python", "/usr/src/app/train.py")
SUPERVISOR_IN_IMAGE = ("python", "-S", "/usr/src/app/supervise.py")

PASSED_NAMES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN", "STARLING_STUDY_PASSWORD_FILE")
PASSED_PREFIXES = ("CLEARML_", "MLFLOW_TRACKING_")
"""The caller's variables for trackers and the study's database; replicas always get them."""

_MOST_BYTES = 1 << 20
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrypoint:
    """How an engine starts the trainer: the commands, and where the trainer finds the runs folder."""

    trainer: tuple[str, ...]
    runs_inside: str
    isolated: bool
    """Whether replicas see only mounted paths, and their limits are enforced."""
    supervisor: tuple[str, ...] = ()
    """The command that starts the trainer and restarts it after a crash; empty: no restarts."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: str, runs: Path) -> Entrypoint:
        """Return the entrypoint for the engine of this name; raises UsageError if the trainer is not installed."""
        if engine != "local":
            return cls(
                trainer=TRAINER_IN_IMAGE,
                supervisor=SUPERVISOR_IN_IMAGE,
                runs_inside=RUNS_IN_IMAGE,
                isolated=True,
            )
        check_local_trainer()
        return cls(
            trainer=tuple(package.command("train")),
            supervisor=(sys.executable, "-S", "-P", "-m", "starling.supervise"),
            runs_inside=str(runs),
            isolated=False,
            environment={"PYTHONPATH": package.python_path()},
        )


@dataclass(frozen=True, slots=True)
class EnvFile:
    """A file of variables."""

    path: Path
    variables: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The user's request to `up`, parsed and with resolved paths, but not yet compared with the machine."""

    args: TrainingArgs
    runs: Path
    entrypoint: Entrypoint
    gpus: str | None = None
    cpus: int | None = None
    ddp: bool = False
    """Run one training on all devices."""
    force: bool = False
    """Use devices that others hold too."""
    recreate: bool = False
    """Stop an existing fleet and start it again."""
    build: bool = False
    """Build the image first."""
    memory_bytes: int | None = None
    shm_bytes: int | None = None
    image: str = DEFAULT_IMAGE
    network: str = "bridge"
    user: str = ""
    max_restarts: int = 3
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    env_files: tuple[EnvFile, ...] = ()
    """The files of `--env-file`; `passed` includes their variables."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Variables for the trainer that are not secret."""
    volumes: tuple[Mount, ...] = ()
    """Mounts besides the paths of the training arguments: volumes of the engine, and files with secrets."""

    def wants_gpus(self, gpus: Sequence[Gpu] | None) -> bool:
        """Return whether replicas get GPUs: `--gpus` is given, or the machine has GPUs and `--cpu` is not given."""
        return self.gpus is not None or (self.cpus is None and bool(gpus))


def read_request(
    options: Mapping[str, Any], host: Host, runs: Path, entrypoint: Entrypoint, own_flags: Collection[str]
) -> Request:
    """Return the options of `up` as a request; `own_flags` are the launcher's flags, which a trainer must not get.

    Raises all problems together.
    """
    problems = Problems()
    problems.check(host.check_runs, runs)
    args = problems.check(_read_training, options["training_args"], host, runs, entrypoint, own_flags)
    memory = problems.check(parse_size, options["memory"]) if options["memory"] else None
    shm = problems.check(parse_size, options["shm"], "--shm") if options["shm"] else None
    user = problems.check(host.replica_user, runs, options["user"]) if entrypoint.isolated else ""
    env_files = [
        EnvFile(absolute(path), problems.check(read_env_file, path, os.environ) or {})
        for path in options["env_files"]
    ]
    passed = problems.check(passed_variables, os.environ, options["env_names"], env_files)
    if args is None or problems.found:
        problems.refuse()
    return Request(
        args=args,
        runs=runs,
        entrypoint=entrypoint,
        memory_bytes=memory,
        shm_bytes=shm,
        image=options["image"] or DEFAULT_IMAGE,
        user=user or "",
        passed=passed or {},
        env_files=tuple(env_files),
        gpus=options["gpus"],
        cpus=options["cpus"],
        ddp=options["ddp"],
        force=options["force"],
        recreate=options["recreate"],
        build=options["build"],
        network=options["network"],
        max_restarts=options["max_restarts"],
    )


def _read_training(
    words: Sequence[str], host: Host, runs: Path, entrypoint: Entrypoint, own_flags: Collection[str]
) -> TrainingArgs:
    wrong = [word for word in words if word.split("=", 1)[0] in own_flags and setting_of(word) is None]
    if wrong:  # with `--dry-run` after `--`, a training would start
        raise UsageError(
            f"{', '.join(wrong)}: after `--`, where the trainer would get it; write the launcher's flags before `--`"
        )
    return prepare_args(
        words,
        cwd=host.files.start,
        runs=runs,
        runs_inside=entrypoint.runs_inside,
        isolated=entrypoint.isolated,
        files=host.files,
    )


def passed_variables(
    environment: Mapping[str, str],
    names: Sequence[str] = (),
    env_files: Sequence[EnvFile] = (),
) -> dict[str, str]:
    """Return the user's variables for replicas: the trackers' always, others by name or from files.

    Raises UsageError if a variable in `names` is not set.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
    }
    for file in env_files:
        passed.update(file.variables)
    for name in names:
        if "=" in name:
            raise UsageError(
                f"--env {name.split('=', 1)[0]}=…: give the name only and set the variable before; "
                "values on a command line can be read by every user of the machine"
            )
        if name not in environment:
            raise UsageError(f"--env {name}: is not set; export it first")
        passed[name] = environment[name]
    return passed


def read_env_file(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in a file of `NAME=value` lines, read as `docker run --env-file` does.

    A bare NAME takes the value from `environment`. Raises UsageError with the line; values are never shown.
    """
    try:
        lines = text_of(read_regular(path, _MOST_BYTES), path).splitlines()
    except OSError as error:
        raise UsageError(f"--env-file {path}: cannot be read ({error.strerror})") from None
    except BudgetExceeded as error:
        raise UsageError(f"--env-file {path}: holds {error}; name the file of NAME=value lines") from None
    except NotUtf8 as error:
        raise UsageError(f"--env-file {path}: {error}") from None
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, sign, value = line.strip().partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"{path}:{number}: not NAME=value; a name has letters, digits and '_'")
        if sign:
            variables[name] = value
        elif name in environment:
            variables[name] = environment[name]
    return variables

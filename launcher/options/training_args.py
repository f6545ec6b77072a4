"""Read from a training command line what the host needs: the run's project and name, and the paths."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from launcher.engines.base import Mount
from launcher.hosts.files import LOCAL, HostFiles
from launcher.options.training_files import MISSING, FileFinder, start_of_shipped_dataset
from launcher.options.training_words import TrainingWords
from launcher.problems import Problems
from starling.core.errors import CheckpointError, StarlingError, UsageError
from starling.core.paths import at_home, path_problem
from starling.core.settings.train import TrainCommand, TrainConfig, parse_args
from starling.core.words import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingArgs:
    """A training command line, rewritten to work inside a replica."""

    words: tuple[str, ...]
    command: TrainCommand
    """The words, parsed as the trainer parses them."""
    mounts: tuple[Mount, ...]
    project: str
    name: str
    reads: Mapping[Path, type[StarlingError]] = field(default_factory=dict)
    """The files and folders of images that the training opens, each with the error to raise if it is missing."""
    start: Path | None = None
    """The folder in which the dataset's root was found, if the YAML alone does not determine it."""

    @property
    def fleet(self) -> str:
        """`project/name`, the same for every worker of one search."""
        return f"{self.project}/{self.name}"


def prepare_args(
    words: Sequence[str],
    *,
    cwd: Path,
    runs: Path,
    runs_inside: str,
    isolated: bool,
    files: HostFiles = LOCAL,
) -> TrainingArgs:
    """Expand and check the paths that a training command names, and list the mounts for them.

    `runs_inside` is the runs folder inside replicas; `isolated` means that replicas see only mounted paths; `files`
    are the files of the replicas' machine.
    Raises DataError, CheckpointError or UsageError for a path that does not exist.
    """
    if not words:
        raise UsageError(
            "no training arguments: give them after `--`, such as "
            "-- --data bccd.yaml --weights '' --cfg yolov5n.yaml --evolve 60"
        )
    values = TrainingWords(words)
    _refuse_password(values)
    command = parse_args(words)
    config = command.config
    _refuse_queue(config.remote)
    found = _find_files(values, FileFinder(cwd, files, isolated))
    _place_resume(values, config.resume, cwd, runs, runs_inside, files)
    project = _project(values, config, runs)
    for option, given in (("--project", project), ("--name", config.run_name)):
        problem = path_problem(given)
        if problem:
            raise UsageError(f"{option} {shown(given, 60)}: {problem}; give a shorter name")
    _refuse_link_out("--project", runs / project / config.run_name, runs, files)
    return TrainingArgs(
        words=values.words,
        command=command,
        mounts=_outermost(found.mounts),
        project=project,
        name=config.run_name,
        reads=found.reads,
        start=found.start,
    )


@dataclass(slots=True)
class _Found:
    """The mounts and read paths of the files of a command line, and the folder for the dataset's root."""

    mounts: list[Mount] = field(default_factory=list)
    reads: dict[Path, type[StarlingError]] = field(default_factory=dict)
    start: Path | None = None


def _find_files(values: TrainingWords, finder: FileFinder) -> _Found:
    """Find every file that a setting names, and make its path absolute in the words; raises all problems together."""
    found, problems = _Found(), Problems()
    for setting, error in MISSING.items():
        given = values.get(setting)
        named = problems.check(finder.find, setting, given) if given else None
        if named is not None:
            values.set(setting, str(named.path))
            found.mounts += [Mount(source=str(item), target=str(item)) for item in (named.path, *named.shown)]
            found.reads |= dict.fromkeys((named.path, *named.opened), error)
            found.start = named.start or found.start
    problems.raise_any()
    data = values.get("data")
    if data and not finder.isolated and Path(data) not in found.reads:
        found.start = start_of_shipped_dataset(data, finder.cwd) or found.start
    return found


def _refuse_password(values: TrainingWords) -> None:
    """Raise UsageError for a URL with a password: `docker inspect` would show it in the container's command."""
    study = values.get("study") or ""
    if re.search(r"^\w+://[^/?#]*:[^/?#]*@|[?&][^=&]*pass[^=&]*=", study, re.IGNORECASE):
        raise UsageError(
            "--study: holds a password, which would appear in the container's command; take it out of the URL and give "
            "it by STARLING_STUDY_PASSWORD_FILE=FILE, which replicas always get, or by --env PGPASSWORD"
        )


def _refuse_queue(queue: str) -> None:
    """Raise UsageError for `--remote`: each replica would put one training into the queue, and train nothing itself."""
    if queue:
        raise UsageError(
            f"--remote {queue}: puts a training into a ClearML queue for an agent, and each replica would put one more; "
            f"queue it once, without the launcher: python train.py … --remote {queue}"
        )


def check_local_trainer() -> None:
    """Raise UsageError if the packages of the trainer are not installed in the launcher's Python."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "--engine local: the trainer's packages are not installed here (there is no torch); "
            "pip install -r requirements.txt, or use --engine docker"
        )


def _place_resume(
    values: TrainingWords, given: str, cwd: Path, runs: Path, runs_inside: str, files: HostFiles
) -> None:
    """Rewrite `--resume PATH` to the path inside replicas, in the writable runs folder, where the run goes on."""
    if given in ("", "latest"):
        return
    path = files.expand(cwd, given)
    if not files.is_file(path):
        raise CheckpointError(f"--resume {given}: no such checkpoint; give a last.pt below {runs}")
    if not path.is_relative_to(runs):
        raise UsageError(
            f"--resume {given}: lies outside the runs folder {runs}; give its runs folder with --runs"
        )
    _refuse_link_out("--resume", path, runs, files)
    values.set("resume", str(PurePosixPath(runs_inside) / path.relative_to(runs).as_posix()))


def _project(values: TrainingWords, config: TrainConfig, runs: Path) -> str:
    """Return the project relative to the runs folder; an absolute `--project` is also rewritten in the words."""
    given = config.run_project
    path = at_home(given)
    if path.is_absolute():
        if not path.is_relative_to(runs) or path == runs:
            raise UsageError(
                f"--project {given}: lies outside the runs folder {runs}; give a name, or another --runs"
            )
        given = path.relative_to(runs).as_posix()
        values.set("project", given)
    parts = [part for part in PurePosixPath(given).parts if part != "."]
    if parts and parts[0] == "runs":
        parts = parts[1:]
    if not parts or ".." in parts:
        raise UsageError(f"--project {given}: must name a folder below the runs folder {runs}")
    return "/".join(parts)


def _refuse_link_out(option: str, path: Path, runs: Path, files: HostFiles) -> None:
    """Raise UsageError if a link leads a path below the runs folder out of the runs folder."""
    real = files.real(path)
    if real != path and not real.is_relative_to(files.real(runs)):
        raise UsageError(
            f"{option}: {path} leads through a link to {real}, outside the runs folder; remove the link, or give another name"
        )


def _outermost(mounts: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return the mounts without those that another mount covers."""
    kept: list[Mount] = []
    for mount in sorted(set(mounts), key=lambda item: (len(PurePosixPath(item.source).parts), item.source)):
        if not any(PurePosixPath(mount.source).is_relative_to(other.source) for other in kept):
            kept.append(mount)
    return tuple(kept)

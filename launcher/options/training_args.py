"""Read a training command line as far as the host must: which paths it names, which run it is."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from launcher.engines.base import Mount
from launcher.hosts.files import LOCAL, HostFiles
from launcher.options.space_yaml import space_layouts
from launcher.options.training_files import read_dataset, start_of_shipped
from launcher.problems import Problems
from starling.core import package
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError, suggest
from starling.core.misplaced import misplaced
from starling.core.paths import at_home, path_problem
from starling.core.settings.train import COMMAND, TrainCommand, TrainConfig, parse_args
from starling.core.words import shown

_SHIPPED_FOLDER = {"cfg": "layouts", "data": "datasets", "hyp": "hyps", "space": "spaces"}
_MISSING: dict[str, type[StarlingError]] = {
    "data": DataError,
    "weights": CheckpointError,
    "hyp": UsageError,
    "cfg": UsageError,
    "space": UsageError,
    "hooks": UsageError,
}
"""The settings whose values are files, and the error that the lack of each is."""
_PUBLISHED = re.compile(r"yolov5[nsmlx]6?(\.pt)?")
"""Bare names of weights that the trainer can fetch."""
_IMAGE_ROOT = PurePosixPath("/usr/src")
"""Paths below it are the image's own; the host has no say in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingArgs:
    """A training command line, made to mean the same inside a replica."""

    words: tuple[str, ...]
    command: TrainCommand
    """What the trainer makes of the words."""
    mounts: tuple[Mount, ...]
    project: str
    name: str
    reads: Mapping[Path, type[StarlingError]] = field(default_factory=dict)
    """What the training opens, its files and the folders of its pictures, each with the error that the lack of it is."""
    start: Path | None = None
    """Where the dataset's root is looked for, if the YAML alone does not tell."""

    @property
    def fleet(self) -> str:
        """`project/name`: every worker of one search names the same two."""
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
    """Expand and check the paths that a training command names, and list the mounts they need.

    `runs_inside` is the runs folder as replicas see it; `isolated` says that replicas see only what is mounted; `files`
    are those of the machine that they run on.
    Raises DataError, CheckpointError or UsageError for something that is not there.
    """
    if not words:
        raise UsageError(
            "no training arguments: give them after `--`, such as "
            "-- --data bccd.yaml --weights '' --cfg yolov5n.yaml --evolve 60"
        )
    _refuse_password(words)
    command = parse_args(words)
    config = command.config
    _refuse_queue(config.remote)
    values = _Words(words)
    mounts, reads, start = _take_paths(values, config, cwd, isolated, files)
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
        mounts=_outermost(mounts),
        project=project,
        name=config.run_name,
        reads=reads,
        start=start,
    )


def _take_paths(
    values: _Words, config: TrainConfig, cwd: Path, isolated: bool, files: HostFiles
) -> tuple[list[Mount], dict[Path, type[StarlingError]], Path | None]:
    """Make the host's paths absolute; return the mounts that they need, what training opens, and where it starts.

    Raises all refusals together.
    """
    mounts: list[Mount] = []
    reads: dict[Path, type[StarlingError]] = {}
    start: Path | None = None
    problems = Problems()
    for setting in _MISSING:
        path = problems.check(_take_path, setting, values, cwd, isolated, files)
        named = path and problems.check(_named_by, setting, path, cwd, files)
        if path and named:
            mounts += [Mount(source=str(item), target=str(item)) for item in (path, *named.shown)]
            reads |= dict.fromkeys((path, *named.opened), _MISSING[setting])
            start = named.start or start
    problems.raise_any()
    shipped = None if isolated else _shipped_dataset(values.get("data"), reads)
    return mounts, reads, start_of_shipped(shipped, cwd) if shipped else start


def _take_path(setting: str, values: _Words, cwd: Path, isolated: bool, files: HostFiles) -> Path | None:
    """Return the host's file that a setting names, and make the word absolute; None for anything else."""
    given = values.get(setting)
    if not given:
        return None
    try:
        path = _existing(setting, given, cwd, isolated, files)
    except PermissionError as error:
        raise _MISSING[setting](
            f"--{setting} {given}: you may not look at {error.filename}; ask its owner, or give another path"
        ) from None
    if path is not None:
        values.set(setting, str(path))
    return path


class _Named(NamedTuple):
    """What else a file names: what replicas must see, what of that the training opens, and where it was looked for."""

    shown: tuple[Path, ...] = ()
    opened: tuple[Path, ...] = ()
    start: Path | None = None


def _named_by(setting: str, path: Path, cwd: Path, files: HostFiles) -> _Named:
    if setting == "data":
        dataset = read_dataset(path, files, cwd)
        return _Named(dataset.folders, dataset.splits, dataset.start)
    layouts = space_layouts(path, files) if setting == "space" else ()
    return _Named(layouts, layouts)


def _refuse_password(words: Sequence[str]) -> None:
    """Refuse a URL with a password before it stands in a container's command, where `docker inspect` shows it."""
    study = _Words(words).get("study") or ""
    if re.search(r"^\w+://[^/?#]*:[^/?#]*@|[?&][^=&]*pass[^=&]*=", study, re.IGNORECASE):
        raise UsageError(
            "--study: holds a password, which would stand in the container's command; take it out of the URL and give "
            "it by STARLING_STUDY_PASSWORD_FILE=FILE, which replicas get by themselves, or by --env PGPASSWORD"
        )


def _refuse_queue(queue: str) -> None:
    """Refuse what puts one training into a queue: each replica would put its own, and train nothing."""
    if queue:
        raise UsageError(
            f"--remote {queue}: puts a training into a ClearML queue for an agent, and each replica would put one more; "
            f"queue it once, without the launcher: python train.py … --remote {queue}"
        )


def check_local_trainer() -> None:
    """Raise UsageError where the packages of the trainer are not installed beside the launcher."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "--engine local: the trainer's packages are not installed here (there is no torch); "
            "pip install -r requirements.txt, or use --engine docker"
        )


class _Words:
    """A command line whose settings can be read and replaced; the last of two words for one setting counts."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self._words)

    def get(self, setting: str) -> str | None:
        """Return the value given for a setting; None where there is none."""
        at = self._find(setting)
        if at is None:
            return None
        if "=" in self._words[at]:
            return self._words[at].split("=", 1)[1]
        following = self._words[at + 1] if at + 1 < len(self._words) else None
        return None if following is None or following.startswith("--") else following

    def set(self, setting: str, value: str) -> None:
        """Replace the value given for a setting."""
        at = self._find(setting)
        assert at is not None
        if "=" in self._words[at]:
            self._words[at] = self._words[at].split("=", 1)[0] + "=" + value
        else:
            self._words[at + 1] = value

    def _find(self, setting: str) -> int | None:
        """Return the place of the last word that is a flag of the setting, by whatever spelling or prefix."""
        places = [at for at, word in enumerate(self._words) if means(word) == setting]
        return places[-1] if places else None


def means(word: str) -> str | None:
    """Return the setting of training that a word is a flag of; None for a value and for an unknown flag."""
    declared = COMMAND.setting_of(word.split("=", 1)[0])
    return None if declared is None else declared.field


def _existing(setting: str, given: str, cwd: Path, isolated: bool, files: HostFiles) -> Path | None:
    """Return the absolute path of a file of the host, or None for one that the trainer brings or fetches."""
    if "://" in given:
        return None
    path = files.expand(cwd, given)
    if files.is_file(path):
        if not files.remote and (wrong := _misplaced(setting, path)):
            raise _MISSING[setting](f"--{setting} {given}: {wrong}")
        return path
    if setting == "weights" and files.is_file(path.with_name(f"{path.name}.pt")):
        return path.with_name(f"{path.name}.pt")  # `yolov5s` means `yolov5s.pt`
    if setting == "weights" and _PUBLISHED.fullmatch(given):
        return _kept_weights(given, files)
    known = _shipped(setting)
    name = PurePosixPath(given).name
    if {name, f"{name}.yaml"} & set(known) and not (path.is_absolute() and given.startswith(("~", "/home"))):
        return None
    if isolated and PurePosixPath(given).is_relative_to(_IMAGE_ROOT):
        return None
    if not files.remote and (wrong := _misplaced(setting, path)):
        raise _MISSING[setting](f"--{setting} {given}: {wrong}")
    hint = suggest(name, known)
    remedy = {
        "data": "give the path of a dataset YAML",
        "weights": "give the path of a checkpoint, or --weights '' to train from scratch",
        "hooks": "give the path of a Python file",
    }.get(setting, f"give a path, or one of: {', '.join(sorted(known))}")
    where = f" on the remote machine ({path})" if files.remote else ""
    raise _MISSING[setting](f"--{setting} {given}: no such file{where}{hint}; {remedy}")


def _misplaced(setting: str, path: Path) -> str | None:
    return None if setting == "hooks" else misplaced(f"--{setting}", path)


def _kept_weights(given: str, files: HostFiles) -> Path:
    """Return published weights as the trainer keeps them on this host; replicas have no folder to keep them in."""
    name = given if given.endswith(".pt") else f"{given}.pt"
    folder = files.home / ".cache" / "starling" / "weights"
    if not files.remote:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or files.home / ".cache")
        folder = Path(os.environ.get("STARLING_WEIGHTS") or cache / "starling" / "weights")
        folder = at_home(folder).absolute()
    if files.is_file(folder / name):
        return folder / name
    raise CheckpointError(
        f"--weights {given}: neither here nor in {folder}; fetch it once for all replicas: "
        f"starling data download {name}"
    )


def _shipped(setting: str) -> list[str]:
    """Return the names of the YAML files that the trainer carries for this setting."""
    if setting not in _SHIPPED_FOLDER:
        return []
    return [path.name for path in _shipped_folder(setting).glob("*.yaml")]


def _shipped_folder(setting: str) -> Path:
    return package.PARENT / "starling" / "config" / _SHIPPED_FOLDER[setting]


def _shipped_dataset(given: str | None, found: Collection[Path]) -> Path | None:
    """Return the description that the trainer carries, where `--data` names none of the files that were found."""
    if not given or Path(given) in found or "://" in given:
        return None
    name = PurePosixPath(given).name
    path = _shipped_folder("data") / (name if name in _shipped("data") else f"{name}.yaml")
    return path if path.is_file() else None


def _place_resume(
    values: _Words, given: str, cwd: Path, runs: Path, runs_inside: str, files: HostFiles
) -> None:
    """Point `--resume PATH` at the writable runs folder, where the run goes on."""
    if given in ("", "latest"):
        return
    path = files.expand(cwd, given)
    if not files.is_file(path):
        raise CheckpointError(f"--resume {given}: no such checkpoint; give a last.pt below {runs}")
    if not path.is_relative_to(runs):
        raise UsageError(
            f"--resume {given}: lies outside the runs folder {runs}; say --runs with the folder it is in"
        )
    _refuse_link_out("--resume", path, runs, files)
    values.set("resume", str(PurePosixPath(runs_inside) / path.relative_to(runs).as_posix()))


def _project(values: _Words, config: TrainConfig, runs: Path) -> str:
    """Return the project below the runs folder, and rewrite an absolute one to be relative to it."""
    given = config.run_project
    path = at_home(given)
    if path.is_absolute():
        if not path.is_relative_to(runs) or path == runs:
            raise UsageError(
                f"--project {given}: lies outside the runs folder {runs}; give a name, or say --runs"
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
    """Raise UsageError for a path below the runs folder that a link on the way takes out of it."""
    real = files.real(path)
    if real != path and not real.is_relative_to(files.real(runs)):
        raise UsageError(
            f"{option}: {path} leads by a link to {real}, outside the runs folder; remove the link, or give another name"
        )


def _outermost(mounts: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return the mounts without those that another one already covers."""
    kept: list[Mount] = []
    for mount in sorted(set(mounts), key=lambda item: (len(PurePosixPath(item.source).parts), item.source)):
        if not any(PurePosixPath(mount.source).is_relative_to(other.source) for other in kept):
            kept.append(mount)
    return tuple(kept)


def place_beside(words: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Make relative paths among training arguments start at `folder`; names of what the trainer brings stay."""
    values = _Words(words)
    for setting in (*_MISSING, "resume"):
        given = values.get(setting)
        if given and "://" not in given and not given.startswith(("~", "/")):
            path = folder / given
            if "/" in given or path.exists():
                values.set(setting, str(path))
    return values.words


def without_overridden(words: Sequence[str], winners: Sequence[str]) -> tuple[str, ...]:
    """Return `words` less the flags, with their values, of settings that `winners` give too."""
    given = {means(word) for word in winners if word.startswith("--")} - {None}
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = means(word) in given
        if not dropping:
            kept.append(word)
    return tuple(kept)

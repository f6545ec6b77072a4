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
from launcher.hosts.host_files import LOCAL, HostFiles
from launcher.plan.dataset_yaml import read_dataset, start_of_shipped
from launcher.plan.space_yaml import space_layouts
from launcher.problems import Problems
from starling.core import package
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError, suggest
from starling.core.misplaced import misplaced
from starling.core.paths import at_home, path_problem
from starling.core.words import shown

_SHORTEST = {
    "--weights": "--we",
    "--cfg": "--cf",
    "--data": "--da",
    "--hyp": "--hy",
    "--hooks": "--ho",
    "--project": "--pro",
    "--name": "--na",
    "--device": "--dev",
    "--batch-size": "--ba",
    "--evolve": "--ev",
    "--space": "--sp",
    "--resume": "--re",
    "--study": "--stu",
    "--remote": "--rem",
}
"""The options read here, and the shortest prefix of each that `train.py` takes for it."""

DEFAULT_BATCH = 16
"""The trainer's own, when `--batch-size` is not given."""

_TAKES_NO_VALUE = {"--evolve": True, "--resume": True}
"""Options whose value may be left out."""

_SHIPPED_FOLDER = {"--cfg": "layouts", "--data": "datasets", "--hyp": "hyps", "--space": "spaces"}
_MISSING: dict[str, type[StarlingError]] = {
    "--data": DataError,
    "--weights": CheckpointError,
    "--hyp": UsageError,
    "--cfg": UsageError,
    "--space": UsageError,
    "--hooks": UsageError,
}
_PUBLISHED = re.compile(r"yolov5[nsmlx]6?(\.pt)?")
"""Bare names of weights that the trainer can fetch."""
_IMAGE_ROOT = PurePosixPath("/usr/src")
"""Paths below it are the image's own; the host has no say in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingArgs:
    """A training command line, made to mean the same inside a replica."""

    words: tuple[str, ...]
    mounts: tuple[Mount, ...]
    project: str
    name: str
    evolve: bool
    device: str | None
    reads: Mapping[Path, type[StarlingError]] = field(default_factory=dict)
    """What the training opens, its files and the folders of its pictures, each with the error that the lack of it is."""
    study: str | None = None
    """Where the search keeps its study: a database's URL, without a password; None for the journal in the runs folder."""
    batch: int | None = None
    """Pictures in one iteration over all devices; None where it is a checkpoint's, or not a number."""
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
    values = _Words(words)
    study = values.get("--study")
    _refuse_password(study or "")
    _refuse_queue(values)
    mounts, reads, start = _take_paths(values, cwd, isolated, files)
    _place_resume(values, cwd, runs, runs_inside, files)
    evolve = values.has("--evolve")
    project = _project(values, runs, "evolve" if evolve else "train")
    name = values.get("--name") or "exp"
    if "/" in name or name in (".", ".."):
        raise UsageError(f"--name {name}: must be one folder name, without '/' or '..'")
    for option, given in (("--project", project), ("--name", name)):
        problem = path_problem(given)
        if problem:
            raise UsageError(f"{option} {shown(given, 60)}: {problem}; give a shorter name")
    _refuse_link_out("--project", runs / project / name, runs, files)
    return TrainingArgs(
        words=values.words,
        mounts=_outermost(mounts),
        project=project,
        name=name,
        evolve=evolve,
        device=values.get("--device"),
        reads=reads,
        study=study,
        batch=_batch(values),
        start=start,
    )


def _take_paths(
    values: _Words, cwd: Path, isolated: bool, files: HostFiles
) -> tuple[list[Mount], dict[Path, type[StarlingError]], Path | None]:
    """Make the host's paths absolute; return the mounts that they need, what training opens, and where it starts.

    Raises all refusals together.
    """
    mounts: list[Mount] = []
    reads: dict[Path, type[StarlingError]] = {}
    start: Path | None = None
    problems = Problems()
    for option in _MISSING:
        path = problems.check(_take_path, option, values, cwd, isolated, files)
        named = path and problems.check(_named_by, option, path, cwd, files)
        if path and named:
            mounts += [Mount(source=str(item), target=str(item)) for item in (path, *named.shown)]
            reads |= dict.fromkeys((path, *named.opened), _MISSING[option])
            start = named.start or start
    problems.raise_any()
    shipped = None if isolated else _shipped_dataset(values.get("--data"), reads)
    return mounts, reads, start_of_shipped(shipped, cwd) if shipped else start


def _take_path(option: str, values: _Words, cwd: Path, isolated: bool, files: HostFiles) -> Path | None:
    """Return the host's file that an option names, and make the word absolute; None for anything else."""
    given = values.get(option)
    if not given:
        return None
    try:
        path = _existing(option, given, cwd, isolated, files)
    except PermissionError as error:
        raise _MISSING[option](
            f"{option} {given}: you may not look at {error.filename}; ask its owner, or give another path"
        ) from None
    if path is not None:
        values.set(option, str(path))
    return path


class _Named(NamedTuple):
    """What else a file names: what replicas must see, what of that the training opens, and where it was looked for."""

    shown: tuple[Path, ...] = ()
    opened: tuple[Path, ...] = ()
    start: Path | None = None


def _named_by(option: str, path: Path, cwd: Path, files: HostFiles) -> _Named:
    if option == "--data":
        dataset = read_dataset(path, files, cwd)
        return _Named(dataset.folders, dataset.splits, dataset.start)
    layouts = space_layouts(path, files) if option == "--space" else ()
    return _Named(layouts, layouts)


def _batch(values: _Words) -> int | None:
    """Return the batch as far as the host can tell; the trainer is the judge of what is no number."""
    given = values.get("--batch-size")
    if given is None:
        return None if values.has("--resume") else DEFAULT_BATCH
    return int(given) if re.fullmatch(r"-?[0-9]{1,9}", given) else None


def _refuse_password(study: str) -> None:
    """Refuse a URL with a password before it stands in a container's command, where `docker inspect` shows it."""
    if re.search(r"^\w+://[^/?#]*:[^/?#]*@|[?&][^=&]*pass[^=&]*=", study, re.IGNORECASE):
        raise UsageError(
            "--study: holds a password, which would stand in the container's command; take it out of the URL and give "
            "it by STARLING_STUDY_PASSWORD_FILE=FILE, which replicas get by themselves, or by --env PGPASSWORD"
        )


def _refuse_queue(values: _Words) -> None:
    """Refuse what puts one training into a queue: each replica would put its own, and train nothing."""
    if queue := values.get("--remote"):
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
    """A command line whose options can be read and replaced; the last of two equal options counts."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self._words)

    def has(self, option: str) -> bool:
        return self._find(option) is not None

    def get(self, option: str) -> str | None:
        """Return the option's value; None when it or its value is absent."""
        at = self._find(option)
        if at is None:
            return None
        if "=" in self._words[at]:
            return self._words[at].split("=", 1)[1]
        following = self._words[at + 1] if at + 1 < len(self._words) else None
        if following is None or following.startswith("--"):
            if option in _TAKES_NO_VALUE:
                return None
            raise UsageError(f"{self._words[at]}: needs a value after it")
        return following

    def set(self, option: str, value: str) -> None:
        at = self._find(option)
        assert at is not None
        if "=" in self._words[at]:
            self._words[at] = self._words[at].split("=", 1)[0] + "=" + value
        else:
            self._words[at + 1] = value

    def _find(self, option: str) -> int | None:
        shortest = _SHORTEST[option]
        found = None
        for at, word in enumerate(self._words):
            name = word.split("=", 1)[0]
            if name.startswith(shortest) and option.startswith(name):
                found = at
        return found


def _existing(option: str, given: str, cwd: Path, isolated: bool, files: HostFiles) -> Path | None:
    """Return the absolute path of a file of the host, or None for one that the trainer brings or fetches."""
    if "://" in given:
        return None
    path = files.expand(cwd, given)
    if files.is_file(path):
        if files is LOCAL and (wrong := _misplaced(option, path)):
            raise _MISSING[option](f"{option} {given}: {wrong}")
        return path
    if option == "--weights" and files.is_file(path.with_name(f"{path.name}.pt")):
        return path.with_name(f"{path.name}.pt")  # `yolov5s` means `yolov5s.pt`
    if option == "--weights" and _PUBLISHED.fullmatch(given):
        return _kept_weights(given, files)
    known = _shipped(option)
    name = PurePosixPath(given).name
    if {name, f"{name}.yaml"} & set(known) and not (path.is_absolute() and given.startswith(("~", "/home"))):
        return None
    if isolated and PurePosixPath(given).is_relative_to(_IMAGE_ROOT):
        return None
    if files is LOCAL and (wrong := _misplaced(option, path)):
        raise _MISSING[option](f"{option} {given}: {wrong}")
    hint = suggest(name, known)
    remedy = {
        "--data": "give the path of a dataset YAML",
        "--weights": "give the path of a checkpoint, or --weights '' to train from scratch",
        "--hooks": "give the path of a Python file",
    }.get(option, f"give a path, or one of: {', '.join(sorted(known))}")
    where = "" if files is LOCAL else f" on the remote machine ({path})"
    raise _MISSING[option](f"{option} {given}: no such file{where}{hint}; {remedy}")


def _misplaced(option: str, path: Path) -> str | None:
    return None if option == "--hooks" else misplaced(option, path)


def _kept_weights(given: str, files: HostFiles) -> Path:
    """Return published weights as the trainer keeps them on this host; replicas have no folder to keep them in."""
    name = given if given.endswith(".pt") else f"{given}.pt"
    folder = files.home / ".cache" / "starling" / "weights"
    if files is LOCAL:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or files.home / ".cache")
        folder = Path(os.environ.get("STARLING_WEIGHTS") or cache / "starling" / "weights")
        folder = at_home(folder).absolute()
    if files.is_file(folder / name):
        return folder / name
    raise CheckpointError(
        f"--weights {given}: neither here nor in {folder}; fetch it once for all replicas: "
        f"starling data download {name}"
    )


def _shipped(option: str) -> list[str]:
    """Return the names of the YAML files that the trainer carries for this option."""
    if option not in _SHIPPED_FOLDER:
        return []
    return [path.name for path in _shipped_folder(option).glob("*.yaml")]


def _shipped_folder(option: str) -> Path:
    return package.PARENT / "starling" / "config" / _SHIPPED_FOLDER[option]


def _shipped_dataset(given: str | None, found: Collection[Path]) -> Path | None:
    """Return the description that the trainer carries, where `--data` names none of the files that were found."""
    if not given or Path(given) in found or "://" in given:
        return None
    name = PurePosixPath(given).name
    path = _shipped_folder("--data") / (name if name in _shipped("--data") else f"{name}.yaml")
    return path if path.is_file() else None


def _place_resume(values: _Words, cwd: Path, runs: Path, runs_inside: str, files: HostFiles) -> None:
    """Point `--resume PATH` at the writable runs folder, where the run goes on."""
    given = values.get("--resume")
    if not given or given == "latest":
        return
    path = files.expand(cwd, given)
    if not files.is_file(path):
        raise CheckpointError(f"--resume {given}: no such checkpoint; give a last.pt below {runs}")
    if not path.is_relative_to(runs):
        raise UsageError(
            f"--resume {given}: lies outside the runs folder {runs}; say --runs with the folder it is in"
        )
    _refuse_link_out("--resume", path, runs, files)
    values.set("--resume", str(PurePosixPath(runs_inside) / path.relative_to(runs).as_posix()))


def _project(values: _Words, runs: Path, default: str) -> str:
    """Return the project below the runs folder, and rewrite an absolute one to be relative to it."""
    given = values.get("--project")
    if not given:
        return default
    path = at_home(given)
    if path.is_absolute():
        if not path.is_relative_to(runs) or path == runs:
            raise UsageError(
                f"--project {given}: lies outside the runs folder {runs}; give a name, or say --runs"
            )
        given = path.relative_to(runs).as_posix()
        values.set("--project", given)
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
    for option in (*_MISSING, "--resume"):
        given = values.get(option)
        if given and "://" not in given and not given.startswith(("~", "/")):
            path = folder / given
            if "/" in given or path.exists():
                values.set(option, str(path))
    return values.words

"""Resume the unfinished run of a replica that its supervisor or `launcher up` starts again."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starling.config.hyp import Hyp
from starling.core.errors import CheckpointError, UsageError
from starling.core.paths import real_path
from starling.core.settings.train import AUTO_BATCH, RESUMABLE, TrainCommand, TrainConfig
from starling.core.worker_status import FOLDER, unfinished_run
from starling.model.checkpoint import load_newest
from starling.outputs.run_dir import RunDir, project_dir, runs_root
from starling.progress import quiet

logger = logging.getLogger(__name__)

FREE = RESUMABLE - {"data"} | {"name"}
"""Fields that may differ between the run and the command; a run's folder is `name2` if `name` was taken."""


def go_on(
    command: TrainCommand,
    hyp: Callable[[TrainConfig], Hyp],
    environment: Mapping[str, str] = os.environ,
) -> TrainCommand:
    """Return a command that resumes this replica's own unfinished run; `command` itself if there is no such run.

    Only replicas of the launcher (`$STARLING_REPLICA`) resume, and only a run of the same command: with the same seed
    the resumed run ends with the weights of a new run. If all epochs are done, the resume only finishes the run. A run
    without a checkpoint begins again in its folder.
    """
    replica = environment.get("STARLING_REPLICA")
    if not replica or command.config.resume or command.config.evolve:
        return command
    root = runs_root(environment)
    run = _own_run(root / FOLDER / f"{replica}.json", command.config, root)
    if run is None:
        return command
    if not any(path.exists() for path in (run.last, run.previous)):
        if run.weights.is_dir() and any(run.weights.glob("*.pt")):
            return command
        config = replace(command.config, name=run.path.name, exist_ok=True)
        return replace(command, config=config, given=command.given | {"name", "exist_ok"})
    try:
        with quiet():
            state, _ = load_newest(run.last)
    except CheckpointError as error:
        logger.warning(f"{error}; starting anew")
        return command
    if not _is_same(state, command.config, hyp):
        return command
    config = replace(command.config, resume=str(run.last))
    return replace(command, config=config, given=(command.given & FREE) - {"name"} | {"resume"}, goes_on=True)


def _own_run(status: Path, config: TrainConfig, root: Path) -> RunDir | None:
    """Return the run that the status file names, if the run lies in the project folder of this command."""
    named = unfinished_run(status)
    if named is None:
        return None
    path = Path(named)
    try:
        at_home = real_path(path.parent) == real_path(project_dir(config.run_project, root))
    except UsageError:
        return None
    called = re.fullmatch(re.escape(config.run_name) + r"([1-9]\d*)?", path.name)
    return RunDir(path) if at_home and called and path.is_dir() and not path.is_symlink() else None


def _is_same(state: Mapping[str, Any], config: TrainConfig, hyp: Callable[[TrainConfig], Hyp]) -> bool:
    """Return whether the checkpoint belongs to the training that the command asks for."""
    try:
        saved = TrainConfig.from_mapping(state["config"])
        saved_hyp = Hyp.from_mapping(state["hyp"], "the checkpoint")
    except (KeyError, TypeError, UsageError):
        return False
    free = FREE | ({"batch_size"} if config.batch_size == AUTO_BATCH else set())
    alike = replace(config, **{field: getattr(saved, field) for field in free}) == saved
    return state.get("kind") == "resumable" and alike and saved_hyp == hyp(config)

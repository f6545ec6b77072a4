"""User functions that a training calls at its events: they add or change metrics, send artifacts, print lines.

    # my_hooks.py, given by `--hooks my_hooks.py` or by STARLING_HOOKS
    def on_fit_epoch_end(training):
        training.metrics["lr_ratio"] = training.metrics["x/lr0"] / training.metrics["x/lr2"]

    # in Python, before starling.cli.train.main(...)
    from starling.training.reporting import hooks
    hooks.add("on_train_end", lambda training: training.log_artifact("notes.txt"))

If a hook raises, the training goes on and prints one warning with the file and line of the error.
"""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling.config.hyp import Hyp
from starling.core.errors import UsageError, suggest
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import readable
from starling.core.paths import at_home, real_path
from starling.core.settings.train import TrainConfig
from starling.outputs.run_dir import RunDir, folder_below

logger = logging.getLogger(__name__)

NAMES = (
    "on_pretrain_routine_start",
    "on_pretrain_routine_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_val_start",
    "on_val_end",
    "on_model_save",
    "on_fit_epoch_end",
    "on_train_end",
    "teardown",
)
"""Events in the order of a training; `on_fit_epoch_end` comes before the epoch's metrics are logged."""

VARIABLE = "STARLING_HOOKS"
_FOLDER = "artifacts"
"""Subfolder of the run directory for copies of files that a hook logs from outside the run directory."""


@dataclass(kw_only=True)
class Training:
    """The argument of a hook: the state of the training that calls the hook."""

    args: TrainConfig
    hyp: Hyp
    run: RunDir
    device: Any
    model: Any = None
    """The detector being trained; None before it is built."""
    epoch: int = 0
    """Counted from 0."""
    metrics: dict[str, float] = field(default_factory=dict)
    """In `on_fit_epoch_end`: the metrics of the epoch before they are logged; a hook may add or change entries."""
    log: Callable[[Path], None] = lambda path: None
    """Takes a file below the run directory and sends it to the trackers."""
    say: Callable[[str], None] = print
    """Prints a line; the trackers record the line too."""

    @property
    def epochs(self) -> int:
        """Total number of epochs."""
        return self.args.epochs

    @property
    def save_dir(self) -> Path:
        """The run directory."""
        return self.run.path

    @property
    def best(self) -> Path:
        """Path of the checkpoint with the highest fitness; the file may not exist yet."""
        return self.run.best

    @property
    def last(self) -> Path:
        """Path of the newest resumable checkpoint; the file may not exist yet."""
        return self.run.last

    @property
    def csv(self) -> Path:
        """Path of the table of metrics, one row per epoch."""
        return self.run.results_csv

    def log_artifact(self, path: str | Path) -> None:
        """Send a file to the trackers. A file outside the run directory is first copied into it."""
        given = Path(path)
        source = (self.save_dir / given if not given.exists() else given).resolve(strict=True)
        if not source.is_relative_to(real_path(self.save_dir)):
            copy = folder_below(self.save_dir, _FOLDER) / source.name
            with open(source, "rb") as file:
                write_atomic(copy, lambda out: shutil.copyfileobj(file, out))
            source = copy
        self.log(source)


Hook = Callable[[Training], object]
_added: dict[str, list[Hook]] = {}


def add(name: str, function: Hook) -> None:
    """Call `function(training)` at each event `name` of the trainings that this process starts from now on.

    Raises UsageError for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise UsageError(f"no hook is called {name!r}{suggest(name, NAMES)}; known: {', '.join(NAMES)}")
    _added.setdefault(name, []).append(function)


def clear() -> None:
    """Forget all functions that `add` has registered."""
    _added.clear()


def find_hooks(given: str, environment: Mapping[str, str] = os.environ) -> dict[str, list[Hook]]:
    """Return the hooks registered by `add` and the hooks of a file (`--hooks`, else `STARLING_HOOKS`), by event.

    Raises UsageError if the file does not exist, raises an error, or defines no hook.
    """
    named = given or environment.get(VARIABLE, "")
    found = {name: list(functions) for name, functions in _added.items()}
    if not named:
        return found
    flag = "--hooks" if given else VARIABLE
    path = at_home(named)
    with readable(UsageError):
        if path.is_file():
            path.open("rb").close()
        else:
            raise UsageError(
                f"{flag} {named}: no such file; give the path of a Python file that defines hooks"
            )
    try:
        defined = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UsageError(f"{flag} {_place(error, str(path))}; correct it, or leave it out") from None
    own = {name: value for name, value in defined.items() if name in NAMES and callable(value)}
    if not own:
        near = next((suggest(name, NAMES) for name in defined if suggest(name, NAMES)), "")
        raise UsageError(f"{flag} {path}: defines no hook{near}; known: {', '.join(NAMES)}")
    for name, function in own.items():
        found.setdefault(name, []).append(function)
    return found


class Hooks:
    """Call the hooks of one training, and turn their exceptions into warnings."""

    def __init__(self, functions: Mapping[str, Sequence[Hook]]) -> None:
        self._functions = {name: tuple(own) for name, own in functions.items() if own}
        self._warned: set[int] = set()
        self.training: Training | None = None
        """The argument of every hook; no hook is called while it is None."""

    def fire(self, name: str, **changes: Any) -> None:
        """Set the attributes in `changes` on `training`, then call every hook of this event."""
        functions = self._functions.get(name)
        if functions is None or self.training is None:
            return
        for key, value in changes.items():
            setattr(self.training, key, value)
        for function in functions:
            try:
                function(self.training)
            except (Exception, SystemExit) as error:
                if id(function) not in self._warned:
                    self._warned.add(id(function))
                    file = getattr(getattr(function, "__code__", None), "co_filename", "")
                    logger.warning(
                        f"warning: the hook {name} failed in {_place(error, file)}; training goes on, and further "
                        "failures of this hook are not reported"
                    )


def _place(error: BaseException, file: str) -> str:
    """Return `file, line N: error`: the innermost line inside `file`, else the line that raised."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {what}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}: {what}" if own else what

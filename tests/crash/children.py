"""Trainers in processes of their own that a test may kill, each with one fault set up beforehand."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Fault = tuple[str, ...]
"""Name of one of FAULTS, and its arguments."""


def run_trainer(
    args: list[str], runs: str, output: str, fault: Fault, environment: Mapping[str, str]
) -> None:
    """Be a trainer: `train.py` with these arguments, its words in `output`, after setting the fault up."""
    os.environ.update(environment, STARLING_RUNS=runs)
    words = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from starling import settings
    from starling.cli import train

    settings.update({"mlflow": False, "tensorboard": False})
    if fault:
        FAULTS[fault[0]](*fault[1:])
    code = train.main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_iteration(count: str) -> None:
    """Be killed after so many iterations of this process, in the middle of whatever follows them."""
    from starling.training.trainer import Trainer

    whole, done = Trainer._iterate, [0]

    def iterate(self: Trainer, *args: object) -> None:
        whole(self, *args)  # type: ignore[arg-type]
        done[0] += 1
        if done[0] == int(count):
            _die()

    Trainer._iterate = iterate  # type: ignore[method-assign]


def die_before_best(count: str) -> None:
    """Be killed where `best.pt` is about to be written for the given time."""
    from starling.training import checkpoint as saving

    whole, done = saving.save_checkpoint, [0]

    def save(path: Path, *args: object, **options: object) -> None:
        done[0] += path.name == "best.pt"
        if path.name == "best.pt" and done[0] == int(count):
            _die()
        whole(path, *args, **options)  # type: ignore[arg-type]

    saving.save_checkpoint = save  # type: ignore[assignment]


def die_in_the_end(epochs: str, step: str) -> None:
    """Be killed at the given write or rename after `last.pt` of the last of `epochs` epochs is in place.

    Where the end has fewer of them, note their number in `$STARLING_RUNS/../steps`, and live on.
    """
    replace, write, seen = os.replace, os.write, [0, 0]

    def count() -> None:
        seen[1] += seen[0] >= int(epochs)
        if seen[1] == int(step):
            _die()

    def counted_replace(source: object, target: object, **options: object) -> None:
        count()
        replace(source, target, **options)  # type: ignore[arg-type]
        seen[0] += Path(str(target)).name == "last.pt"

    def counted_write(descriptor: int, content: bytes) -> int:
        count()
        return write(descriptor, content)

    os.replace, os.write = counted_replace, counted_write  # type: ignore[assignment]
    note = Path(os.environ["STARLING_RUNS"]).parent / "steps"
    leave = os._exit

    def noted_exit(code: int) -> None:
        note.write_text(str(seen[1]))
        leave(code)

    os._exit = noted_exit  # type: ignore[assignment]


def die_in_the_last_validation(image: str) -> None:
    """Be killed in the validation of the best weights, at the given image of this process."""
    from starling.evaluation.mistakes import WorstImages

    whole, seen = WorstImages.add, [0]

    def add(self: WorstImages, *args: object) -> None:
        seen[0] += 1
        if seen[0] == int(image):
            _die()
        whole(self, *args)  # type: ignore[arg-type]

    WorstImages.add = add  # type: ignore[method-assign]


def full_for(name: str) -> None:
    """Let the kernel refuse what is written to files of this name, as a full disk does."""
    whole = os.open

    def opened(path: str, flags: int, *args: int, **options: int) -> int:
        if Path(path).name.startswith(f".{name}.") and flags & (os.O_WRONLY | os.O_RDWR):
            return whole("/dev/full", os.O_RDWR)
        return whole(path, flags, *args, **options)

    os.open = opened  # type: ignore[assignment]


def slow_iterations(marker: str) -> None:
    """Touch `marker` after the first iteration; take a tenth of a second for each one."""
    from starling.training.trainer import Trainer

    whole = Trainer._iterate

    def iterate(self: Trainer, *args: object) -> None:
        whole(self, *args)  # type: ignore[arg-type]
        Path(marker).touch()
        time.sleep(0.1)

    Trainer._iterate = iterate  # type: ignore[method-assign]


def slow_saves(folder: str, seconds: str, first: str = "1") -> None:
    """Note each save of `last.pt` as a file in `folder`, and let it take so long from save `first` on."""
    from starling.core.files import atomic
    from starling.training import checkpoint as saving

    whole_save, whole_fsync, saves = saving.save_checkpoint, os.fsync, [0]

    def save(path: Path, *args: object, **options: object) -> None:
        if path.name != "last.pt":
            return whole_save(path, *args, **options)  # type: ignore[arg-type]
        saves[0] += 1
        number = saves[0]

        def fsync(descriptor: int) -> None:
            (Path(folder) / f"began-{number}").touch()
            deadline = time.monotonic() + (float(seconds) if number >= int(first) else 0)
            while time.monotonic() < deadline:  # a signal cuts a sleep short
                time.sleep(0.02)
            whole_fsync(descriptor)

        atomic.os.fsync = fsync  # type: ignore[attr-defined]
        try:
            whole_save(path, *args, **options)  # type: ignore[arg-type]
        finally:
            atomic.os.fsync = whole_fsync  # type: ignore[attr-defined]
        (Path(folder) / f"done-{number}").touch()

    saving.save_checkpoint = save  # type: ignore[assignment]


def slow_validation(marker: str) -> None:
    """Touch `marker` at the first validation and take a tenth of a second for every batch of it, many times."""
    from starling.training import trainer

    whole = trainer.validate

    def validate(model: object, batches: object, *args: object, **options: object) -> object:
        def slow() -> object:
            Path(marker).touch()
            for _ in range(100):
                for batch in batches:  # type: ignore[attr-defined]
                    time.sleep(0.1)
                    yield batch

        return whole(model, slow(), *args, **options)  # type: ignore[arg-type]

    trainer.validate = validate  # type: ignore[assignment]


def full_disk(limit: str) -> None:
    """Let no file grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))


def die_of_size(limit: str) -> None:
    """Be killed in the middle of a write, when a file would grow beyond `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and the write fails instead
    full_disk(limit)


def failing_disk() -> None:
    """Let every fsync of a checkpoint fail, as a dying disk does."""
    from starling.core.files import atomic
    from starling.training import checkpoint as saving

    whole_save, whole_fsync = saving.save_checkpoint, os.fsync

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    def save(*args: object, **options: object) -> None:
        atomic.os.fsync = fail  # type: ignore[attr-defined]
        try:
            whole_save(*args, **options)  # type: ignore[arg-type]
        finally:
            atomic.os.fsync = whole_fsync  # type: ignore[attr-defined]

    saving.save_checkpoint = save  # type: ignore[assignment]


def scarce_memory(mebibytes: str) -> None:
    """Let the process grow by so much once it trains; the kernel refuses it any more."""
    from starling.training.trainer import Trainer

    whole = Trainer.fit

    def fit(self: Trainer) -> object:
        status = Path("/proc/self/status").read_text()
        used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
        limit = (used << 10) + (int(mebibytes) << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return whole(self)

    Trainer.fit = fit  # type: ignore[assignment,method-assign]


def noted_epochs(folder: str, lease_s: str = "120") -> None:
    """Note each epoch that is begun as `<candidate> <epoch>` in `folder`, and by whom; wait so long, draw nothing.

    On one core: several trainings with a thread for each core get in each other's way.
    """
    from starling.core.files.atomic import append_line
    from starling.search import training
    from starling.search.spec import StudyRules
    from starling.search.worker import WorkerSettings
    from starling.training.trainer import Trainer

    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole = Trainer._fit_epoch

    def fit_epoch(self: Trainer) -> None:
        append_line(Path(folder) / "epochs", f"{int(self.run.path.name)} {self.epoch}")
        append_line(Path(folder) / "pids", str(os.getpid()))
        whole(self)

    Trainer._fit_epoch = fit_epoch  # type: ignore[method-assign]
    training.WorkerSettings = lambda: WorkerSettings(poll_s=0.05, plot=False)  # type: ignore[assignment,misc]
    training.StudyRules = lambda: StudyRules(lease_s=float(lease_s))  # type: ignore[assignment,misc]


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        die_at_iteration,
        die_before_best,
        die_in_the_end,
        die_in_the_last_validation,
        full_for,
        slow_iterations,
        slow_saves,
        slow_validation,
        full_disk,
        die_of_size,
        failing_disk,
        scarce_memory,
        noted_epochs,
    )
}

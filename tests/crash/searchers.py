"""Workers of a search that a test may kill: the product's own loop, over trainings of milliseconds that keep books."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from starling.config.hyp import Hyp
from starling.core.errors import StarlingError
from starling.core.files.atomic import append_line, write_atomic
from starling.core.log_lines import lines_to
from starling.search.outcome import Candidate, Outcome, Report
from starling.search.spec import StudyRules
from starling.search.storage.journal import writing
from starling.search.study import LeasedCandidate, SearchStudy
from starling.search.worker import WorkerSettings
from tests.searches import outcome, run_search, spec

EPOCHS = 5
EPOCH_S = 0.02
LEASE_S = 2.0
BUDGET = 60
SEED_HYP = Hyp(degrees=2.0, mixup=0.1).as_dict()

Fault = tuple[str, ...]
"""Name of what the worker does to itself, and its arguments; empty for a worker that only others harm."""


@dataclass(frozen=True)
class Scene:
    """Where a search happens, and where its workers tell the test what they do: a disk that is never full."""

    search: Path
    notes: Path

    def lines(self, name: str) -> list[str]:
        """Return what the workers noted under `name` so far."""
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []


def work(scene: Scene, name: str, fault: Fault = ()) -> None:
    """Be a worker of the search; the exit code is that of `train.py`."""
    if fault[:1] == ("die in append",):
        _die_in_append(int(fault[1]))
    _note_what_is_recorded(scene)
    try:
        with lines_to(lambda line: append_line(scene.notes / "said", f"{name}: {line}")):
            run_search(
                scene.search,
                _Training(scene, fault[1] if fault[:1] == ("freeze",) else ""),
                spec(SEED_HYP, BUDGET),
                settings=WorkerSettings(name=name, poll_s=0.02, plot=False),
                rules=StudyRules(lease_s=LEASE_S),
            )
    except StarlingError as error:
        append_line(scene.notes / "said", f"{name}: error: {error}")
        sys.exit(error.exit_code)


class _Training:
    """Train a candidate for some epochs, with a checkpoint after each, as the real one does."""

    def __init__(self, scene: Scene, freezes: str) -> None:
        self._scene, self._freezes = scene, freezes

    def __call__(self, candidate: Candidate, report: Report) -> Outcome:
        checkpoint = candidate.directory / "weights" / "last.json"
        for epoch in range(_epochs_done(candidate), EPOCHS):
            append_line(self._scene.notes / "epochs", f"{candidate.number} {epoch}")
            time.sleep(EPOCH_S)
            if epoch < EPOCHS - 1:
                self._freeze_at("early", candidate, epoch)
            with writing(checkpoint):
                write_atomic(checkpoint, json.dumps({"epochs": epoch + 1, "hyp": candidate.hyp}))
            report()
        self._freeze_at("late", candidate, EPOCHS - 1)
        fitness = 1 - abs(candidate.hyp["lr0"] - 0.02)
        return outcome(fitness, map5095=fitness)

    def _freeze_at(self, place: str, candidate: Candidate, epoch: int) -> None:
        if self._freezes == place:
            self._freezes = ""
            append_line(self._scene.notes / "frozen", f"{candidate.number} {epoch}")
            os.kill(os.getpid(), signal.SIGSTOP)


def _epochs_done(candidate: Candidate) -> int:
    """Return the epochs of the newest checkpoint of this candidate; one that is torn or another's is an error."""
    for folder in candidate.resumes_from:
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((folder / "weights" / "last.json").read_text())
            assert state["hyp"] == candidate.hyp, "a checkpoint of another candidate"
            return int(state["epochs"])
    return 0


def _note_what_is_recorded(scene: Scene) -> None:
    """Note each result once the study has promised to keep it."""
    whole = SearchStudy.finish

    def finish(self: SearchStudy, claim: LeasedCandidate, outcome: Outcome) -> None:
        whole(self, claim, outcome)
        append_line(scene.notes / "recorded", str(claim.candidate.number))

    SearchStudy.finish = finish  # type: ignore[method-assign]


def _die_in_append(count: int) -> None:
    """Be killed in the middle of the given append to the study, half a record written."""
    whole, done = os.pwrite, [0]

    def die_half_way(descriptor: int, payload: bytes, offset: int) -> int:
        done[0] += 1
        if done[0] < count:
            return whole(descriptor, payload, offset)
        whole(descriptor, payload[: len(payload) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    os.pwrite = die_half_way

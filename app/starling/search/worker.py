"""A worker of a search: claim a candidate, train it, record it, until the study's budget is met."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling.core.errors import ConfigError
from starling.core.settings.train import DEFAULT_SAMPLER, Sampler
from starling.errors import Pruned, Stopped, refusal
from starling.outputs.worker_status import worker_name
from starling.search.exports import PICTURE, draw_picture, write_files
from starling.search.outcome import (
    Candidate,
    LeaseLost,
    Objective,
    Outcome,
    Progress,
    Report,
    SearchFailed,
    SearchSummary,
    State,
    best_of,
    failure_reason,
)
from starling.search.plan import StudyPlan
from starling.search.space_file import Space
from starling.search.storage.storage import StudyStorage, open_storage
from starling.search.study import Claim, SearchStudy, StudyRules, Turn
from starling.search.throttle import Throttle

FILES_SHARE = 0.005
"""Most of a worker's time that evolve.csv and hyp_evolve.yaml may take; they grow with the study."""
DRAWING_SHARE = 0.02
"""Most of one worker's time that evolve.png and report.html may take all workers together."""
DRAWING_S = 1.5
"""What a drawing is thought to take, before one took longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """How one worker behaves; what the workers must agree on is in the study."""

    name: str = field(default_factory=worker_name)
    """Shown beside the worker's candidates."""
    poll_s: float = 2.0
    """Seconds between looks at the study while others train the last candidates."""
    remind_s: float = 300.0
    """Seconds between two lines about waiting."""
    failures_in_a_row: int = 5
    """Candidates that fail here one after the other before the worker gives up."""
    picture: bool = True
    """Whether evolve.png is drawn and report.html is written."""
    rules: StudyRules = field(default_factory=StudyRules)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.poll_s > 0:
            raise ConfigError("poll_s", self.poll_s, "must be above 0 seconds")
        if self.failures_in_a_row < 1:
            raise ConfigError("failures_in_a_row", self.failures_in_a_row, "must be at least 1")


def run_search(
    *,
    directory: Path,
    seed_hyp: Mapping[str, float | None],
    budget: int,
    study_seed: int,
    plan: StudyPlan | None = None,
    signature: Mapping[str, Any],
    objective: Objective,
    space: Space | None = None,
    seed_settings: Mapping[str, int | str] | None = None,
    sampler: Sampler = DEFAULT_SAMPLER,
    settings: WorkerSettings | None = None,
    storage: StudyStorage | None = None,
    say: Callable[[str], None] = print,
    on_open: Callable[[SearchStudy], None] = lambda study: None,
    on_progress: Callable[[Progress, Candidate | None], None] = lambda progress, candidate: None,
    on_ended: Callable[[Candidate], None] = lambda candidate: None,
    check_stop: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> SearchSummary:
    """Work on the search in `directory` until `budget` trainings of all workers together have finished.

    Any number of processes may call this on one directory, at any time. `say` gets one line for people; `on_open`
    gets the study once, before any candidate; `on_progress` gets the whole search's state and this worker's
    candidate, None while it waits; `on_ended` gets a candidate whose end, finished, pruned or failed, the study has recorded:
    nobody will go on with it; `check_stop` is called between candidates and while waiting, to raise Stopped.

    Raises UsageError to join a search for something else; SearchFailed where candidates keep failing; Stopped after
    leaving the candidate to whoever comes next; CheckpointError where the study cannot be written; and whatever the
    objective raised that was not its candidate's own failure. ServerError where the study's database stays away.
    """
    settings = settings or WorkerSettings()
    storage = storage or open_storage("", directory, say)
    study = storage.persist(
        lambda: SearchStudy.open_or_create(
            directory,
            seed_hyp=seed_hyp,
            budget=budget,
            study_seed=study_seed,
            plan=plan,
            signature=signature,
            space=space,
            seed_settings=seed_settings,
            sampler=sampler,
            storage=storage,
            rules=settings.rules,
            monotonic=monotonic,
        )
    )
    on_open(study)
    worker = _Worker(study, objective, settings, say, on_ended)
    remind_at = monotonic()
    with closing(worker):
        while True:
            check_stop()
            turn = study.ask(settings.name)
            progress = study.progress()
            on_progress(progress, turn.candidate if isinstance(turn, Claim) else None)
            if turn is Turn.DONE:
                break
            if isinstance(turn, Claim):
                worker.train(turn)
                remind_at = monotonic()
                continue
            worker.catch_up()
            if monotonic() >= remind_at:
                say(f"waiting for {progress.running} running of {progress.budget} candidates")
                remind_at = monotonic() + settings.remind_s
            sleep(settings.poll_s)
        worker.refresh_views(last=True)
    for rung, correlation in study.correlations().items():
        found = "too few have finished to say" if correlation is None else f"correlation {correlation:.2f}"
        say(f"after {rung} epochs against the end: {found}")
    return _summarise(study, worker.trained)


class _Worker:
    """What one worker does with the candidates it claims."""

    def __init__(
        self,
        study: SearchStudy,
        objective: Objective,
        settings: WorkerSettings,
        say: Callable[[str], None],
        on_ended: Callable[[Candidate], None],
    ) -> None:
        self._study = study
        self._on_ended = on_ended
        self._objective = objective
        self._settings = settings
        self._say = say
        self._failures_in_a_row = 0
        self._files, self._drawings = Throttle(FILES_SHARE), Throttle(DRAWING_SHARE)
        self._files_are_behind = False
        self._picture: int | None = None
        """Modification time of evolve.png when this worker last looked; only ever compared with itself."""
        self._drawing_s = DRAWING_S
        """The longest drawing so far."""
        self._drawings.took(self._drawing_s)  # the first one, too, has its share of the time to wait for
        self.trained = 0
        self._behind: set[str] = set()
        """Reasons that were said for views that could not be written."""
        self._apart = False
        """Whether it was said that the runs folder is not shared."""

    def train(self, claim: Claim) -> None:
        """Train one candidate and record how it ended."""
        title = claim.candidate.title
        if claim.candidate.resumed:
            self._say(f"{title}: takes over from {claim.candidate.resumes_from[0].name}")
            self._say_if_apart(claim.candidate)
        try:
            outcome = self._objective(claim.candidate, self._report_of(claim))
            self._study.finish(claim, outcome)
        except Pruned as error:
            if self._study.prune(claim, error):
                self._on_ended(claim.candidate)
            self._say(f"{title}: pruned: {error}; {self._so_far()}")
        except LeaseLost as error:
            claim.lease.close()
            self._say(f"{error}; abandoned here")
        except (Stopped, KeyboardInterrupt) as error:
            self._give_back(claim, State.STOPPED, str(error) or "interrupted")
            raise
        except Exception as error:
            self._failed(claim, error)
        except BaseException as error:
            self._give_back(claim, State.LOST, f"its worker broke: {type(error).__name__}")
            raise
        else:
            self._on_ended(claim.candidate)
            self._succeeded(title, outcome)

    def _report_of(self, claim: Claim) -> Report:
        """Return what the objective tells of its progress with."""

        def report(epoch: int | None = None, fitness: float | None = None) -> None:
            claim.lease.renew()
            if epoch is not None and fitness is not None:
                self._study.report(claim, epoch, fitness)

        return report

    def _say_if_apart(self, candidate: Candidate) -> None:
        """Say, once, that the interrupted training is on another host, out of reach."""
        if self._apart or not self._study.spans_hosts:
            return
        if not any(folder.is_dir() for folder in candidate.resumes_from):
            self._apart = True
            self._say(
                "its checkpoint is not in this host's runs folder: such candidates are trained from the beginning "
                "(hosts that share the folder go on from the checkpoint)"
            )

    def refresh_views(self, *, last: bool = False) -> None:
        """Derive the files anew; the study is the truth, so a failure here is only worth a line.

        Between short trainings of a large study they would take most of the time, and evolve.png in any: they wait
        for a later training then, or for the `last`.
        """
        self._files_are_behind = True
        if last or self._files.is_due():
            self.catch_up()
        if self._settings.picture and (last or self._picture_is_due()):
            took = self._timed(lambda: draw_picture(self._study, wait=last))
            self._drawing_s = max(self._drawing_s, took)
            self._drawings.took(self._drawing_s)
            self._picture = self._picture_mark()

    def catch_up(self) -> None:
        """Write the files that refresh_views has put off."""
        if self._files_are_behind:
            self._files_are_behind = False
            self._files.took(self._timed(lambda: write_files(self._study)))

    def close(self) -> None:
        """Leave no file behind the study, however this worker ends."""
        self.catch_up()

    def _picture_is_due(self) -> bool:
        """Return whether it is time to draw; a drawing by another worker counts as this one's."""
        mark = self._picture_mark()
        if mark != self._picture:
            self._picture = mark
            self._drawings.took(self._drawing_s)
        return self._drawings.is_due()

    def _picture_mark(self) -> int | None:
        try:
            return (self._study.directory / PICTURE).stat().st_mtime_ns
        except OSError:
            return None

    def _timed(self, write: Callable[[], None]) -> float:
        """Return the seconds that writing views took."""
        began = time.monotonic()
        try:
            write()
        except Exception as error:
            self._say_behind(str((isinstance(error, OSError) and refusal(error)) or error))
        return time.monotonic() - began

    def _say_behind(self, reason: str) -> None:
        """Say why the views could not be written, once for each reason."""
        if reason not in self._behind:
            self._behind.add(reason)
            self._say(f"{self._study.directory}: evolve files are behind the study: {reason}")

    def _succeeded(self, title: str, outcome: Outcome) -> None:
        self.trained += 1
        self._failures_in_a_row = 0
        self.refresh_views()
        self._say(f"{title}: fitness {outcome.fitness:.5g}, {self._so_far()}")

    def _so_far(self) -> str:
        progress = self._study.progress()
        best = "no best yet" if progress.best_fitness is None else f"best {progress.best_fitness:.5g}"
        if not self._study.plan.prune:
            return f"{best}; {progress.finished}/{progress.budget} finished"
        return (
            f"{best}; {progress.spent:.1f} of {progress.budget} trainings' time spent, "
            f"{progress.finished} finished, {progress.pruned} pruned"
        )

    def _failed(self, claim: Claim, error: Exception) -> None:
        """Record the candidate's own failure, or give it back and raise where it is the worker's."""
        number = claim.candidate.number
        reason = failure_reason(error)
        if reason is None:
            self._give_back(claim, State.LOST, f"its worker broke: {type(error).__name__}: {error}"[:500])
            raise error
        # The traceback holds the frames of the training, and with them its tensors.
        error.__traceback__ = None
        gc.collect()
        if self._study.fail(claim, State.FAILED, reason):
            self._on_ended(claim.candidate)
        self._say(f"candidate {number}: failed: {reason}")
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._settings.failures_in_a_row:
            raise SearchFailed(
                f"{self._failures_in_a_row} candidates in a row failed on this worker, the last with: {reason}"
            )

    def _give_back(self, claim: Claim, ending: State, reason: str) -> None:
        """Leave the candidate to others, at once if the study can be written, else as a dead worker would."""
        try:
            self._study.fail(claim, ending, reason)
        except Exception as error:
            claim.lease.abandon()
            self._say(
                f"candidate {claim.candidate.number}: cannot be given back ({error}); left to be taken over"
            )


def _summarise(study: SearchStudy, trained: int) -> SearchSummary:
    finished = study.finished()
    return SearchSummary(
        progress=study.progress(),
        best=best_of(finished),
        seed_fitness=next((candidate.fitness for candidate in finished if candidate.is_seed), None),
        trained_here=trained,
    )

"""A search whose trials are clones of a ClearML task. It always ends after a number of trials, failures or hours.

ClearML's own HyperParameterOptimizer does not always end, and one failed trial can end it. Here this module runs the
loop, and Optuna proposes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from starling.core.errors import StarlingError, UsageError
from starling.core.settings.hpo import HpoConfig
from starling.core.settings.train import TrainConfig
from starling.outputs.run_dir import runs_root
from starling.search.space import Space, split_values
from starling.search.space_file import read_space
from starling.stop_signal import StopSignal
from starling.tracking.clearml.client.api import Answer, ClearmlApi, ClearmlUnavailableError
from starling.tracking.clearml.client.remote import connect
from starling.tracking.clearml.client.tasks import (
    ARGS,
    HYP,
    MARK,
    command_line,
    create_task,
    get_task,
    hyper_params,
    queue_id,
    section_of,
    task_page,
)
from starling.tracking.clearml.trial_runners import LocalRunner, QueueRunner, TrialRunner

logger = logging.getLogger(__name__)

POLL_S = 2.0
_DONE = {"completed", "closed", "published"}
_OVER = {*_DONE, "failed", "stopped"}
_SETTLE_S = 30.0
"""Seconds after the end of a process in which its last figures may still arrive."""
FOLDER = "hpo"


class NoTrialFinishedError(StarlingError):
    """A search ended without a finished trial."""


@dataclass(slots=True)
class _Trial:
    number: int
    task: str
    values: Mapping[str, Any]
    trial: optuna.Trial
    since: float
    ended_at: float | None = None
    """Time at which the trial's process was first seen to have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSearchResult:
    """The result of a search over tasks, with its best trial."""

    task: str
    best_task: str
    best_value: float
    best_values: Mapping[str, Any]
    finished: int
    failed: int
    reason: str


class TaskSearch:
    """Start trials, watch them, and report their results to Optuna."""

    def __init__(
        self,
        config: HpoConfig,
        api: ClearmlApi,
        runner: TrialRunner,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._api, self._runner = config, api, runner
        self._clock, self._sleep = clock, sleep
        self._began = clock()
        self._running: list[_Trial] = []
        self._started = self._failed = 0
        self._finished: list[tuple[float, _Trial]] = []
        self._away = False
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=config.seed)
        if config.sampler == "optuna":
            sampler = optuna.samplers.TPESampler(seed=config.seed, constant_liar=True, multivariate=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)

    def run(self, check_stop: Callable[[], None] = lambda: None) -> TaskSearchResult:
        """Search until a limit is reached; raises NoTrialFinishedError, and the exceptions of `check_stop`."""
        template = self._find_template()
        start, space = _read_template(template, self._config)
        distributions = space.distributions(start)
        self._study.enqueue_trial({name: start[name] for name in space.names})
        own = self._create_own(template)
        try:
            while True:
                check_stop()
                self._look()
                while len(self._running) < self._config.parallel and not self._bound():
                    if not self._start_one(template, own, space, distributions):
                        break
                if self._away and not self._time_is_up():
                    self._sleep(POLL_S)
                    continue
                if not self._running or self._time_is_up():
                    break
                self._sleep(POLL_S)
        except BaseException as error:
            self._end_own(own, "stopped", str(error))
            raise
        finally:
            self._stop_all()
        return self._conclude(own)

    def _find_template(self) -> Answer:
        if self._config.task:
            return get_task(self._api, self._config.task)
        found = self._api.call(
            "tasks.get_all", type=["training"], status=["completed", "published"], system_tags=[MARK, "-archived"],
            order_by=["-last_update"], page=0, page_size=100,
        )["tasks"]  # fmt: skip
        if not found:
            raise UsageError(
                f"ClearML at {self._api.credentials.api_host} has no finished training of this program; train once "
                "with ClearML configured, or name a task with --task ID"
            )
        # A candidate of a search, or a trial of another hpo.py, is taken only if there is no task without a parent.
        return dict(next((task for task in found if not task.get("parent")), found[0]))

    def _create_own(self, template: Answer) -> str:
        own = create_task(
            self._api, name=self._config.name, project=self._project_of(template), params={}, kind="optimizer"
        )
        self._api.call("tasks.started", task=own, force=True)
        page = task_page(self._api, get_task(self._api, own))
        logger.info(f"search over clones of {template['name']} ({template['id']}): {page}")
        return own

    def _project_of(self, template: Answer) -> str:
        return str(self._api.call("projects.get_by_id", project=template["project"])["project"]["name"])

    def _start_one(self, template: Answer, own: str, space: Space, distributions: Mapping[str, Any]) -> bool:
        """Start the next trial; return False if the server is unreachable, and the trial will be proposed again."""
        trial = self._study.ask(dict(distributions))
        values = {name: trial.params[name] for name in space.names}
        number = self._started
        hyp, settings = split_values(values, distributions)
        sections = {**hyper_params(HYP, hyp), **hyper_params(ARGS, self._arguments(settings))}
        items = [item for section in sections.values() for item in section.values()]
        try:
            name = f"{self._config.name} {number}"
            clone = self._api.call(
                "tasks.clone", task=template["id"], new_task_name=name, new_task_parent=own
            )
            task = str(clone["id"])
            self._api.call("tasks.edit_hyper_params", task=task, hyperparams=items)
            self._runner.start(task)
        except ClearmlUnavailableError as error:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self._study.enqueue_trial(values)
            self._wait_for_server(error)
            return False
        self._started += 1
        self._running.append(_Trial(number, task, values, trial, self._clock()))
        where = f"in queue {self._config.queue}" if self._config.queue else "here"
        logger.info(f"trial {number}: task {task} {where}")
        return True

    def _wait_for_server(self, error: ClearmlUnavailableError) -> None:
        if not self._away:
            logger.warning(f"{error}; waiting for it")
        self._away = True

    def _arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, **({"epochs": self._config.epochs} if self._config.epochs else {})}

    def _look(self) -> None:
        """Check the trials; wait for an unreachable server while the search has time left."""
        self._away = self._away and bool(self._running)
        for trial in list(self._running):
            try:
                self._look_at(trial)
                self._away = False
            except ClearmlUnavailableError as error:
                self._wait_for_server(error)
                return

    def _look_at(self, trial: _Trial) -> None:
        task, now = get_task(self._api, trial.task), self._clock()
        state, value = task["status"], _best(task, self._config.objective)
        code = self._runner.ended(trial.task)
        if code is not None and trial.ended_at is None:
            trial.ended_at = now
        if code == 0 and value is None and now - (trial.ended_at or now) <= _SETTLE_S:
            return  # its last figures may still arrive
        if code is not None:
            reason = (
                ""
                if code == 0 and value is not None
                else f"its process ended with {code}, {_without(value, self._config)}"
            )
            self._runner.conclude(trial.task, reason=reason)
            self._settle(trial, value, reason)
        elif self._config.queue and state in _OVER:
            told = str(task.get("status_reason") or f"{state}, {_without(value, self._config)}")
            self._settle(trial, value, "" if state in _DONE and value is not None else told)
        elif self._config.trial_hours and now - trial.since > self._config.trial_hours * 3600:
            self._runner.stop(trial.task)
            self._fail(trial, f"longer than --trial-hours {self._config.trial_hours:g}")

    def _settle(self, trial: _Trial, value: float | None, reason: str) -> None:
        if reason or value is None:
            self._fail(trial, reason)
        else:
            self._finish(trial, value)

    def _finish(self, trial: _Trial, value: float) -> None:
        self._running.remove(trial)
        self._study.tell(trial.trial, value)
        self._finished.append((value, trial))
        best = max(value for value, _ in self._finished)
        logger.info(
            f"trial {trial.number}: {self._config.objective} {value:.4f}{' *' if value == best else ''}"
        )

    def _fail(self, trial: _Trial, reason: str) -> None:
        self._running.remove(trial)
        self._study.tell(trial.trial, state=optuna.trial.TrialState.FAIL)
        self._failed += 1
        logger.warning(f"trial {trial.number}: failed: {reason}")

    def _time_is_up(self) -> bool:
        return self._clock() - self._began > self._config.hours * 3600

    def _bound(self) -> str:
        """Return the limit that prevents another trial; '' if none does."""
        config = self._config
        if self._started >= config.trials:
            return f"{self._started} trials"
        if self._failed >= config.failures:
            return f"{self._failed} failed trials"
        return f"{config.hours:g} hours" if self._time_is_up() else ""

    def _stop_all(self) -> None:
        for trial in self._running:
            try:
                self._runner.stop(trial.task)
            except ClearmlUnavailableError as error:
                logger.warning(f"trial {trial.number}: could not be stopped: {error}")
        self._failed += len(self._running)
        self._running.clear()

    def _conclude(self, own: str) -> TaskSearchResult:
        reason = self._bound() or "nothing left to do"
        if not self._finished:
            self._end_own(own, "failed", reason)
            raise NoTrialFinishedError(f"no trial finished ({reason}); look at the tasks' consoles")
        value, best = max(self._finished, key=lambda item: item[0])
        events = [
            {"type": "training_stats_scalar", "task": own, "metric": "trials", "variant": self._config.objective,
             "iter": trial.number, "value": reached} for reached, trial in self._finished
        ]  # fmt: skip
        best_text = json.dumps({"task": best.task, "value": value, "values": dict(best.values)}, indent=2)
        item = {"name": "best", "type": "json", "value": best_text, "description": "the best trial"}
        try:
            self._api.send_events(events)
            self._api.call("tasks.edit_configuration", task=own, force=True, configuration=[item])
        except ClearmlUnavailableError as error:
            logger.warning(f"{error}; the search's own task does not show its results")
        self._end_own(own, "completed", reason)
        return TaskSearchResult(
            task=own, best_task=best.task, best_value=value, best_values=best.values, finished=len(self._finished),
            failed=self._failed, reason=reason,
        )  # fmt: skip

    def _end_own(self, own: str, status: str, reason: str) -> None:
        try:
            self._api.call(
                f"tasks.{status}", task=own, force=True, status_reason=reason, status_message=reason
            )
        except StarlingError as error:
            logger.warning(f"{error}; the search's own task stays open")


def search_tasks(config: HpoConfig) -> None:
    """Search, print the result, and keep the best hyperparameters below the runs folder."""
    api = connect()
    folder = runs_root() / FOLDER
    queue = queue_id(api, config.queue) if config.queue else ""
    runner: TrialRunner = QueueRunner(api, queue) if queue else LocalRunner(api, folder / "logs")
    with StopSignal() as stop:
        outcome = TaskSearch(config, api, runner).run(stop.raise_if_requested)
    best = command_line(get_task(api, outcome.best_task), folder / outcome.task)
    logger.info(f"ended after {outcome.reason}: {outcome.finished} finished, {outcome.failed} failed")
    logger.info(f"best: {config.objective} {outcome.best_value:.4f}, task {outcome.best_task}")
    logger.info(f"train with it: python train.py {' '.join(best)}")
    if config.json:
        print(json.dumps({
            "task": outcome.task, "best_task": outcome.best_task, "best_value": outcome.best_value,
            "best_values": dict(outcome.best_values), "finished": outcome.finished, "failed": outcome.failed,
            "ended_after": outcome.reason, "hyp": str(folder / outcome.task / "hyp.yaml"),
        }), flush=True)  # fmt: skip


def _read_template(template: Answer, config: HpoConfig) -> tuple[dict[str, Any], Space]:
    """Return the start values and the space of the search; raises UsageError for a task that is no training."""
    values = section_of(template, HYP)
    if not values:
        raise UsageError(
            f"--task {template['id']}: has no {HYP} section, so it is not a training of this program; name another task"
        )
    hyp = {name: float(value) for name, value in values.items()}
    arguments = section_of(template, ARGS)
    base = TrainConfig.from_mapping(
        {
            "evolve": 1,
            "space": config.space,
            "batch_size": int(arguments.get("batch_size") or 16),
            "imgsz": int(arguments.get("imgsz") or 640),
            "optimizer": arguments.get("optimizer") or "SGD",
            "cfg": arguments.get("cfg") or "",
        }
    )
    space, settings = read_space(base)
    return {**hyp, **settings}, space.starting_from(hyp)


def _best(task: Answer, objective: str) -> float | None:
    """Return the highest value of a scalar of a task; None if the task has no such scalar."""
    title, _, series = objective.partition("/")
    for metric in (task.get("last_metrics") or {}).values():
        for variant in metric.values():
            if (variant.get("metric"), variant.get("variant")) == (title, series):
                return float(variant["max_value"])
    return None


def _without(value: float | None, config: HpoConfig) -> str:
    return f"without {config.objective}" if value is None else f"with {config.objective} {value:.4f}"

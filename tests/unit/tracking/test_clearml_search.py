"""A search over clones of a ClearML task ends, whatever happens; over a double of ClearML's server and of its agents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from starling.cli import hpo
from starling.core.errors import ConfigError, UsageError
from starling.core.settings.hpo import HpoConfig, parse_args
from starling.errors import Stopped
from starling.tracking.clearml.client.api import ClearmlApi
from starling.tracking.clearml.client.credentials import find_credentials
from starling.tracking.clearml.client.tasks import create_task
from starling.tracking.clearml.search import NoTrialFinishedError, TaskSearch
from starling.tracking.clearml.trial_runners import QueueRunner
from tests.doubles.clearml_server import ClearmlServerDouble

METRIC = ("metrics", "mAP_0.5:0.95")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearmlServerDouble]:
    with ClearmlServerDouble(tmp_path / "double") as running:
        running.records.answer("queues.create", {"name": "gpus"})
        yield running
        assert running.unknown == set()


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


class AgentsDouble(QueueRunner):
    """The real queue, and agents that end each task at once: the closer lr0 is to 0.02, the better."""

    def __init__(self, server: ClearmlServerDouble, api: ClearmlApi, fails: Callable[[int], bool]) -> None:
        super().__init__(api, server.records.answer("queues.get_all", {})["queues"][0]["id"])
        self.records, self.fails, self.count = server.records, fails, 0

    def start(self, task: str) -> None:
        super().start(task)
        self.records.answer("tasks.started", {"task": task})
        failed = self.fails(self.count)
        self.count += 1
        if failed:
            self.records.answer("tasks.failed", {"task": task, "status_reason": "out of memory"})
            return
        lr0 = float(self.records.arguments(self.records.tasks[task], "Hyp")["lr0"])
        event = {
            "type": "training_stats_scalar",
            "task": task,
            "metric": METRIC[0],
            "variant": METRIC[1],
            "iter": 0,
        }
        self.records.add_events([{**event, "value": 1 - abs(lr0 - 0.02)}])
        self.records.answer("tasks.completed", {"task": task})


def api_of(server: ClearmlServerDouble) -> ClearmlApi:
    credentials = find_credentials({**server.environment, "HOME": "/nowhere"})
    assert credentials is not None
    return ClearmlApi(credentials)


def make_template(server: ClearmlServerDouble) -> str:
    params = {"epochs": 3, "data": "bccd.yaml", "hyp/lr0": 0.01, "hyp/momentum": 0.9, "hyp/mosaic": 1.0}
    task = create_task(api_of(server), name="first", project="blood", params=params, tags=["starling-u1"])
    server.records.answer("tasks.started", {"task": task})
    server.records.answer("tasks.completed", {"task": task})
    return task


def make_search(
    server: ClearmlServerDouble,
    clock: Clock,
    *,
    fails: Callable[[int], bool] = lambda number: False,
    **changes: Any,
) -> TaskSearch:
    api = api_of(server)
    config = HpoConfig(**{"queue": "gpus", "trials": 6, **changes})
    runner = AgentsDouble(server, api, fails) if fails is not None else QueueRunner(api, _queue(server))
    return TaskSearch(config, api, runner, clock=lambda: clock.now, sleep=clock.sleep)


def _queue(server: ClearmlServerDouble) -> str:
    return str(server.records.answer("queues.get_all", {})["queues"][0]["id"])


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_a_failed_trial_is_passed_over_and_the_search_ends_after_its_trials(
    server: ClearmlServerDouble, sampler: str, said: list[str]
) -> None:
    template = make_template(server)
    search = make_search(server, Clock(), fails=lambda number: number == 1, sampler=sampler, epochs=2)
    outcome = search.run()
    assert (outcome.finished, outcome.failed, outcome.reason) == (5, 1, "6 trials")
    tasks = [task for task in server.records.tasks.values() if task["parent"] == outcome.task]
    assert len(tasks) == 6
    assert all(server.records.arguments(task)["epochs"] == "2" for task in tasks)
    assert all(server.records.arguments(task)["data"] == "bccd.yaml" for task in tasks)
    assert server.records.arguments(tasks[0], "Hyp") == {"lr0": "0.01", "momentum": "0.9", "mosaic": "1.0"}
    assert len({server.records.arguments(task, "Hyp")["lr0"] for task in tasks}) == 6
    best = max(server.records.scalars(task["id"]).get(METRIC, [(0, 0.0)])[0][1] for task in tasks)
    assert outcome.best_value == best
    own = server.records.tasks[outcome.task]
    assert (own["status"], own["type"]) == ("completed", "optimizer")
    assert len(server.records.scalars(outcome.task)["trials", "metrics/mAP_0.5:0.95"]) == 5
    assert "trial 1: failed: out of memory" in said
    assert server.records.tasks[template]["status"] == "completed"


def test_a_search_whose_trials_all_fail_ends_and_says_so(server: ClearmlServerDouble) -> None:
    make_template(server)
    search = make_search(server, Clock(), fails=lambda number: True, failures=2)
    with pytest.raises(NoTrialFinishedError, match="2 failed trials"):
        search.run()
    assert sum(task["type"] == "training" for task in server.records.tasks.values()) == 3


def trials_of(server: ClearmlServerDouble, search: str) -> list[dict[str, Any]]:
    """Return the tasks that a search made, in their order."""
    return [task for task in server.records.tasks.values() if task["parent"] == search]


def test_a_named_task_is_cloned_though_another_is_newer(server: ClearmlServerDouble, said: list[str]) -> None:
    older, newer = make_template(server), make_template(server)
    search = make_search(server, Clock(), task=older, name="night", trials=1)
    outcome = search.run()
    assert f"({older})" in said[0]
    assert newer not in " ".join(said)
    assert server.records.tasks[outcome.task]["name"] == "night"
    assert [task["name"] for task in trials_of(server, outcome.task)] == ["night 0"]


def test_a_space_says_what_the_trials_change(server: ClearmlServerDouble, tmp_path: Path) -> None:
    make_template(server)
    space = tmp_path / "narrow.yaml"
    space.write_text("lr0: {lower: 0.009, upper: 0.011}\n")
    search = make_search(server, Clock(), space=str(space), trials=4)
    hyps = [server.records.arguments(task, "Hyp") for task in trials_of(server, search.run().task)]
    assert all(0.009 <= float(hyp["lr0"]) <= 0.011 for hyp in hyps)
    assert len({hyp["lr0"] for hyp in hyps}) == 4
    assert {hyp["momentum"] for hyp in hyps} == {"0.9"}


def test_a_trial_without_the_objective_has_failed(server: ClearmlServerDouble, said: list[str]) -> None:
    make_template(server)
    search = make_search(server, Clock(), objective="metrics/mAP_0.5", failures=1)
    with pytest.raises(NoTrialFinishedError):
        search.run()
    assert "trial 0: failed: completed, without metrics/mAP_0.5" in said


def test_the_seed_decides_what_is_proposed(server: ClearmlServerDouble) -> None:
    make_template(server)
    proposed = []
    for seed in (3, 3, 4):
        search = make_search(server, Clock(), sampler="random", seed=seed, trials=3)
        tasks = trials_of(server, search.run().task)
        proposed.append([server.records.arguments(task, "Hyp")["lr0"] for task in tasks])
    assert proposed[0] == proposed[1] != proposed[2]


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_trials_are_in_the_queue_at_once(
    server: ClearmlServerDouble, parallel: int, said: list[str]
) -> None:
    make_template(server)
    search = make_search(server, Clock(), fails=None, hours=0.1, parallel=parallel)
    with pytest.raises(NoTrialFinishedError):
        search.run()
    assert sum("in queue gpus" in line for line in said) == parallel


def test_debug_shows_the_traceback_of_a_search_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words, count in (([], 0), (["--debug"], 1)):
        assert hpo.main(words) != 0
        assert capsys.readouterr().err.count("Traceback") == count


def test_a_queue_that_no_agent_serves_holds_a_search_no_longer_than_its_hours(
    server: ClearmlServerDouble,
) -> None:
    make_template(server)
    clock = Clock()
    search = make_search(server, clock, fails=None, hours=0.1, parallel=2)
    with pytest.raises(NoTrialFinishedError, match=r"0\.1 hours"):
        search.run()
    assert 360 < clock.now < 380
    [queue] = server.records.queues.values()
    assert queue["entries"] == []
    assert not [task for task in server.records.tasks.values() if task["status"] in {"queued", "in_progress"}]


def test_a_trial_that_takes_too_long_is_stopped_and_counts_as_failed(
    server: ClearmlServerDouble, said: list[str]
) -> None:
    make_template(server)
    clock = Clock()
    search = make_search(server, clock, fails=None, trial_hours=0.1, failures=1)
    with pytest.raises(NoTrialFinishedError):
        search.run()
    assert clock.now < 400
    assert "longer than --trial-hours 0.1" in " ".join(said)


def test_a_server_that_goes_away_is_waited_for(server: ClearmlServerDouble, said: list[str]) -> None:
    make_template(server)
    clock = Clock()
    search = make_search(server, clock, fails=lambda number: False)

    def die() -> None:
        server.stop()
        clock.at[60.0] = server.start

    clock.at[3.0] = die
    outcome = search.run()
    assert outcome.finished == 6
    assert sum("waiting for it" in line for line in said) == 1


def test_a_stop_ends_the_trials_and_the_searchs_own_task(server: ClearmlServerDouble) -> None:
    make_template(server)
    clock = Clock()
    search = make_search(server, clock, fails=None)

    def check_stop() -> None:
        if clock.now > 10:
            raise Stopped(15)

    with pytest.raises(Stopped):
        search.run(check_stop)
    states = sorted(task["status"] for task in server.records.tasks.values())
    assert states == ["completed", "stopped", "stopped"]


def test_without_a_training_to_start_from_the_remedy_is_named(server: ClearmlServerDouble) -> None:
    search = make_search(server, Clock())
    with pytest.raises(UsageError, match="--task ID"):
        search.run()


@pytest.mark.parametrize(
    "words",
    [
        "--trials 0",
        "--hours 0",
        "--failures 0",
        "--parallel 2",
        "--objective mAP",
        "--epochs -1",
        "--trial-hours -1",
    ],
)
def test_what_cannot_work_is_a_usage_error(words: str) -> None:
    with pytest.raises(ConfigError):
        parse_args(words.split())

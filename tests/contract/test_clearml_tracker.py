"""ClearML as a tracker, over a double of ClearML's server: the real server cannot be had here.

What the double is told is read back with ClearML's real SDK.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starling.cli import track
from starling.tracking.bridge import follow
from starling.tracking.clearml.client.tasks import uuid_tag
from starling.tracking.clearml.tracker import ClearmlTracker
from starling.tracking.delivery import Bridge
from starling.tracking.events import EventLog
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    TrackerRejectedError,
    TrackerUnavailableError,
)
from tests.doubles.clearml_server import ACCESS_KEY, SECRET_KEY, Answer, ClearmlServerDouble

PARAMS = {"epochs": 3, "freeze": [0], "weights": "", "rect": False, "hyp/lr0": 0.01, "hyp/mosaic": 1.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearmlServerDouble]:
    with ClearmlServerDouble(tmp_path / "double") as running:
        yield running
        assert running.unknown == set()


def tracker_of(server: ClearmlServerDouble, runs: Path, **environment: str) -> ClearmlTracker:
    return ClearmlTracker(runs, {**server.environment, "HOME": str(runs), **environment})


def a_run(uuid: str = "u1", project: str = "blood/cells", **changes: Any) -> Run:
    fields: dict[str, Any] = {"name": f"name-{uuid}", "time": 1e9, "params": PARAMS, "tags": {}, **changes}
    return Run(uuid=uuid, project=project, **fields)


def tell_a_whole_run(tracker: ClearmlTracker, folder: Path) -> str:
    """Tell everything a run can tell, and return the task's id."""
    task = tracker.start_run(a_run(tags={"device": "cpu"}))
    tracker.log_dataset(task, DatasetInput(role="train", name="blood", digest="abc", source="clearml://" + "d" * 32,
                                           figures={"images": 8}, classes=("RBC", "WBC")))  # fmt: skip
    for step in range(3):
        values = {"train/box_loss": 0.5 / (step + 1), "metrics/mAP_0.5": step / 10}
        tracker.log_metrics(task, values, step=step, time=1e9 + step)
        image = folder / f"p{step}.png"
        _draw(image, step)
        tracker.log_image(task, image, "val_batch0_pred", step=step, time=1e9 + step)
    tracker.log_console(task, "epoch 1/3", lambda: "", time=1e9)
    tracker.log_system(task, {"system/cpu_utilization_percentage": 50.0}, step=10, time=1e9)
    (folder / "opt.yaml").write_text("epochs: 3\n")
    (folder / "results.csv").write_text("epoch,loss\n0,1\n")
    (folder / "confusion_matrix.json").write_text(
        json.dumps({"names": ["a", "background"], "counts": [[3, 1], [2, 0]]})
    )
    _draw(folder / "confusion_matrix.png", 1)
    for name, kind in (
        ("opt.yaml", "config"),
        ("results.csv", "table"),
        ("p0.png", "plot"),
        ("confusion_matrix.png", "plot"),
    ):
        tracker.log_artifact(task, folder / name, "", kind=kind)
    for name, content in (("epoch1", b"one"), ("best", os.urandom(300_000))):
        (folder / f"{name}.pt").write_bytes(content)
        tracker.log_model(
            task, ModelFile(path=folder / f"{name}.pt", name=name, step=1, values={"metrics/mAP_0.5": 0.1})
        )
    tracker.end_run(task, "finished", "", time=1e9 + 9)
    return task


def _draw(path: Path, shade: int) -> None:
    from PIL import Image

    Image.new("RGB", (32, 16), (shade * 80, 0, 0)).save(path)


READ_BACK = """
import json, sys
from clearml import Task
task = Task.get_task(task_id=sys.argv[1])
clone = Task.clone(source_task=task, name="again")
clone.set_parameters({**clone.get_parameters(), "Hyp/lr0": 0.002})
models = task.models["output"]
print(json.dumps({
    "project": task.get_project_name(), "name": task.name, "status": str(task.status), "parameters": task.get_parameters(),
    "scalars": task.get_reported_scalars(), "plots": sorted(p["metric"] for p in task.get_reported_plots()),
    "artifacts": {key: item.get_local_copy() for key, item in task.artifacts.items()},
    "models": {model.name: model.get_local_copy() for model in models}, "labels": task.get_labels_enumeration(),
    "configuration": task.get_configuration_object("opt"), "clone": clone.get_parameters()["Hyp/lr0"], "script": task.get_script(),
}))
"""


def test_a_run_is_stored_whole_and_the_real_sdk_reads_and_clones_it(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    task = tell_a_whole_run(tracker_of(server, tmp_path), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, task], capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, **server.environment, "HOME": str(tmp_path), "CLEARML_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert (read["project"], read["name"], read["status"]) == ("blood/cells", "name-u1", "completed")
    assert read["parameters"]["Args/epochs"] == "3"
    assert read["parameters"]["Args/freeze"] == "[0]"
    assert read["parameters"]["Hyp/lr0"] == "0.01"
    assert read["parameters"]["properties/device"] == "cpu"
    assert read["parameters"]["Datasets/blood"] == "d" * 32
    assert read["scalars"]["train"]["box_loss"]["x"] == [0, 1, 2]
    assert read["scalars"]["metrics"]["mAP_0.5"]["y"] == [0.0, 0.1, 0.2]
    assert read["scalars"][":monitor:machine"]["cpu_utilization_percentage"]["x"] == [2]
    assert read["plots"] == ["confusion matrix", "confusion_matrix", "p0"]
    assert Path(read["artifacts"]["results.csv"]).read_text() == "epoch,loss\n0,1\n"
    assert Path(read["models"]["name-u1 best"]).read_bytes() == (tmp_path / "best.pt").read_bytes()
    assert set(read["models"]) == {"name-u1 best", "name-u1 epoch1"}
    assert read["labels"] == {"RBC": 0, "WBC": 1}
    assert read["configuration"] == "epochs: 3\n"
    assert read["clone"] == "0.002"
    assert read["script"]["entry_point"]
    stored = server.records.tasks[task]
    assert "torch == " in stored["script"]["requirements"]["pip"]
    assert stored["last_iteration"] == 2
    assert stored["runtime"]["cpu_cores"] == str(os.cpu_count())
    assert "epoch 1/3" in server.records.console(task)


@pytest.mark.slow
def test_every_request_has_the_fields_and_types_that_the_sdk_knows(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    """The double takes any field; the SDK's own request classes, made of the server's schemas, do not."""
    from clearml.backend_api.services.v2_9 import projects
    from clearml.backend_api.services.v2_23 import events, models, tasks

    tell_a_whole_run(tracker_of(server, tmp_path), tmp_path)
    services = {"tasks": tasks, "models": models, "projects": projects}
    checked = set()
    for request in server.requests:
        service, _, action = request.endpoint.partition(".")
        if service in services:
            name = "".join(word.title() for word in action.split("_")) + "Request"
            getattr(services[service], name)(**request.body).validate()
            checked.add(request.endpoint)
    assert {"tasks.create", "tasks.started", "tasks.edit", "tasks.edit_hyper_params", "models.create", "tasks.completed",
            "tasks.add_or_update_artifacts", "tasks.add_or_update_model", "projects.create"} <= checked  # fmt: skip
    kinds = {"training_stats_scalar": events.MetricsScalarEvent, "plot": events.MetricsPlotEvent,
             "training_debug_image": events.MetricsImageEvent, "log": events.TaskLogEvent}  # fmt: skip
    sent = [event for request in server.asked("events.add_batch") for event in request.body]
    for event in sent:
        made = kinds[event["type"]](**{name: value for name, value in event.items() if name != "type"})
        if event["type"] == "log":  # its schema refers to a part that the SDK leaves out
            assert events.LogLevelEnum(event["level"])
        else:
            made.validate()
    assert {event["type"] for event in sent} == set(kinds)


@pytest.mark.slow
def test_after_the_real_clearml_init_a_run_is_tracked_with_nothing_else_set(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    pasted = f"""api {{
      web_server: http://127.0.0.1:8080
      api_server: {server.api_url}
      files_server: {server.files_url}
      credentials {{
        "access_key" = "{ACCESS_KEY}"
        "secret_key" = "{SECRET_KEY}"
      }}
    }}
    """
    program = Path(sys.executable).with_name("clearml-init")
    done = subprocess.run([str(program), "--file", str(tmp_path / "clearml.conf")], input=pasted + "\n" * 8, text=True,
                          capture_output=True, timeout=100, env={**os.environ, "HOME": str(tmp_path)}, check=False)  # fmt: skip
    assert "Credentials verified" in done.stdout, done.stdout + done.stderr
    tracker = ClearmlTracker(tmp_path, {"HOME": str(tmp_path)})
    assert server.records.tasks[tracker.start_run(a_run())]["name"] == "name-u1"


def test_images_of_each_epoch_stand_at_their_epoch_in_files_of_their_own(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    task = tell_a_whole_run(tracker_of(server, tmp_path), tmp_path)
    images = server.records.of_type(task, "training_debug_image")
    assert [image["iter"] for image in images] == [0, 1, 2]
    stored = [server.upload(image["url"]).read_bytes() for image in images]
    assert stored == [(tmp_path / f"p{step}.png").read_bytes() for step in range(3)]


def test_everything_may_be_told_twice(server: ClearmlServerDouble, tmp_path: Path) -> None:
    first, second = (tell_a_whole_run(tracker_of(server, tmp_path), tmp_path) for _ in range(2))
    assert first == second
    assert len(server.records.tasks) == 1
    task = server.records.tasks[first]
    assert task["status"] == "completed"
    assert [point[0] for point in server.records.scalars(first)["train", "box_loss"]] == [0, 1, 2]
    assert len(server.records.models) == len(task["models"]["output"]) == 2
    assert len(task["execution"]["artifacts"]) == 2
    assert len(server.records.of_type(first, "training_debug_image")) == 3


def test_a_resumed_run_goes_on_as_the_same_task(server: ClearmlServerDouble, tmp_path: Path) -> None:
    tracker = tracker_of(server, tmp_path)
    task = tracker.start_run(a_run())
    tracker.end_run(task, "killed", "stopped by SIGTERM", time=1e9)
    assert server.records.tasks[task]["status"] == "stopped"
    server.records.answer("tasks.clone", {"task": task})
    assert tracker_of(server, tmp_path).start_run(a_run(params={**PARAMS, "epochs": 5})) == task
    assert server.records.tasks[task]["status"] == "in_progress"
    assert server.records.arguments(server.records.tasks[task])["epochs"] == "5"


def test_candidates_are_children_of_the_search_and_pruned_ones_say_so(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    tracker = tracker_of(server, tmp_path)
    child = tracker.start_run(a_run("c1", parent_uuid="study", parent_name="evolve"))
    parent = tracker.start_run(a_run("study", name="evolve", params={**PARAMS, "evolve": 6}))
    tracker.end_run(child, "pruned", "fell behind", time=1e9)
    tasks = server.records.tasks
    assert tasks[child]["parent"] == parent
    assert tasks[parent]["type"] == "optimizer"
    assert (tasks[child]["status"], tasks[child]["tags"]) == ("completed", ["pruned"])
    assert server.records.arguments(tasks[parent])["evolve"] == "6"


def test_in_an_agent_the_run_is_the_agents_task_and_the_console_is_the_agents(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    given = server.records.answer(
        "tasks.create", {"name": "from the page", "type": "training", "system_tags": ["starling-old"]}
    )
    server.records.answer("tasks.started", {"task": given["id"]})
    tracker = tracker_of(server, tmp_path, STARLING_CLEARML_TASK=given["id"])
    assert tracker.start_run(a_run("u9")) == given["id"]
    tracker.log_console(given["id"], "said twice", lambda: "", time=1e9)
    assert server.records.console(given["id"]) == ""
    tracker.end_run(given["id"], "failed", "NaN loss", time=1e9)
    assert server.records.tasks[given["id"]]["status"] == "in_progress", (
        "the agent sets it when the process has ended"
    )
    assert (
        server.records.arguments(server.records.tasks[given["id"]], "properties")["ended"]
        == "failed: NaN loss"
    )
    assert server.records.tasks[given["id"]]["system_tags"] == ["starling", uuid_tag("u9")]
    # Resumed by hand, outside the agent:
    by_hand = tracker_of(server, tmp_path)
    assert by_hand.start_run(a_run("u9")) == given["id"]
    by_hand.end_run(given["id"], "finished", "", time=1e9)
    task = server.records.tasks[given["id"]]
    assert (task["status"], server.records.arguments(task, "properties")["ended"]) == (
        "completed",
        "finished",
    )


def test_what_is_not_finite_is_told_in_the_console_and_the_rest_is_plotted(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    tracker = tracker_of(server, tmp_path)
    task = tracker.start_run(a_run())
    tracker.log_metrics(task, {"train/box_loss": math.nan, "train/obj_loss": 1.0}, step=4, time=1e9)
    assert server.records.scalars(task) == {("train", "obj_loss"): [(4, 1.0)]}
    assert "epoch 5: not finite, so not plotted: train/box_loss nan" in server.records.console(task)


def test_a_task_that_is_gone_is_a_refusal(server: ClearmlServerDouble, tmp_path: Path) -> None:
    tracker = tracker_of(server, tmp_path)
    with pytest.raises(TrackerRejectedError, match="Invalid task id"):
        tracker.log_metrics("0" * 32, {"loss": 1.0}, step=0, time=1e9)


def test_an_expired_token_is_renewed_and_refused_credentials_keep_the_events(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    tracker = tracker_of(server, tmp_path)
    task = tracker.start_run(a_run())
    server.revoke_tokens()
    tracker.log_metrics(task, {"loss": 1.0}, step=0, time=1e9)
    assert len(server.asked("auth.login")) == 2
    wrong = tracker_of(server, tmp_path, CLEARML_API_SECRET_KEY="not-the-key")
    with pytest.raises(TrackerUnavailableError, match="refuses the credentials; make new ones"):
        wrong.start_run(a_run())


def write_log(runs: Path, epochs: int = 3) -> EventLog:
    log = EventLog(runs / "train" / "exp" / "events.jsonl", "u1")
    log.append("run_start", name="exp", project="train", dir=log.path.parent, params=PARAMS)
    for step in range(epochs):
        log.append("metrics", step=step, values={"train/box_loss": step / 10})
    return log


def test_a_server_that_dies_in_mid_run_and_comes_back_has_the_whole_run_once(
    server: ClearmlServerDouble,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = write_log(tmp_path, epochs=2)
    tracker = tracker_of(server, tmp_path)
    Bridge(log.path, tracker).deliver()
    server.stop()
    log.append("metrics", step=2, values={"train/box_loss": 0.2})
    log.append("run_end", status="finished")
    log.append("log_end")
    began = time.monotonic()
    assert follow(Bridge(log.path, tracker), poll_s=0.05) == 1
    assert time.monotonic() - began < 15
    said = capsys.readouterr().err
    assert "kept, and tried again" in said
    assert SECRET_KEY not in said + "".join(path.read_text() for path in log.path.parent.iterdir())
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    assert track.main(["sync", str(tmp_path), "--tracker", "clearml"]) == 1
    server.start()
    assert track.main(["sync", str(tmp_path), "--tracker", "clearml"]) == 0
    [task] = server.records.tasks.values()
    assert task["status"] == "completed"
    assert server.records.scalars(task["id"]) == {("train", "box_loss"): [(0, 0.0), (1, 0.1), (2, 0.2)]}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500),
        Answer(503),
        Answer(429, headers={"Retry-After": "3600"}),
        Answer(200),
        Answer(200, b"[1]"),
        Answer(200, b'{"meta": {"result_code": 200, "result_msg": "OK"}, "data": {"token": 3}}'),
        Answer(
            200,
            b'{"meta": {"result_code": 200, "result_msg": "OK"}, "data": {"token": "t", "tasks": 3, "projects": 3}}',
        ),
        Answer(200, b'{"meta":' + b"[" * 100_000),
    ],
    ids=["500", "503", "429", "html", "a list", "no token", "wrong shape", "deep"],
)
def test_nonsense_and_busy_answers_are_an_outage_and_cost_little(
    server: ClearmlServerDouble, tmp_path: Path, answer: Answer
) -> None:
    server.faults.answer = answer
    began = time.monotonic()
    with pytest.raises(TrackerUnavailableError, match="ClearML"):
        tracker_of(server, tmp_path).start_run(a_run())
    assert time.monotonic() - began < 5


def test_a_redirect_is_not_followed(server: ClearmlServerDouble, tmp_path: Path) -> None:
    with ClearmlServerDouble(tmp_path / "elsewhere") as elsewhere:
        tracker = tracker_of(server, tmp_path)
        task = tracker.start_run(a_run())
        server.faults.answer = Answer(307, b"", {"Location": f"{elsewhere.api_url}/auth.login"})
        (tmp_path / "a.csv").write_text("1")
        for call in (
            lambda: tracker.log_metrics(task, {"loss": 1.0}, step=0, time=1e9),
            lambda: tracker.log_artifact(task, tmp_path / "a.csv", "", kind="table"),
        ):
            with pytest.raises(TrackerUnavailableError, match="redirect"):
                call()
        assert elsewhere.requests == []


def test_a_slow_server_is_waited_for_no_longer_than_the_limit(
    server: ClearmlServerDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_of(server, tmp_path)
    monkeypatch.setattr(tracker._api, "_read_s", 0.3)
    server.faults.delay_s = 2.0
    began = time.monotonic()
    with pytest.raises(TrackerUnavailableError, match="timed out"):
        tracker.start_run(a_run())
    assert time.monotonic() - began < 1.5


def test_an_image_the_file_server_refuses_is_left_out_and_the_run_goes_on(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    tracker = tracker_of(server, tmp_path)
    task = tracker.start_run(a_run())
    server.faults.answer, server.faults.only = Answer(413), "files"
    _draw(tmp_path / "p.png", 1)
    with pytest.raises(TrackerRejectedError, match="413"):
        tracker.log_image(task, tmp_path / "p.png", "labels", step=0, time=1e9)
    assert server.records.of_type(task, "training_debug_image") == []

"""What every tracker does, run over real MLflow: on its embedded SQLite database, and behind a real server."""

from __future__ import annotations

import base64
import contextlib
import csv
import http.server
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from starling.cli import track
from starling.core.redaction import without_credentials
from starling.outputs.run_dir import RunDir
from starling.progress import Silence, on_console
from starling.tracking import process as bridge_process
from starling.tracking.bridge import follow
from starling.tracking.cursor import Cursor, cursor_path
from starling.tracking.delivery import Bridge
from starling.tracking.events import EventLog
from starling.tracking.mlflow import ui_server
from starling.tracking.mlflow.client import CLIENT_LIMITS
from starling.tracking.mlflow.database import database_uri
from starling.tracking.mlflow.names import flat_params, metric_key
from starling.tracking.mlflow.tracker import PARENT_TAG, UUID_TAG, MlflowTracker
from starling.tracking.process import start_bridges
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    TrackerRejectedError,
    TrackerUnavailableError,
)
from starling.tracking.trackers import TRACKERS
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import LOSSES, EpochRow, columns_of, write_results
from tests.conftest import CELL_DETECTOR, MINI_SET, PYTHON_PATH

pytest.importorskip("mlflow")


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """The client's limits are set for the process; they leave with this module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CLIENT_LIMITS.items():
            patch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN", "MLFLOW_KEEP_RUN_ACTIVE"):
            patch.delenv(name, raising=False)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Place:
    """Somewhere runs are kept, and the environment that leads there."""

    runs: Path
    environment: dict[str, str]
    uri: str
    artifacts: Path

    def tracker(self, **environment: str) -> MlflowTracker:
        return MlflowTracker(self.runs, {**self.environment, **environment})

    @property
    def client(self) -> Any:
        from mlflow.tracking.client import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def stored(self, project: str) -> dict[str, Any]:
        """Return the stored runs of an experiment by our UUID; fails if one UUID has two runs."""
        experiment = self.client.get_experiment_by_name(project)
        found = self.client.search_runs([experiment.experiment_id])
        by_uuid = {run.data.tags[UUID_TAG]: run for run in found}
        assert len(by_uuid) == len(found)
        return by_uuid


def embedded(runs: Path) -> Place:
    return Place(runs, {}, database_uri(runs), runs / "mlflow" / "artifacts")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a real MLflow server, and return the runs folder that it serves."""
    runs = tmp_path_factory.mktemp("server")
    ui_server.start(runs, host="127.0.0.1", port=free_port())
    try:
        yield runs
    finally:
        ui_server.stop(runs)


def behind(server: Path) -> Place:
    running = ui_server.find(server)
    assert running is not None
    environment = {"MLFLOW_TRACKING_URI": running.url}
    return Place(server / "client", environment, running.url, server / "mlflow" / "artifacts")


@pytest.fixture(scope="module", params=["embedded", pytest.param("server", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    if request.param == "embedded":
        return embedded(tmp_path_factory.mktemp("embedded"))
    return behind(request.getfixturevalue("server"))


def a_run(uuid: str, project: str, **changes: Any) -> Run:
    fields: dict[str, Any] = {"name": f"name-{uuid}", "time": 1e9, "params": {}, "tags": {}, **changes}
    return Run(uuid=uuid, project=project, **fields)


def test_a_run_is_stored_whole(place: Place, tmp_path: Path) -> None:
    tracker = place.tracker()
    run_id = tracker.start_run(
        a_run("u1", "whole", params={"epochs": 3, "hyp": {"lr0": 0.01}}, tags={"dataset": "bccd"})
    )
    tracker.log_metrics(
        run_id, {"metrics/mAP_0.5:0.95": 0.25, "precision(B)": math.nan}, step=2, time=1e9 + 5
    )
    (tmp_path / "best.pt").write_bytes(b"weights")
    tracker.log_artifact(run_id, tmp_path / "best.pt", "weights")
    tracker.end_run(run_id, "finished", "", time=1e9 + 9)
    stored = place.stored("whole")["u1"]
    assert stored.info.run_name == "name-u1"
    assert stored.info.status == "FINISHED"
    assert (stored.info.start_time, stored.info.end_time) == (10**12, 10**12 + 9000)
    assert stored.data.params == {"epochs": "3", "hyp.lr0": "0.01"}
    assert stored.data.tags["dataset"] == "bccd"
    assert stored.data.metrics["metrics/mAP_0.5:0.95"] == 0.25
    assert math.isnan(stored.data.metrics["precision_B"])
    [point] = place.client.get_metric_history(run_id, "metrics/mAP_0.5:0.95")
    assert (point.step, point.timestamp) == (2, 10**12 + 5000)
    [artifact] = place.artifacts.rglob("best.pt")
    assert artifact.parent.name == "weights"
    assert artifact.read_bytes() == b"weights"


def test_datasets_images_console_and_samples_are_stored_once_however_often_told(
    place: Place, tmp_path: Path
) -> None:
    from PIL import Image

    image = tmp_path / "val_batch0_pred_epoch3.jpg"
    Image.new("RGB", (400, 300), "red").save(image)
    data = DatasetInput(role="train", name="bccd", digest="d" * 64, source="/data/bccd.yaml",
                        figures={"images": 8}, classes=("RBC", "WBC"))  # fmt: skip
    for tracker in (place.tracker(), place.tracker()):
        run_id = tracker.start_run(a_run("u1", "inputs"))
        tracker.log_dataset(run_id, data)
        tracker.log_image(run_id, image, "val_batch0_pred", step=3, time=1e9)
        tracker.log_console(run_id, "two", lambda: "one\ntwo\n", time=1e9)
        tracker.log_system(run_id, {"system/cpu_utilization_percentage": 50.0}, step=10, time=1e9)
        tracker.flush(last=True)
    stored = place.stored("inputs")["u1"]
    [used] = stored.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("bccd", "d" * 36)
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert stored.data.tags["mlflow.loggedImages"] == "True"
    folder = next(place.artifacts.rglob("console.log")).parent
    assert (folder / "console.log").read_text() == "one\ntwo\n"
    whole, small = sorted(path.name for path in (folder / "images").iterdir())[::-1]
    assert re.fullmatch(r"val_batch0_pred\+step\+3\+timestamp\+1000000000000\+\w{32}\.png", whole)
    assert small == whole.replace(".png", "+compressed.webp")
    history = place.client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in history] == [(10, 50.0)]


def test_everything_may_be_told_twice(place: Place) -> None:
    for tracker in (place.tracker(), place.tracker()):
        run_id = tracker.start_run(a_run("u1", "twice", params={"epochs": 3}))
        tracker.log_metrics(run_id, {"loss": 0.5}, step=0, time=1e9)
        tracker.end_run(run_id, "failed", "NaN loss", time=1e9)
    stored = place.stored("twice")["u1"]
    assert stored.info.status == "FAILED"
    assert stored.data.tags["starling.reason"] == "NaN loss"
    assert len(place.client.get_metric_history(run_id, "loss")) == 1


def test_a_resumed_run_goes_on_as_the_same_run_and_names_what_changed(place: Place) -> None:
    begun, resumed = (
        {"epochs": 3, "seed": 0, "resume": ""},
        {"epochs": 5, "seed": 0, "resume": "last.pt", "new": 1},
    )
    first = place.tracker().start_run(a_run("u1", "resumed", params=begun))
    place.tracker().end_run(first, "killed", "", time=1e9)
    assert place.tracker().start_run(a_run("u1", "resumed", params=resumed)) == first
    stored = place.stored("resumed")["u1"]
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"epochs": "3", "seed": "0", "resume": "", "new": "1"}
    assert stored.data.tags["starling.changed_on_resume"] == "epochs: 3 -> 5"


def test_what_an_earlier_end_said_is_taken_back_by_a_resume_but_no_note_of_the_users(place: Place) -> None:
    def said() -> dict[str, str]:
        names = ("starling.status", "starling.reason", "mlflow.note.content")
        tags = place.stored("ended")["u1"].data.tags
        return {name.rpartition(".")[2]: tags[name] for name in names if name in tags}

    def end(status: str, reason: str = "", **environment: str) -> None:
        tracker = place.tracker(**environment)
        tracker.end_run(tracker.start_run(a_run("u1", "ended")), status, reason, time=1e9)

    end("killed", "out of memory")
    assert said() == {"status": "killed", "reason": "out of memory", "content": "out of memory"}
    run_id = place.tracker().start_run(a_run("u1", "ended"))
    assert said() == {}
    end("finished", MLFLOW_KEEP_RUN_ACTIVE="true")
    assert said() == {"status": "finished", "content": "finished"}
    assert place.stored("ended")["u1"].info.status == "RUNNING"
    place.client.set_tag(run_id, "mlflow.note.content", "my best run")
    end("failed", "NaN loss")
    assert said() == {"status": "failed", "reason": "NaN loss", "content": "my best run"}


def test_candidates_are_children_of_the_search_whichever_comes_first(place: Place) -> None:
    child = a_run("c1", "search", parent_uuid="study", parent_name="evolve")
    place.tracker().start_run(child)
    parent_id = place.tracker().start_run(a_run("study", "search", name="evolve", params={"evolve": 60}))
    place.tracker().start_run(a_run("c2", "search", parent_uuid="study", parent_name="evolve"))
    stored = place.stored("search")
    assert stored.keys() == {"study", "c1", "c2"}
    assert {stored[uuid].data.tags[PARENT_TAG] for uuid in ("c1", "c2")} == {parent_id}
    assert stored["study"].data.params == {"evolve": "60"}


def test_names_of_experiment_and_run_come_from_the_environment_first(place: Place) -> None:
    tracker = place.tracker(MLFLOW_EXPERIMENT_NAME="named", MLFLOW_RUN="mine")
    tracker.start_run(a_run("c1", "project", parent_uuid="study", parent_name="evolve"))
    stored = place.stored("named")
    assert stored["study"].info.run_name == "mine"
    assert stored["c1"].info.run_name == "name-c1"


def test_a_run_may_be_kept_active(place: Place) -> None:
    tracker = place.tracker(MLFLOW_KEEP_RUN_ACTIVE="True")
    tracker.end_run(tracker.start_run(a_run("u1", "active")), "finished", "", time=1e9)
    assert place.stored("active")["u1"].info.status == "RUNNING"


def test_a_run_that_is_gone_is_a_refusal(place: Place) -> None:
    tracker = place.tracker()
    run_id = tracker.start_run(a_run("u1", "gone"))
    with pytest.raises(TrackerRejectedError, match="MLflow"):
        tracker.log_metrics("0" * len(run_id), {"loss": 1.0}, step=0, time=1e9)


def test_a_deleted_experiment_keeps_the_events_and_names_the_remedy(place: Place) -> None:
    place.tracker().start_run(a_run("u1", "removed"))
    place.client.delete_experiment(place.client.get_experiment_by_name("removed").experiment_id)
    with pytest.raises(TrackerUnavailableError, match="restore"):
        place.tracker().start_run(a_run("u2", "removed"))


def test_long_names_values_and_many_parameters_are_taken(place: Place) -> None:
    params = {f"{'k' * 400}{index}": "v" * 9000 for index in range(3)} | {
        f"p{index}": index for index in range(250)
    }
    place.tracker().start_run(a_run("u1", "long", params=params))
    stored = place.stored("long")["u1"].data.params
    assert len(stored) == 253
    assert max(map(len, stored)) <= 250


# Behind a real server only.


def request(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POST JSON; return the status and the answer's JSON."""
    asked = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextlib.contextmanager
def served(model: str, tracking_uri: str, log: Path) -> Iterator[str]:
    """Run `mlflow models serve` as the documentation says, and return its address once it answers."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "--model-uri",
        model,
        "--env-manager",
        "local",
    ]
    # As in an environment that is activated: it starts uvicorn by name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "PATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_best_weights_are_a_model_that_is_promoted_by_its_metric_and_answers_for_an_image(
    server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = behind(server)
    tracker = MlflowTracker(place.runs, place.environment, register=True)
    run_id = tracker.start_run(a_run("u1", "blood/cells", params={"imgsz": 320}))
    model = ModelFile(
        path=CELL_DETECTOR, name="best", step=4, values={"metrics/mAP_0.5": 0.6, "metrics/mAP_0.5:0.95": 0.41}
    )
    tracker.log_metrics(run_id, {"metrics/mAP_0.5": 0.6}, step=4, time=1e9)
    for _ in range(2):
        tracker.log_model(run_id, model)
    assert len(place.client.get_metric_history(run_id, "metrics/mAP_0.5")) == 1
    [offered] = place.client.search_logged_models([place.client.get_run(run_id).info.experiment_id])
    assert [(metric.key, metric.value, metric.step) for metric in offered.metrics] == [
        ("metrics/mAP_0.5", 0.6, 4)
    ]
    [version] = place.client.search_model_versions("name='blood-cells'")
    assert place.client.get_model_version_by_alias("blood-cells", "candidate").version == version.version

    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    gate = ["promote", run_id, "--metric", "mAP_0.5:0.95", "--runs", str(place.runs)]
    assert track.main([*gate, "--at-least", "0.42"]) == 1
    assert "0.41 is below 0.42" in capsys.readouterr().err
    assert track.main([*gate, "--at-least", "0.4", "--better-than", "production"]) == 0
    assert "blood-cells version 1 is production now" in capsys.readouterr().out
    worse = tracker.start_run(a_run("u2", "blood/cells", params={"imgsz": 320}))
    place.client.create_model_version("blood-cells", f"{place.client.get_run(worse).info.artifact_uri}/model", run_id=worse,
                                      tags={"metric.metrics/mAP_0.5:0.95": "0.405"})  # fmt: skip
    gate[1] = worse
    assert track.main([*gate, "--at-least", "0.4", "--better-than", "production"]) == 1
    assert "0.405 is not better than production's 0.41" in capsys.readouterr().err
    assert (
        track.main(["promote", worse, "--metric", "mAP", "--at-least", "0", "--runs", str(place.runs)]) == 2
    )
    assert "known: metrics/mAP_0.5:0.95" in capsys.readouterr().err
    assert place.client.get_model_version_by_alias("blood-cells", "production").version == version.version

    image = min((MINI_SET / "images" / "val").glob("*.jpg"))
    text = base64.b64encode(image.read_bytes()).decode()
    with served("models:/blood-cells@production", place.uri, tmp_path / "serve.log") as url:
        body = {
            "dataframe_split": {"columns": ["image"], "data": [[text], [f"data:image/jpeg;base64,{text}"]]}
        }
        status, answer = request(f"{url}/invocations", body)
        assert status == 200, answer
        first, second = (row["detections"] for row in answer["predictions"])
        assert first == second
        assert_cells_are_found(first, image)
        _, none = request(
            f"{url}/invocations", {"inputs": {"image": [text]}, "params": {"confidence": 0.999}}
        )
        assert none["predictions"] == [{"detections": []}]
        status, answer = request(f"{url}/invocations", {"inputs": {"image": ["bm8gcGljdHVyZQ=="]}})
        assert (status, "row 0" in answer["message"]) == (400, True)


def assert_cells_are_found(detections: list[dict[str, Any]], image: Path) -> None:
    """Hold a served model's answer against the image's labels, in its own pixels."""
    import numpy as np
    import torch

    from starling.boxes.geometry import iou_matrix, xywhn_to_xyxy
    from starling.data.dataset.images import decode_image

    height, width = decode_image(image).shape[:2]
    labels = np.loadtxt(image.parents[2] / "labels/val" / f"{image.stem}.txt", ndmin=2)
    there = xywhn_to_xyxy(torch.from_numpy(labels[:, 1:]).float(), (height, width))
    found = torch.tensor([detection["box"] for detection in detections])
    assert len(found) >= len(labels) // 2
    assert {detection["name"] for detection in detections} <= {"RBC", "WBC", "Platelets"}
    hits = iou_matrix(found, there).amax(1) > 0.5
    assert hits.float().mean() > 0.6, detections


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_run_has_every_row_of_results_once_when_it_is_back(
    server: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: list[str],
) -> None:
    running = ui_server.find(server)
    assert running is not None
    place = behind(server)
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    monkeypatch.setattr(bridge_process, "wanted_trackers", lambda: [TRACKERS["mlflow"]])
    run = RunDir(tmp_path / "killed" / "exp")
    log = EventLog(run.events, "u1")
    bridges = start_bridges(log)
    progress = Silence()
    reporter = Reporter(RunLabel("u1", "killed", "exp"), run.path, progress=progress, events=log)
    reporter.started({}, {})
    rows = [EpochRow(n, (0.1 * n, 0.2, 0.3), (0.4, 0.5, 0.06 * n, 0.07 * n), (1.0, 2.0, 3.0), (0.1, 0.01, 0.001))
            for n in range(12)]  # fmt: skip

    def train(epochs: slice) -> None:
        for row in rows[epochs]:
            write_results(run.results_csv, rows[: row.epoch + 1])
            with on_console(progress):
                reporter.epoch_ended(row, len(rows), 8, best=False)
            bridges.check()

    train(slice(0, 4))
    wait_until(lambda: Cursor.load(log.path, "mlflow", place.tracker().destination(run.path)).sent > 2)
    os.killpg(running.pid, signal.SIGKILL)
    train(slice(4, 8))
    wait_until(lambda: bool(json.loads(cursor_path(log.path, "mlflow").read_bytes())["problem"]))
    bridges.check()
    train(slice(8, 12))
    reporter.ended("finished")
    assert bridges.finish(timeout_s=30) is False
    (warning,) = [line for line in said if line.startswith("tracking: ")]
    assert f"starling track sync {run.path}" in warning
    capsys.readouterr()
    assert track.main(["status", str(run.path)]) == 1
    assert re.search(r"mlflow: \d+ sent, \d+ pending \(MLflow: ", capsys.readouterr().out)

    bridges.handles[0].process.wait(60)
    ui_server.start(server, host="127.0.0.1", port=urlsplit(place.uri).port or 0)
    assert track.main(["sync", str(run.path), "--tracker", "mlflow"]) == 0
    assert track.main(["sync", str(run.path), "--tracker", "mlflow", "--from-start"]) == 0
    stored = place.stored("killed")["u1"]
    assert stored.info.status == "FINISHED"
    with open(run.results_csv) as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12
    for column in columns_of(LOSSES)[1:]:
        history = place.client.get_metric_history(stored.info.run_id, column)
        assert [(str(point.step), f"{point.value:.6g}") for point in history] == [
            (row["epoch"], row[column]) for row in table
        ]


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if happened():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Over the embedded database only, from here on.


def write_worker_log(runs: Path, worker: int) -> Path:
    """Write what one worker of a search appends: the search's run and two candidates of its own."""
    log = EventLog(runs / "search" / "workers" / f"w{worker}" / "events.jsonl")
    log.append(
        "run_start", run="study", name="evolve", project="p", dir=runs / "search", params={"evolve": 6}
    )
    for number in range(2):
        uuid = f"c{worker}-{number}"
        directory = runs / "search" / uuid
        directory.mkdir(parents=True)
        (directory / "results.csv").write_text("epoch\n0\n")
        log.append(
            "run_start",
            run=uuid,
            name=uuid,
            project="p",
            dir=directory,
            parent={"uuid": "study", "name": "evolve"},
        )
        for step in range(3):
            log.append("metrics", run=uuid, step=step, values={"metrics/mAP_0.5": step / 10})
        log.append("artifact", run=uuid, path="results.csv", kind="table")
        log.append("run_end", run=uuid, status="pruned" if number else "finished")
    log.append("log_end")
    return log.path


@pytest.mark.slow
def test_bridges_of_several_workers_share_one_new_database_and_one_parent(tmp_path: Path) -> None:
    logs = [write_worker_log(tmp_path, worker) for worker in range(3)]
    environment = {**os.environ, "STARLING_RUNS": str(tmp_path), "PYTHONPATH": PYTHON_PATH}
    bridges = [
        subprocess.Popen(
            [sys.executable, "-m", "starling.tracking.bridge", str(log)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        for log in logs
    ]
    outputs = [bridge.communicate(timeout=300) for bridge in bridges]  # at low priority on a busy machine
    assert [bridge.returncode for bridge in bridges] == [0, 0, 0], outputs
    assert outputs == [(b"", b"")] * 3
    stored = embedded(tmp_path).stored("p")
    assert len(stored) == 7
    parent_id = stored["study"].info.run_id
    assert all(run.data.tags[PARENT_TAG] == parent_id for uuid, run in stored.items() if uuid != "study")
    assert stored["c0-1"].data.tags["starling.pruned"] == "true"
    assert len(list((tmp_path / "mlflow" / "artifacts").rglob("results.csv"))) == 6
    assert not (tmp_path / "mlruns").exists()


def test_an_unreachable_server_costs_little_and_sync_sends_it_all_when_it_is_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_worker_log(tmp_path, 0)
    away = MlflowTracker(tmp_path, {"MLFLOW_TRACKING_URI": f"http://user:secret@127.0.0.1:{free_port()}"})
    began = time.monotonic()
    assert follow(Bridge(log, away), poll_s=0.05) == 1
    assert time.monotonic() - began < 15
    kept = "".join(path.read_text() for path in log.parent.iterdir()) + capsys.readouterr().err
    assert "secret" not in kept
    # Back: here, the embedded database takes the server's part.
    arguments = ["sync", str(tmp_path), "--runs", str(tmp_path), "--json"]
    assert track.main(arguments) == 0
    assert '"problem": ""' in capsys.readouterr().out
    assert len(embedded(tmp_path).stored("p")) == 3
    assert track.main([*arguments, "--from-start"]) == 0
    stored = embedded(tmp_path).stored("p")
    assert len(stored) == 3
    history = embedded(tmp_path).client.get_metric_history(stored["c0-0"].info.run_id, "metrics/mAP_0.5")
    assert [point.step for point in history] == [0, 1, 2]


class HostileServerDouble(http.server.BaseHTTPRequestHandler):
    """Answers each request with what `answer` says, and counts requests by path."""

    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    paths: list[str]

    def _answer(self) -> None:
        type(self).paths.append(self.path)
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hostile_server(status: int, headers: dict[str, str], body: bytes) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (HostileServerDouble,), {"answer": (status, headers, body), "paths": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b"<html>"), (200, b"<html>"), (200, b"[1]"), (200, b'{"experiment": 3}'), (403, b"no")],
)
def test_nonsense_from_a_server_is_an_outage(tmp_path: Path, status: int, body: bytes) -> None:
    with hostile_server(status, {"Retry-After": "3600"}, body) as (url, _):
        began = time.monotonic()
        with pytest.raises(TrackerUnavailableError):
            MlflowTracker(tmp_path, {"MLFLOW_TRACKING_URI": url}).start_run(a_run("u1", "p"))
        assert time.monotonic() - began < 10


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        hostile_server(200, {}, b"{}") as (elsewhere, asked),
        hostile_server(307, {"Location": f"{elsewhere}/x"}, b"") as (url, _),
    ):
        with pytest.raises(TrackerUnavailableError):
            MlflowTracker(tmp_path, {"MLFLOW_TRACKING_URI": url}).start_run(a_run("u1", "p"))
        assert asked == []


@pytest.mark.parametrize(
    "place_chosen", ["file://{tmp}/out", "mlflow-artifacts://127.0.0.1:9/x", "s3://bucket/x"]
)
def test_a_server_cannot_send_artifacts_to_a_folder_or_to_a_third_party(
    tmp_path: Path, place_chosen: str
) -> None:
    (tmp_path / "a.csv").touch()
    location = place_chosen.format(tmp=tmp_path)
    body = f'{{"run": {{"info": {{"run_id": "r", "run_uuid": "r", "artifact_uri": "{location}"}}, "data": {{}}}}}}'
    with hostile_server(200, {}, body.encode()) as (url, asked):
        tracker = MlflowTracker(tmp_path, {"MLFLOW_TRACKING_URI": url})
        with pytest.raises(TrackerRejectedError, match="--serve-artifacts"):
            tracker.log_artifact("r", tmp_path / "a.csv", "")
        assert all("runs/get" in path for path in asked)
    assert not (tmp_path / "out").exists()


def test_the_trainers_side_runs_a_real_bridge_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path))
    log = EventLog(tmp_path / "train" / "exp" / "events.jsonl", "u1")
    bridges = start_bridges(log)
    log.append("run_start", name="exp", project="train", dir=log.path.parent)
    log.append("metrics", step=0, values={"loss": 1.0})
    log.append("run_end", status="finished")
    assert bridges.finish(timeout_s=60), (log.path.parent / "bridge.log").read_text()
    assert said == []
    assert embedded(tmp_path).stored("train")["u1"].info.status == "FINISHED"


def test_names_and_addresses_are_made_safe() -> None:
    assert metric_key("metrics/mAP_0.5:0.95") == "metrics/mAP_0.5:0.95"
    assert metric_key("precision(B)") == "precision_B"
    assert metric_key("a" * 300) != metric_key("a" * 299)
    assert flat_params({"hyp": {"lr0": 0.1}, "epochs": 3}) == {"hyp.lr0": "0.1", "epochs": "3"}
    assert without_credentials("at http://me:pw@host:1/x!") == "at http://host:1/x!"


def test_a_taken_port_is_a_usage_error_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert track.main(["ui", "--runs", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port + 1}" in capsys.readouterr().err


def test_stop_without_a_server_and_sync_without_a_log_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track.main(["stop", "--runs", str(tmp_path)]) == 0
    assert "no server" in capsys.readouterr().out
    assert track.main(["sync", str(tmp_path), "--runs", str(tmp_path)]) == 2
    assert "events.jsonl" in capsys.readouterr().err


def test_stop_leaves_a_process_alone_that_only_has_the_servers_old_id(tmp_path: Path) -> None:
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    try:
        server = ui_server.UiServer(
            pid=bystander.pid, start="1", host=socket.gethostname(), url="http://127.0.0.1:1"
        )
        ui_server.write_atomic(ui_server._record(tmp_path), ui_server.json.dumps(ui_server.asdict(server)))
        assert ui_server.stop(tmp_path) is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
def test_ui_starts_once_and_stop_ends_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    try:
        assert track.main(["ui", "--runs", str(tmp_path), "--port", port]) == 0
        assert track.main(["ui", "--runs", str(tmp_path), "--port", port]) == 0
        assert "already" in capsys.readouterr().out
    finally:
        assert track.main(["stop", "--runs", str(tmp_path)]) == 0
    assert f"stopped http://127.0.0.1:{port}" in capsys.readouterr().out
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(port)))

"""What every tracker does, run over real MLflow: on its embedded SQLite database, and behind a real server."""

from __future__ import annotations

import contextlib
import http.server
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app import track
from app.tracking import ui_server
from app.tracking.bridge import follow
from app.tracking.delivery import Bridge
from app.tracking.events import EventLog
from app.tracking.mlflow_names import flat_params, metric_key, without_credentials
from app.tracking.mlflow_tracker import CLIENT_LIMITS, PARENT_TAG, UUID_TAG, MlflowTracker, database_uri
from app.tracking.process import start_bridges
from app.tracking.tracker import Run, TrackerRejectedError, TrackerUnavailableError

pytest.importorskip("mlflow")
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture(scope="module", params=["embedded", pytest.param("server", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    runs = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        yield embedded(runs)
        return
    server, _ = ui_server.start(runs, host="127.0.0.1", port=free_port())
    try:
        environment = {"MLFLOW_TRACKING_URI": server.url}
        yield Place(runs / "client", environment, server.url, runs / "mlflow" / "artifacts")
    finally:
        ui_server.stop(runs)


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
    first = place.tracker().start_run(a_run("u1", "resumed", params={"epochs": 3, "seed": 0}))
    place.tracker().end_run(first, "killed", "", time=1e9)
    assert (
        place.tracker().start_run(a_run("u1", "resumed", params={"epochs": 5, "seed": 0, "new": 1})) == first
    )
    stored = place.stored("resumed")["u1"]
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"epochs": "3", "seed": "0", "new": "1"}
    assert stored.data.tags["starling.changed_on_resume"] == "epochs: 3 -> 5"


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
    environment = {**os.environ, "STARLING_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    bridges = [
        subprocess.Popen(
            [sys.executable, "-m", "app.tracking.bridge", str(log)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        for log in logs
    ]
    outputs = [bridge.communicate(timeout=100) for bridge in bridges]
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path))
    warnings: list[str] = []
    log = EventLog(tmp_path / "train" / "exp" / "events.jsonl", "u1")
    bridges = start_bridges(log, warn=warnings.append)
    log.append("run_start", name="exp", project="train", dir=log.path.parent)
    log.append("metrics", step=0, values={"loss": 1.0})
    log.append("run_end", status="finished")
    assert bridges.finish(timeout_s=60), (log.path.parent / "bridge.log").read_text()
    assert warnings == []
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

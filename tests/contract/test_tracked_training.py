"""Real trainings with real trackers beside them: MLflow's embedded database, and TensorBoard."""

from __future__ import annotations

import csv
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from starling import settings
from starling.cli import train
from starling.config.hyp import Hyp
from starling.search import yolo
from starling.tracking.mlflow.database import database_uri
from starling.tracking.mlflow.tracker import PARENT_TAG
from starling.training.reporting.provenance import code_version
from starling.training.trainer import TrainResult

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give bridges the time that a busy machine needs, and leave models to a test of their own."""
    settings.update({"register": False})
    monkeypatch.setattr("starling.training.training.DRAIN_S", 120)


MINE = """
import pathlib, time
cursor = pathlib.Path("%s")
def on_fit_epoch_end(training):
    training.metrics["mine"] = training.epoch
    until = time.monotonic() + 60
    while training.epoch == 0 and not cursor.exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(2 * (training.epoch == 0))
"""
"""A hook that adds a metric, and makes the first epoch last until the bridge has sampled the machine."""


def stored_runs(runs: Path, experiment: str) -> tuple[Any, list[Any]]:
    from mlflow.tracking.client import MlflowClient

    client = MlflowClient(tracking_uri=database_uri(runs))
    found = client.get_experiment_by_name(experiment)
    return client, list(client.search_runs([found.experiment_id]))


def assert_equals_results(client: Any, run_id: str, table: Path, rows: int) -> None:
    """Hold every metric of a run against results.csv, row for row."""
    with open(table) as file:
        expected = list(csv.DictReader(file))
    assert len(expected) == rows
    for column in expected[0].keys() - {"epoch"}:
        history = client.get_metric_history(run_id, column)
        assert [(str(point.step), f"{point.value:.6g}") for point in history] == [
            (row["epoch"], row[column]) for row in expected if row[column]
        ], column


def test_a_training_and_its_resume_are_one_run_that_equals_results_csv(
    tiny_args: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = tmp_path / "my_hooks.py"
    hooks.write_text(MINE % (runs / "my_project" / "my_name" / "events.mlflow.cursor"))
    words = [*tiny_args, "--project", "my_project", "--name", "my_name", "--hooks", str(hooks)]
    assert train.main([*words, "--save-period", "1"]) == 0
    run = runs / "my_project" / "my_name"
    assert train.main(["--resume", str(run / "weights" / "last.pt"), "--epochs", "3", "--noplots"]) == 0
    assert "not everything is sent" not in capsys.readouterr().out

    client, [stored] = stored_runs(runs, "my_project")
    run_id = stored.info.run_id
    assert (stored.info.run_name, stored.info.status) == ("my_name", "FINISHED")
    assert_equals_results(client, run_id, run / "results.csv", 3)
    assert [point.step for point in client.get_metric_history(run_id, "mine")] == [0, 1, 2]
    assert stored.data.params["batch_size"] == "4"
    assert stored.data.params["hyp/lr0"] == "0.01"
    tags = stored.data.tags
    assert {"seed", "device", "data_digest", "starling.run_uuid"} <= tags.keys()
    assert tags["starling.changed_on_resume"].startswith("epochs: 2 -> 3")
    contexts = {(tag.key, tag.value) for used in stored.inputs.dataset_inputs for tag in used.tags}
    assert contexts == {("mlflow.data.context", "training"), ("mlflow.data.context", "validation")}
    assert "system/cpu_utilization_percentage" in stored.data.metrics
    [folder] = [path.parent for path in (runs / "mlflow" / "artifacts").rglob("console.log")]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"opt.yaml", "hyp.yaml", "results.csv", "results.png", "weights/best.pt", "weights/last.pt",
            "weights/epoch0.pt", "weights/epoch1.pt", "confusion_matrix.png"} <= names  # fmt: skip
    assert sorted(name.split("+")[2] for name in names if name.endswith(".png") and "+step+" in name) == [
        "0",
        "1",
    ]
    assert "epoch 3/3" in (folder / "console.log").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert [point.step for point in events.Scalars("metrics/mAP_0.5:0.95")] == [0, 1, 2]


def test_a_search_is_a_parent_and_a_candidate_that_failed_says_why(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.update({"tensorboard": False})
    trained, calls = yolo.train_in, []

    def diverge_once(setup: Any, config: Any, hyp: Hyp, *rest: Any, **named: Any) -> TrainResult:
        calls.append(hyp)
        return trained(setup, config, replace(hyp, box=1e38) if len(calls) == 2 else hyp, *rest, **named)

    monkeypatch.setattr(yolo, "train_in", diverge_once)
    assert train.main([*tiny_args, "--epochs", "1", "--project", "p", "--name", "s", "--evolve", "2"]) == 0
    _, found = stored_runs(runs, "p")
    parents = [run for run in found if PARENT_TAG not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["s"]
    assert {"seed", "data_digest", *code_version().tags()} <= parents[0].data.tags.keys()
    assert len(parents[0].inputs.dataset_inputs) == 2
    changed = bool(code_version().diff)
    assert (runs / "p" / "s" / "uncommitted.diff").is_file() == changed
    assert (len(list((runs / "mlflow" / "artifacts").rglob("uncommitted.diff"))) == 1) == changed
    children = [run for run in found if run.data.tags.get(PARENT_TAG) == parents[0].info.run_id]
    assert len(children) == len(found) - 1 == 3
    assert sorted(run.data.tags["starling.status"] for run in children) == ["failed", "finished", "finished"]
    [failed] = [run for run in children if run.info.status == "FAILED"]
    assert "no longer a number" in failed.data.tags["starling.reason"]
    assert failed.data.tags["mlflow.note.content"] == failed.data.tags["starling.reason"]


class FaultyServerDouble(http.server.BaseHTTPRequestHandler):
    """Answers 500, or waits first: what a broken server does, not what MLflow does."""

    wait_s = 0.0
    over: threading.Event

    def _answer(self) -> None:
        self.over.wait(self.wait_s)
        self.send_error(500)

    do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def faulty_server(wait_s: float) -> Iterator[str]:
    over = threading.Event()
    handler = type("Handler", (FaultyServerDouble,), {"wait_s": wait_s, "over": over})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("fault", ["refused", "500", "slow"])
def test_a_training_beside_a_broken_server_ends_well_with_one_warning(
    tiny_args: list[str],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    settings.update({"tensorboard": False})
    monkeypatch.setattr("starling.training.training.DRAIN_S", 1)
    with faulty_server(30 if fault == "slow" else 0) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9" if fault == "refused" else url)
        assert train.main([*tiny_args, "--noplots"]) == 0
        output = capsys.readouterr().out
        assert output.count("tracking: ") == 1
        assert "nothing is lost, send it later with: starling track sync" in output
    log = runs / "train" / "exp" / "events.jsonl"
    names = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert (names[0], names[-2:], names.count("metrics")) == ("run_start", ["run_end", "log_end"], 2)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from starling.tracking.bridge import follow
from starling.tracking.cursor import Cursor, cursor_path
from starling.tracking.delivery import SAMPLES_KEPT, TRAINER_GONE, Bridge
from starling.tracking.events import EventLog
from starling.tracking.lock import exclusive
from starling.tracking.process import Bridges, start_bridge
from starling.tracking.process_identity import ProcessIdentity
from starling.tracking.tracker import Tracker, TrackerRejectedError, TrackerUnavailableError
from starling.tracking.trackers import TRACKERS
from tests.conftest import REPOSITORY
from tests.unit.tracking.tracking_doubles import RecordingTrackerDouble, UnreachableTrackerDouble, recorded


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(tmp_path / "run" / "events.jsonl", "u1")
    log.append("run_start", name="exp", project="train", dir=log.path.parent, params={"lr0": 0.01})
    return log


@pytest.fixture
def tracker(tmp_path: Path) -> RecordingTrackerDouble:
    return RecordingTrackerDouble(tmp_path / "calls.jsonl")


def test_the_protocol_is_what_the_double_implements(tracker: RecordingTrackerDouble) -> None:
    checked: Tracker = tracker
    assert checked.name == "double"


def test_a_whole_run_is_delivered_in_order(log: EventLog, tracker: RecordingTrackerDouble) -> None:
    (log.path.parent / "weights").mkdir()
    (log.path.parent / "weights" / "best.pt").touch()
    log.append("metrics", step=0, values={"loss": 1.0})
    log.append("artifact", path="weights/best.pt", kind="weights")
    log.append("run_end", status="finished")
    log.append("log_end")
    assert follow(Bridge(log.path, tracker)) == 0
    calls = recorded(tracker.calls)
    assert [call["call"] for call in calls] == ["start", "metrics", "artifact", "end"]
    assert calls[2]["folder"] == "weights"
    assert {call["run"] for call in calls[1:]} == {"id-u1"}


def test_a_second_delivery_sends_nothing(log: EventLog, tracker: RecordingTrackerDouble) -> None:
    assert Bridge(log.path, tracker).deliver() == 1
    assert Bridge(log.path, tracker).deliver() == 0
    assert Bridge(log.path, tracker).pending == 0


def test_more_events_than_a_batch_are_each_delivered_once(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    for step in range(120):
        log.append("metrics", step=step, values={"loss": 1.0})
    Bridge(log.path, tracker).deliver()
    assert [call.get("step") for call in recorded(tracker.calls)] == [None, *range(120)]


def test_an_outage_keeps_the_event_and_goes_on_behind_it(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    log.append("metrics", step=0, values={"loss": 1.0})
    tracker.failures = [TrackerUnavailableError("away")]
    with pytest.raises(TrackerUnavailableError):
        bridge.deliver()
    assert Bridge(log.path, tracker).deliver() == 1
    assert [call["call"] for call in recorded(tracker.calls)] == ["start", "metrics"]


def test_a_refused_event_is_counted_and_the_next_one_sent(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    log.append("metrics", step=0, values={"loss": 1.0})
    log.append("metrics", step=1, values={"loss": 1.0})
    tracker.failures = [TrackerRejectedError("no")]
    bridge.deliver()
    assert bridge.cursor.rejected == 1
    assert [call.get("step") for call in recorded(tracker.calls)] == [None, 1]


def test_a_resumed_trainer_that_repeats_its_last_epoch_doubles_nothing(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    for step in (0, 1, 1, 2):
        log.append("metrics", step=step, values={"loss": float(step)})
    log.append("metrics", step=2, values={"mAP_0.5": 0.5})
    Bridge(log.path, tracker).deliver()
    assert [call.get("step") for call in recorded(tracker.calls)] == [None, 0, 1, 2, 2]


def test_datasets_images_models_and_the_console_reach_the_tracker(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    (log.path.parent / "epoch2.jpg").touch()
    (log.path.parent / "best.pt").touch()
    log.append("message", text="hello")
    log.append(
        "dataset", role="train", name="bccd", digest="d1", source="/data/bccd.yaml", figures={"images": 8}
    )
    log.append("picture", path="epoch2.jpg", name="val_batch0", step=2)
    log.append("model", path="best.pt", name="best", step=2, values={"mAP_0.5": 0.5})
    log.append("message", text="bye")
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    assert bridge.cursor.rejected == 0
    _, hello, dataset, image, model, bye = recorded(tracker.calls)
    assert (dataset["role"], dataset["digest"], dataset["figures"]) == ("train", "d1", {"images": 8.0})
    assert (image["file"], image["name"], image["step"]) == ("epoch2.jpg", "val_batch0", 2)
    assert (model["name"], model["step"], model["values"]) == ("best", 2, {"mAP_0.5": 0.5})
    assert (hello["line"], hello["so_far"]) == ("hello", "hello\n")
    assert (bye["line"], bye["so_far"]) == ("bye", "hello\nbye\n")


def test_a_console_that_is_refused_does_not_keep_the_runs_end_from_being_told(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    log.append("run_end", status="finished")
    log.append("log_end")
    tracker.last_flush_failure = TrackerRejectedError("artifacts lie elsewhere")
    bridge = Bridge(log.path, tracker)
    assert follow(bridge, poll_s=0.01) == 0
    assert [call["call"] for call in recorded(tracker.calls)] == ["start", "end"]
    assert bridge.cursor.rejected == 2


def test_a_file_that_is_told_again_before_it_was_sent_is_sent_once(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    for name in ("best.pt", "last.pt", "best.pt", "best.pt"):
        (log.path.parent / name).touch()
        log.append("artifact", path=name, kind="weights")
    Bridge(log.path, tracker).deliver()
    assert [call["name"] for call in recorded(tracker.calls)[1:]] == ["last.pt", "best.pt"]


def test_samples_of_the_machine_belong_to_the_open_run_that_began_last(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    bridge = Bridge(log.path, tracker)
    bridge.add_sample({"cpu": 1.0}, time=0.0)  # of no run yet
    log.append("run_start", run="u2", name="c", project="train", dir=log.path.parent)
    bridge.deliver()
    bridge.add_sample({"cpu": 2.0}, time=time.time() + 5)
    log.append("run_end", run="u2", status="finished")
    bridge.deliver()
    bridge.add_sample({"cpu": 3.0}, time=time.time() + 5)
    bridge.deliver()
    samples = [call for call in recorded(tracker.calls) if call["call"] == "system"]
    assert [(call["run"], call["values"]["cpu"]) for call in samples] == [("id-u2", 2.0), ("id-u1", 3.0)]
    assert samples[0]["step"] in (4, 5, 6)


def test_samples_that_a_tracker_is_away_for_are_bounded_and_counted(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    for second in range(SAMPLES_KEPT + 3):
        bridge.add_sample({"cpu": float(second)}, time=time.time())
    tracker.failures = [TrackerUnavailableError("away")]
    with pytest.raises(TrackerUnavailableError):
        bridge.deliver()
    assert bridge.cursor.dropped == 3
    bridge.deliver()
    sent = [call["values"]["cpu"] for call in recorded(tracker.calls) if call["call"] == "system"]
    assert sent == [float(second) for second in range(3, SAMPLES_KEPT + 3)]


def test_a_search_that_other_workers_tell_about_is_not_ended_by_the_loss_of_one(
    tmp_path: Path, tracker: RecordingTrackerDouble
) -> None:
    log = EventLog(tmp_path / "w" / "events.jsonl")
    log.append("run_start", run="study", name="s", project="p", dir=tmp_path, shared=True)
    log.append(
        "run_start", run="c1", name="c", project="p", dir=tmp_path, parent={"uuid": "study", "name": "s"}
    )
    assert follow(Bridge(log.path, tracker), trainer_is_gone=lambda: True, poll_s=0.01) == 0
    assert [call["run"] for call in recorded(tracker.calls) if call["call"] == "end"] == ["id-c1"]


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "missing.png"])
def test_an_artifact_outside_its_run_directory_is_left_out(
    log: EventLog, tracker: RecordingTrackerDouble, path: str
) -> None:
    (log.path.parent.parent.parent / "secret").touch()
    log.append("artifact", path=path, kind="plot")
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    assert bridge.cursor.rejected == 1
    assert [call["call"] for call in recorded(tracker.calls)] == ["start"]


def test_an_event_with_nonsense_in_it_is_left_out(log: EventLog, tracker: RecordingTrackerDouble) -> None:
    line = {"v": 1, "seq": 9, "time": 0, "run": "u1", "event": "metrics", "step": "x", "values": {"a": "b"}}
    with open(log.path, "a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps({**line, "values": 3}) + "\n")
    bridge = Bridge(log.path, tracker)
    bridge.deliver()
    assert bridge.cursor.rejected == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"runs": {"u1": 3}}', b'{"runs": {}, "unknown": 1}'])
def test_a_damaged_cursor_starts_anew(log: EventLog, tracker: RecordingTrackerDouble, damage: bytes) -> None:
    Bridge(log.path, tracker).deliver()
    cursor_path(log.path, "double").write_bytes(damage)
    assert Cursor.load(log.path, "double", "double").offset == 0
    assert Bridge(log.path, tracker).deliver() == 1


def test_a_new_log_of_the_same_name_starts_anew(log: EventLog, tracker: RecordingTrackerDouble) -> None:
    Bridge(log.path, tracker).deliver()
    log.path.unlink()
    other = EventLog(log.path, "u2")
    other.append(
        "run_start", name="exp", project="train", dir=log.path.parent, params={"longer": "than before"}
    )
    Bridge(log.path, tracker).deliver()
    assert [call["run"] for call in recorded(tracker.calls)] == ["u1", "u2"]


def test_another_destination_gets_everything(log: EventLog) -> None:
    Cursor(destination="here", offset=log.path.stat().st_size).save(log.path, "double")
    assert Cursor.load(log.path, "double", "here").offset > 0
    assert Cursor.load(log.path, "double", "there").offset == 0


def test_killed_bridge_delivers_every_event_once_after_restart(log: EventLog, tmp_path: Path) -> None:
    for step in range(60):
        log.append("metrics", step=step, values={"loss": step / 7})
    log.append("run_end", status="finished")
    log.append("log_end")
    calls = tmp_path / "calls.jsonl"
    command = [sys.executable, "-m", "tests.unit.tracking.tracking_doubles", str(log.path), str(calls)]
    for wanted in (10, 55):
        bridge = subprocess.Popen([*command, "0.01"], cwd=REPOSITORY)
        deadline = time.monotonic() + 20
        while len(recorded(calls)) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        bridge.kill()
        assert bridge.wait() == -signal.SIGKILL
    assert subprocess.run([*command, "0"], cwd=REPOSITORY, timeout=20).returncode == 0
    # What a kill repeats is the same to the byte, so a tracker takes it once.
    kinds = Counter(json.loads(line)["call"] for line in set(calls.read_text().splitlines()))
    assert kinds == {"start": 1, "metrics": 60, "end": 1}
    repeated = len(recorded(calls)) - 62
    assert repeated <= 2 * 50


def test_an_outage_is_told_once_and_the_rest_is_sent_when_it_is_over(
    log: EventLog, tracker: RecordingTrackerDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    log.append("log_end")
    tracker.failures = [TrackerUnavailableError("away")] * 2
    assert follow(Bridge(log.path, tracker), poll_s=0.01, backoff_s=(0.01,)) == 0
    assert capfd.readouterr().err.count("away") == 1
    assert Cursor.load(log.path, "double", "double").problem == ""


def test_an_unreachable_tracker_ends_the_bridge_in_bounded_time_with_all_kept(
    log: EventLog, tmp_path: Path
) -> None:
    log.append("log_end")
    began = time.monotonic()
    tracker = UnreachableTrackerDouble(tmp_path / "calls.jsonl")
    assert follow(Bridge(log.path, tracker), poll_s=0.01) == 1
    assert time.monotonic() - began < 4
    assert Cursor.load(log.path, "double", "double").offset == 0
    assert "refused" in json.loads(cursor_path(log.path, "double").read_bytes())["problem"]


def test_the_bridge_ends_when_its_trainer_is_gone_and_the_log_is_drained(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    trainer = ProcessIdentity.of(child.pid)
    child.kill()
    status = follow(Bridge(log.path, tracker), trainer_is_gone=lambda: not trainer.is_alive(), poll_s=0.01)
    child.wait()
    assert status == 0
    start, end = recorded(tracker.calls)
    assert (start["call"], end["call"]) == ("start", "end")
    assert (end["status"], end["reason"]) == ("killed", TRAINER_GONE)


def test_the_end_of_an_earlier_session_does_not_end_the_bridge_of_a_resumed_run(
    log: EventLog, tracker: RecordingTrackerDouble
) -> None:
    log.append("log_end")
    opened_at = log.path.stat().st_size
    done = threading.Event()
    results: list[int] = []

    def run() -> None:
        results.append(follow(Bridge(log.path, tracker), opened_at=opened_at, poll_s=0.01))
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert not done.wait(0.2)
    log.append("metrics", step=5, values={"loss": 1.0})
    log.append("log_end")
    assert done.wait(5)
    assert results == [0]
    assert recorded(tracker.calls)[-1]["step"] == 5


def test_a_process_id_that_was_given_away_is_another_process() -> None:
    mine = ProcessIdentity.of(os.getpid())
    assert ProcessIdentity.parse(str(mine)) == mine
    assert mine.is_alive()
    assert not ProcessIdentity(mine.pid, mine.start + "0").is_alive()


def test_a_lock_is_held_by_one_and_waiting_for_it_ends(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "lock", 0),
        pytest.raises(TimeoutError, match="another process"),
        exclusive(tmp_path / "lock", 0.1),
    ):
        pass
    with exclusive(tmp_path / "lock", 0):
        pass


MLFLOW = TRACKERS["mlflow"]
HANGS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def mlflow_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path / "runs"))


@pytest.mark.usefixtures("mlflow_on")
def test_a_hanging_bridge_never_holds_the_trainer_and_is_told_once(log: EventLog, said: list[str]) -> None:
    began = time.monotonic()
    handle = start_bridge(log, MLFLOW, command=HANGS)
    assert handle is not None
    for step in range(100):
        log.append("metrics", step=step, values={"loss": 1.0})
        handle.check()
    assert time.monotonic() - began < 2
    assert Bridges(log, [handle]).finish(timeout_s=0.2) is False
    handle.process.kill()
    handle.process.wait()
    assert len(said) == 1
    assert f"starling track sync {log.path.parent}" in said[0]


@pytest.mark.usefixtures("mlflow_on")
@pytest.mark.parametrize("patient", [True, False])
def test_a_bridge_that_registers_a_model_is_waited_for_unless_a_stop_was_asked_for(
    log: EventLog, patient: bool
) -> None:
    ends_soon = [sys.executable, "-c", "import time; time.sleep(1)"]
    handle = start_bridge(log, MLFLOW, command=ends_soon)
    assert handle is not None
    Cursor(destination="here", busy="registering best").save(log.path, "mlflow")
    assert handle.finish(0.1, patient=patient) is patient
    handle.process.wait()


@pytest.mark.usefixtures("mlflow_on")
def test_a_killed_bridge_is_started_again(log: EventLog) -> None:
    handle = start_bridge(log, MLFLOW, command=HANGS)
    assert handle is not None
    first = handle.process
    first.kill()
    first.wait()
    handle.check()
    assert handle.process.pid != first.pid
    assert handle.process.poll() is None
    handle.process.kill()
    handle.process.wait()


@pytest.mark.usefixtures("mlflow_on")
def test_the_bridge_is_in_a_session_of_its_own(log: EventLog) -> None:
    handle = start_bridge(log, MLFLOW, command=HANGS)
    assert handle is not None
    assert os.getsid(handle.process.pid) == handle.process.pid
    handle.process.kill()
    handle.process.wait()


@pytest.mark.usefixtures("mlflow_on")
def test_a_bridge_that_cannot_be_started_is_a_warning(log: EventLog, said: list[str]) -> None:
    assert start_bridge(log, MLFLOW, command=["/nonexistent"]) is None
    assert len(said) == 1


def test_the_trainers_side_imports_no_tracker() -> None:
    code = "import sys, starling.tracking.process, starling.tracking.events, starling.cli.track; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert not {"mlflow", "torch", "sqlalchemy"} & set(loaded.split())

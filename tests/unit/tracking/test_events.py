from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from starling.tracking import events as events_module
from starling.tracking.events import (
    CANDIDATE_ARTIFACTS,
    RUN_ARTIFACTS,
    EventLog,
    last_event,
    metric_values,
    read_events,
)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "run" / "events.jsonl", "u1", clock=lambda: 1000.0)


def test_events_come_back_in_order_with_sequence_time_and_run(log: EventLog) -> None:
    log.append("run_start", name="exp", project="train", dir=log.path.parent, params={"lr0": 0.01})
    log.append("metrics", step=0, values={"loss": 1.5})
    log.append("run_end", status="finished")
    read, end = read_events(log.path)
    assert [(event.name, event.seq, event.run, event.time) for event in read] == [
        ("run_start", 0, "u1", 1000.0),
        ("metrics", 1, "u1", 1000.0),
        ("run_end", 2, "u1", 1000.0),
    ]
    assert read[0].fields["dir"] == "."
    assert end == read[-1].end == log.path.stat().st_size


def test_one_log_holds_several_runs(log: EventLog) -> None:
    log.append("metrics", run="child", step=0, values={})
    assert read_events(log.path)[0][0].run == "child"


def test_run_directory_elsewhere_is_written_relative_to_the_log(log: EventLog) -> None:
    log.append("run_start", name="c", project="p", dir=log.path.parent.parent / "candidates" / "0001")
    assert read_events(log.path)[0][0].fields["dir"] == "../candidates/0001"


def test_nan_and_infinities_survive_strict_json(log: EventLog) -> None:
    log.append("metrics", step=0, values={"a": math.nan, "b": -math.inf, "c": np.float32(0.5)})
    line = log.path.read_text()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    values = metric_values(read_events(log.path)[0][0])
    assert math.isnan(values["a"])
    assert values["b"] == -math.inf
    assert values["c"] == 0.5


class TensorDouble:
    """Behaves like a tensor where it matters: it can become a float, at a price."""

    def __float__(self) -> float:
        raise AssertionError("waited for the device")


def test_a_tensor_is_refused_without_being_read(log: EventLog) -> None:
    with pytest.raises(TypeError, match=r"\.item\(\)"):
        log.append("metrics", step=0, values={"loss": TensorDouble()})
    with pytest.raises(TypeError):
        log.append("run_start", name="e", project="p", dir=".", params={"x": TensorDouble()})
    assert not log.path.exists()


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("metric", {"step": 0, "values": {}}),
        ("metrics", {"step": 0}),
        ("metrics", {"step": 0, "values": {}, "epoch": 1}),
        ("run_end", {"status": "done"}),
    ],
)
def test_unknown_events_and_fields_are_refused(log: EventLog, event: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=event):
        log.append(event, **fields)


def test_torn_tail_is_not_read_until_it_is_whole(log: EventLog) -> None:
    log.append("metrics", step=0, values={})
    size = log.path.stat().st_size
    with open(log.path, "ab") as file:
        file.write(b'{"v": 1, "seq": 1, "ti')
    read, end = read_events(log.path)
    assert len(read) == 1
    assert end == size
    assert read_events(log.path, end) == ([], end)


def test_appending_behind_a_torn_tail_loses_only_the_torn_event(log: EventLog) -> None:
    log.append("metrics", step=0, values={})
    with open(log.path, "ab") as file:
        file.write(b'{"v": 1, "seq": 1, "ti')
    EventLog(log.path, "u1").append("metrics", step=2, values={})
    assert [(event.seq, event.fields["step"]) for event in read_events(log.path)[0]] == [(0, 0), (1, 2)]


def test_sequence_goes_on_in_a_resumed_log(log: EventLog) -> None:
    log.append("metrics", step=0, values={})
    EventLog(log.path, "u1").append("metrics", step=1, values={})
    last = last_event(log.path)
    assert last is not None
    assert last.seq == 1


def test_the_last_event_is_found_behind_what_is_none_and_no_other_line_is_parsed(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(200):
        log.append("metrics", step=step, values={})
    (*_, expected), size = read_events(log.path)
    with open(log.path, "ab") as file:
        file.write(b'no event\n{"v": 1, "seq": 1, "ti')
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(events_module.json, "loads", lambda line: parsed.append(line) or loads(line))
    last = last_event(log.path)
    assert last == expected
    assert last.end == size
    assert len(parsed) == 2


@pytest.mark.parametrize(
    "line", [b"null", b"[]", b"{}", b'{"v":2,"seq":0}', b"\xff\xfe", b"[" * 99_999, b"1e999"]
)
def test_a_line_that_is_no_event_is_stepped_over(log: EventLog, line: bytes) -> None:
    log.path.parent.mkdir()
    log.path.write_bytes(line + b"\n")
    log.append("metrics", step=0, values={})
    assert len(read_events(log.path)[0]) == 1


def test_an_endless_line_does_not_stop_the_reader(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.path.parent.mkdir()
    log.path.write_bytes(b"x" * 2500)
    log.append("metrics", step=0, values={})
    monkeypatch.setattr(events_module, "_CHUNK_BYTES", 1000)
    offset, found = 0, []
    for _ in range(5):
        read, offset = read_events(log.path, offset)
        found += read
    assert [event.name for event in found] == ["metrics"]


def test_a_log_that_cannot_be_written_warns_once_and_counts(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").touch()
    log = EventLog(tmp_path / "file" / "events.jsonl", "u1")
    log.append("metrics", step=0, values={})
    log.append("metrics", step=1, values={})
    assert log.dropped == 2
    assert len(said) == 1


def test_announce_names_the_files_that_exist(log: EventLog) -> None:
    run_dir = log.path.parent
    (run_dir / "weights").mkdir(parents=True)
    for name in ("weights/best.pt", "results.csv", "results.png", "other.txt"):
        (run_dir / name).touch()
    log.announce(run_dir, RUN_ARTIFACTS)
    paths = {event.fields["path"]: event.fields["kind"] for event in read_events(log.path)[0]}
    assert paths == {"weights/best.pt": "weights", "results.csv": "table", "results.png": "plot"}
    assert not any(pattern.endswith(".pt") for pattern in CANDIDATE_ARTIFACTS)

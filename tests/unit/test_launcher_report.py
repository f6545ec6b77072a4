"""What users are told: states in words, progress from untrusted files, exit codes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.engines.base import ReplicaState
from launcher.env_file import read_env_file
from launcher.errors import UsageError
from launcher.fleet import select
from launcher.progress import Progress, _number, _text, read_progress
from launcher.report import (
    COLUMNS,
    Row,
    as_lines,
    as_table,
    exit_code,
    format_duration,
    searches_of,
    words_for,
)
from launcher.sizes import GIB

STATE = ReplicaState(
    id="abc",
    name="b-s-gpu1",
    fleet="b/s",
    device="gpu:1",
    phase="exited",
    memory_bytes=20 * GIB,
    plan={"runs": "/r"},
)


def write(runs: Path, values: object) -> None:
    (runs / ".workers").mkdir(exist_ok=True)
    (runs / ".workers" / "r.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phase": "running"}, "running"),
        ({"phase": "running", "oom_killed": True}, "running, a child was OOM-KILLED at 20 GB"),
        ({"phase": "created"}, "created, never started"),
        ({"exit_code": 0}, "finished"),
        ({"exit_code": 0, "oom_killed": True}, "a child was OOM-KILLED at 20 GB, exited 0 all the same"),
        ({"exit_code": 137, "oom_killed": True}, "OOM-KILLED at 20 GB"),
        ({"exit_code": 137}, "killed (137)"),
        ({"exit_code": 3}, "exited 3: data error"),
        ({"exit_code": 143}, "stopped 143: resumable"),
        ({"exit_code": 139}, "killed by signal 11"),
        ({"exit_code": 77}, "exited 77: error"),
    ],
)
def test_states_are_told_in_words(changes: dict[str, object], words: str) -> None:
    assert words_for(replace(STATE, **changes)) == words  # type: ignore[arg-type]


def test_no_replicas_is_never_success() -> None:
    running = replace(STATE, phase="running")
    assert exit_code([]) == 1
    assert exit_code([running, replace(STATE, exit_code=0)]) == 0
    assert exit_code([running, replace(STATE, exit_code=3)]) == 1


def test_progress_is_read_from_the_workers_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"candidate": 7, "epoch": 3, "epochs": 10, "best_fitness": 0.5, "eta_s": 3900, "updated": 10},
    )
    progress = read_progress(tmp_path, "r")
    assert Row(replace(STATE, phase="running"), progress).cells()[3:] == ("7", "3/10", "0.5000", "1 h 05 min")
    assert read_progress(tmp_path, "r", since=11.0) == Progress()


def test_a_search_is_told_once_by_the_replica_that_has_seen_most_of_it() -> None:
    running = replace(STATE, phase="running")
    behind = Progress(finished=11, budget=60, best_fitness=0.5, search_ends_at=9e9, updated=20)
    ahead = Progress(finished=12, budget=60, best_fitness=0.5123, search_ends_at=8500, updated=10)
    training = Row(replace(running, fleet="x/y"), Progress(epoch=1, epochs=2))
    (search,) = searches_of([Row(running, behind), Row(running, ahead), training])
    assert search.words(1000) == "b/s: 12/60 finished, best fitness 0.5123, about 2 h 05 min left"
    assert search.words(9000).endswith("about 0 s left")
    (still,) = searches_of([Row(replace(STATE, exit_code=143), ahead)])
    assert still.words(1000) == "b/s: 12/60 finished, best fitness 0.5123", "nobody trains, so it never ends"
    (new,) = searches_of([Row(running, Progress(finished=0, budget=60))])
    assert new.words(1000) == "b/s: 0/60 finished"
    assert searches_of([training]) == []


def test_when_a_search_may_end_is_read_from_the_workers_file(tmp_path: Path) -> None:
    write(tmp_path, {"finished": 1, "budget": 2, "search_ends_at": 4000.5, "updated": 10})
    row = Row(replace(STATE, phase="running"), read_progress(tmp_path, "r"))
    assert row.as_dict()["search_ends_at"] == "1970-01-01T01:06:40+00:00"
    write(tmp_path, {"finished": 1, "budget": 2, "search_ends_at": "soon", "updated": 10})
    assert read_progress(tmp_path, "r").search_ends_at is None


def test_a_trainer_that_failed_says_why_beside_its_exit_code(tmp_path: Path) -> None:
    failed, reason = replace(STATE, exit_code=1), "MemoryError: /data/big.png: no room to decode its pixels"
    write(tmp_path, {"phase": "failed", "message": reason, "updated": 10})
    assert Row(failed, read_progress(tmp_path, "r")).cells()[2] == f"exited 1: error: {reason}"
    assert Row(failed, read_progress(tmp_path, "r", since=11.0)).cells()[2] == "exited 1: error"
    killed = replace(STATE, exit_code=137, oom_killed=True)
    assert Row(killed, Progress(phase="training")).cells()[2] == "OOM-KILLED at 20 GB"
    write(tmp_path, {"phase": "failed", "message": "word " * 1000, "updated": 10})
    assert len(Row(failed, read_progress(tmp_path, "r")).cells()[2]) < 150


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"epoch": {}}', '{"epoch": NaN, "eta_s": 1e999}', "[" * 50_000]
)
def test_a_garbled_progress_file_says_nothing(content: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / ".workers/r.json").write_text(content)
    assert read_progress(tmp_path, "r") == Progress()


def test_links_and_pipes_in_place_of_progress_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / ".workers/r.json"
    (tmp_path / "secret.json").write_text('{"candidate": "secret"}')
    path.unlink()
    path.symlink_to(tmp_path / "secret.json")
    assert read_progress(tmp_path, "r") == Progress()
    path.unlink()
    os.mkfifo(path)
    assert read_progress(tmp_path, "r") == Progress()


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_no_value_from_inside_breaks_the_report(value: object) -> None:
    text = _text(value)
    assert text is None or text.isprintable() or text == ""
    number = _number(value)
    assert number is None or number == number


def test_lines_and_table_show_the_same_columns() -> None:
    row = Row(replace(STATE, exit_code=3), Progress())
    heading, line = as_lines([row])
    assert heading.split()[0] == COLUMNS[0]
    assert "exited 3: data error" in line
    assert len(as_table([row]).columns) == len(COLUMNS)


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "-"), (40, "40 s"), (420, "7 min"), (7500, "2 h 05 min")]
)
def test_durations_are_told_in_words(seconds: float | None, words: str) -> None:
    assert format_duration(seconds) == words


def test_names_select_replicas_or_fleets_and_a_wrong_one_is_refused() -> None:
    other = replace(STATE, id="d", name="o-p-gpu1", fleet="o/p")
    assert select([STATE, other], ["o/p"]) == [other]
    assert select([STATE, other], [STATE.name]) == [STATE]
    with pytest.raises(UsageError, match="no such replica or fleet"):
        select([STATE, other], ["b-s"])


def test_an_env_file_gives_values_and_bare_names(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("# keys\nA=1=2\n\nB\nC\n")
    assert read_env_file(path, {"B": "b"}) == {"A": "1=2", "B": "b"}
    path.write_text("A=1\nhunter 2=x\n")
    with pytest.raises(UsageError, match=r":2: not NAME=value") as caught:
        read_env_file(path, {})
    assert "hunter" not in str(caught.value)

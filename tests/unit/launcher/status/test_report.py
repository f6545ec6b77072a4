"""What users are told: states in words, progress from untrusted files, exit codes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.engines.base import ReplicaState
from launcher.hosts.this_machine import ThisMachine
from launcher.hosts.usage import Usage
from launcher.options.request import read_env_file
from launcher.status.meter import GpuMeter, Meter
from launcher.status.progress import Restarts, TrainerStatus, read_progress, read_restarts
from launcher.status.report import COLUMNS, Figures, Row, exit_code, searches_of
from launcher.status.selection import select
from launcher.status.table import lay_out
from launcher.status.words import words_for
from starling.core.errors import UsageError
from starling.core.units import GIB, format_share
from starling.core.worker_status import _number, _text

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
        ({"exit_code": 0, "oom_killed": True}, "a child was OOM-KILLED at 20 GB, exited 0 nevertheless"),
        ({"exit_code": 137, "oom_killed": True}, "OOM-KILLED at 20 GB"),
        ({"exit_code": 137}, "killed (137)"),
        ({"exit_code": 3}, "exited 3: data error"),
        ({"exit_code": 6}, "exited 6: disk full"),
        ({"exit_code": 7}, "exited 7: GPU lost"),
        ({"exit_code": 143}, "stopped 143: resumable"),
        ({"exit_code": 139}, "killed by signal 11"),
        ({"exit_code": 77}, "exited 77: error"),
        ({"exit_code": 255}, "lost with the engine or the machine (255)"),
    ],
)
def test_states_are_told_in_words(changes: dict[str, object], words: str) -> None:
    assert words_for(replace(STATE, **changes)) == words  # type: ignore[arg-type]


def test_no_replicas_is_never_success() -> None:
    running = replace(STATE, phase="running")
    assert exit_code([]) == 1
    assert exit_code([running, replace(STATE, exit_code=0)]) == 0
    assert exit_code([running, replace(STATE, exit_code=3)]) == 1


def test_a_stop_is_no_failure_and_a_kill_for_memory_no_success() -> None:
    assert exit_code([replace(STATE, exit_code=143), replace(STATE, exit_code=130)]) == 0
    assert exit_code([replace(STATE, exit_code=0, oom_killed=True)]) == 1
    assert exit_code([replace(STATE, exit_code=143, oom_killed=True)]) == 1
    assert exit_code([replace(STATE, exit_code=137)]) == 1
    assert exit_code([replace(STATE, phase="created")]) == 1


def test_progress_is_read_from_the_workers_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"candidate": 7, "epoch": 3, "epochs": 10, "images_per_s": 811.6, "best_fitness": 0.5, "eta_s": 3900},
    )
    progress = read_progress(tmp_path, "r")
    cells = Row(replace(STATE, phase="running"), progress).cells()
    assert cells[3:8] == ("7", "3/10", "812", "0.5000", "1h05m")
    assert Row(replace(STATE, exit_code=143), progress).cells()[3:8] == ("7", "3/10", "-", "0.5000", "-")


def test_what_a_trainer_says_holds_whatever_the_clock_was_set_to(tmp_path: Path) -> None:
    """Its word from before a clock was set back, or from a day ahead, is still its last word."""
    for written in (0.0, 9e9):
        write(tmp_path, {"epoch": 3, "epochs": 10, "eta_s": 60, "updated": written})
        os.utime(tmp_path / ".workers/r.json", (written, written))
        row = Row(replace(STATE, phase="running", started_at=5e9), read_progress(tmp_path, "r"))
        assert row.cells()[4] == "3/10"
        assert row.cells()[7] == "1m00s"


def restarting(tmp_path: Path, **values: object) -> Restarts:
    (tmp_path / ".workers").mkdir(exist_ok=True)
    record = {"restarts": 2, "max_restarts": 3, **values}
    (tmp_path / ".workers/r.restarts.json").write_text(json.dumps(record))
    return read_restarts(tmp_path, "r")


def test_a_crashed_trainer_is_told_with_the_time_until_its_next_try(tmp_path: Path) -> None:
    told = restarting(tmp_path, restart_at=1008.0, delay_s=8.0)
    row = Row(replace(STATE, phase="running"), TrainerStatus(phase="training"), told)
    assert row.cells(now=1000.0)[2] == "restarting in 8s (2 of 3)"
    assert row.cells(now=1000.0)[-1] == "2/3"
    for now, left in ((1006.0, "2s"), (99_999.0, "0s"), (-99_999.0, "8s")):  # the clock a day off
        assert row.cells(now=now)[2] == f"restarting in {left} (2 of 3)"
    assert exit_code([row.state]) == 0
    assert Row(replace(STATE, exit_code=143), TrainerStatus(), told).cells(1.0)[2] == "stopped 143: resumable"


def test_a_trainer_given_up_is_told_with_its_restarts_and_its_reason(tmp_path: Path) -> None:
    told = restarting(tmp_path)
    failed = TrainerStatus(phase="failed", message="no room")
    row = Row(replace(STATE, exit_code=1), failed, told)
    assert row.cells()[2] == "exited 1: error after 2 restarts"
    assert "exited 1: error after 2 restarts: no room" in lay_out([row], 0.0)[1].text
    assert [line.text for line in lay_out([row], 0.0, 120)][-1] == "    no room"


def test_the_supervisors_word_on_memory_counts_where_the_engine_has_none(tmp_path: Path) -> None:
    told = restarting(tmp_path, oom_killed=True)
    row = Row(replace(STATE, exit_code=137), TrainerStatus(), told)
    assert row.cells()[2].startswith("OOM-KILLED at 20 GB")
    assert row.as_dict()["state"] == "OOM-KILLED at 20 GB"
    assert not Row(replace(STATE, exit_code=137), TrainerStatus()).cells()[2].startswith("OOM")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"restarts": {}, "restart_at": "x", "oom_killed": 1}', "[" * 50_000]
)
def test_a_garbled_restart_record_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / ".workers").mkdir()
    (tmp_path / ".workers/r.restarts.json").write_text(content)
    assert read_restarts(tmp_path, "r") == Restarts()


def test_a_search_is_told_once_by_the_replica_that_has_seen_most_of_it() -> None:
    running = replace(STATE, phase="running")
    behind = TrainerStatus(finished=11, budget=60, best_fitness=0.5, search_ends_at=9e9, updated=20)
    ahead = TrainerStatus(finished=12, budget=60, best_fitness=0.5123, search_ends_at=8500, updated=10)
    training = Row(replace(running, fleet="x/y"), TrainerStatus(epoch=1, epochs=2))
    (search,) = searches_of([Row(running, behind), Row(running, ahead), training])
    assert search.words(1000) == "b/s: 12/60 finished, best fitness 0.5123, about 2h05m left"
    assert search.words(9000).endswith("about 0s left")
    (still,) = searches_of([Row(replace(STATE, exit_code=143), ahead)])
    assert still.words(1000) == "b/s: 12/60 finished, best fitness 0.5123", "nobody trains, so it never ends"
    (new,) = searches_of([Row(running, TrainerStatus(finished=0, budget=60))])
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
    row = Row(failed, read_progress(tmp_path, "r"))
    assert (row.cells()[2], row.reason) == ("exited 1: error", reason)
    assert f"exited 1: error: {reason}" in lay_out([row], 0.0)[1].text
    killed = replace(STATE, exit_code=137, oom_killed=True)
    assert Row(killed, TrainerStatus(phase="training")).cells()[2] == "OOM-KILLED at 20 GB"
    assert Row(replace(STATE, exit_code=0), TrainerStatus(phase="failed", message="old")).reason == ""
    write(tmp_path, {"phase": "failed", "message": "word " * 1000, "updated": 10})
    assert len(Row(failed, read_progress(tmp_path, "r")).reason) <= 240


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"epoch": {}}', '{"epoch": NaN, "eta_s": 1e999}', "[" * 50_000]
)
def test_a_garbled_progress_file_says_nothing(content: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / ".workers/r.json").write_text(content)
    assert read_progress(tmp_path, "r") == TrainerStatus()


def test_links_and_pipes_in_place_of_progress_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / ".workers/r.json"
    (tmp_path / "secret.json").write_text('{"candidate": "secret"}')
    path.unlink()
    path.symlink_to(tmp_path / "secret.json")
    assert read_progress(tmp_path, "r") == TrainerStatus()
    path.unlink()
    os.mkfifo(path)
    assert read_progress(tmp_path, "r") == TrainerStatus()


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_no_value_from_inside_breaks_the_report(value: object) -> None:
    text = _text(value)
    assert text is None or text.isprintable() or text == ""
    number = _number(value)
    assert number is None or number == number


def busy(name: str) -> Row:
    state = replace(STATE, id=name, name=name, phase="running")
    progress = TrainerStatus(phase="training", candidate="12", epoch=10, epochs=100, images_per_s=812, best_fitness=0.5,
                        eta_s=7500)  # fmt: skip
    figures = Figures(memory_bytes=12 * GIB, cpu_percent=780.4, gpu_percent=98)
    return Row(state, progress, Restarts(done=0, most=3), figures)


def test_a_pipe_gets_every_column_in_whole_lines() -> None:
    failed = Row(replace(STATE, exit_code=3), TrainerStatus(phase="failed", message="word " * 30))
    heading, line = (line.text for line in lay_out([failed], 0.0))
    assert heading.split("  ")[0] == COLUMNS[0]
    assert all(name in heading for name in COLUMNS)
    assert "exited 3: data error: word word" in line


def test_eight_replicas_at_work_fit_120_columns_with_every_figure() -> None:
    rows = [busy(f"blood-search-gpu{number}") for number in range(8)]
    heading, *lines = (line.text for line in lay_out(rows, 0.0, 120))
    assert all(name in heading for name in COLUMNS)
    assert len(lines) == 8
    assert max(map(len, [heading, *lines])) <= 120
    assert lines[0].split() == [
        "blood-search-gpu0", "GPU", "1", "training", "12", "10/100", "812", "0.5000", "2h05m",
        "98", "%", "12.0/20", "GB", "780", "%", "0/3",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_a_narrow_terminal_gets_fewer_columns_and_never_a_broken_line(width: int) -> None:
    failed = Row(replace(STATE, exit_code=3), TrainerStatus(phase="failed", message="word " * 20))
    lines = [line.text for line in lay_out([busy("blood-search-gpu0"), failed], 0.0, width)]
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("replica")
    assert "state" in lines[0]
    assert "restarts" not in lines[0]
    assert " ".join(" ".join(lines).split()).count("word") >= 20, "the reason goes on below"


def test_a_column_that_nobody_fills_is_left_out_on_a_terminal_only() -> None:
    state = replace(STATE, device="cpu:0", phase="running")
    row = Row(state, TrainerStatus(phase="training", epoch=1, epochs=2), Restarts(done=0, most=3))
    assert "GPU" not in lay_out([row], 0.0, 200)[0].text
    assert "GPU" in lay_out([row], 0.0)[0].text


def test_failures_are_red_and_waits_yellow() -> None:
    waits = Row(
        replace(STATE, phase="running"),
        TrainerStatus(),
        Restarts(done=1, most=3, restart_at=9.0, delay_s=9.0),
    )
    rows = [
        busy("a"),
        waits,
        Row(replace(STATE, exit_code=143), TrainerStatus()),
        Row(replace(STATE, exit_code=1), TrainerStatus()),
    ]
    assert [line.colour for line in lay_out(rows, 0.0)[1:]] == [None, "yellow", None, "red"]


@pytest.mark.parametrize(
    ("used", "limit", "words"),
    [
        (None, GIB, "-"),
        (GIB, 0, "1 GB"),
        (GIB // 2, 20 * GIB, "0.5/20 GB"),
        (GIB // 8, GIB // 4, "128/256 MB"),
    ],
)
def test_memory_is_told_in_its_limits_unit(used: int | None, limit: int, words: str) -> None:
    assert format_share(used, limit) == words


class Machine:
    """A double of an engine that tells two given readings, and of NVML with two GPUs."""

    host = ThisMachine()

    def __init__(self, *readings: dict[str, Usage]) -> None:
        self._readings = list(readings)

    def usage(self, states: object) -> dict[str, Usage]:
        return self._readings.pop(0)

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index > 1:
            raise RuntimeError("no such GPU")
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=(90, 50)[handle])


def reading(cpu_s: float | None, at: float, clock: float | None = None) -> Usage:
    return Usage(memory_bytes=GIB, cpu_s=cpu_s, at=at, clock=clock)


def test_cpu_is_what_was_used_between_two_readings_and_gpus_are_averaged() -> None:
    states = [
        replace(STATE, id="a", device="gpu:0-1", phase="running"),
        replace(STATE, id="b", device="gpu:7", phase="running"),
    ]
    machine = Machine({"a": reading(10.0, 100.0)}, {"a": reading(14.0, 102.0), "b": reading(3.0, 102.0)})
    meter = Meter(machine, GpuMeter(machine), sleep=lambda seconds: None)  # type: ignore[arg-type]
    meter.begin(states)
    figures = meter.read([*states, replace(STATE, id="dead", exit_code=1)])
    assert figures["a"] == Figures(memory_bytes=GIB, cpu_percent=200.0, gpu_percent=70.0)
    assert figures["b"] == Figures(memory_bytes=GIB, cpu_percent=None, gpu_percent=None), (
        "no rate from one reading"
    )
    assert "dead" not in figures


def test_a_slow_engine_is_asked_once_before_anything_is_shown_and_has_rates_from_then_on() -> None:
    running = replace(STATE, id="a", device="cpu:0", phase="running")
    machine = Machine({"a": reading(1.0, 1.0)}, {"a": reading(2.0, 3.0)}, {"a": reading(4.0, 5.0)})
    moments = iter((0.0, 1.0))  # a second for the first reading
    meter = Meter(machine, sleep=lambda seconds: None, clock=lambda: next(moments))  # type: ignore[arg-type]
    meter.begin([running])
    figures = [meter.read([running])["a"] for _ in range(3)]
    assert [found.cpu_percent for found in figures] == [None, 50.0, 100.0]
    assert figures[0].memory_bytes == GIB


def test_a_rate_of_another_machine_is_by_its_own_clock_however_long_the_answers_took() -> None:
    running = replace(STATE, id="a", device="cpu:0", phase="running")
    machine = Machine({"a": reading(1.0, 1.0, clock=500.0)}, {"a": reading(1.5, 9.0, clock=501.0)})
    meter = Meter(machine, sleep=lambda seconds: None)  # type: ignore[arg-type]
    meter.begin([running])
    assert meter.read([running])["a"].cpu_percent == 50.0


def test_a_machine_without_nvml_has_no_gpu_figure() -> None:
    assert GpuMeter(object()).read([replace(STATE, device="gpu:0", phase="running")]) == {}


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


def test_on_a_narrow_terminal_the_columns_give_way_in_their_order() -> None:
    progress = TrainerStatus(
        candidate="7", epoch=3, epochs=10, images_per_s=811.6, best_fitness=0.5, eta_s=3900
    )
    running = Row(
        replace(STATE, phase="running"),
        progress,
        Restarts(done=1),
        Figures(memory_bytes=GIB, cpu_percent=100, gpu_percent=50),
    )
    assert "0.5000" in lay_out([running], 0.0, 100)[1].text
    seen = []
    for width in range(120, 20, -1):
        heading = lay_out([running], 0.0, width)[0].text
        gone = [name for name in COLUMNS if name not in heading and name not in seen]
        assert len(gone) <= 1
        seen += gone
    assert seen == [
        "restarts",
        "CPU",
        "candidate",
        "best",
        "img/s",
        "memory",
        "GPU",
        "time left",
        "epoch",
        "device",
    ]

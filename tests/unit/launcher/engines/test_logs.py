"""Logs as a reader gets them: through broken streams and rotations, each line once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.engines.docker.logs import _Seen, read_log, split_lines
from launcher.engines.docker.stats import ask_usage, usage_in
from launcher.engines.local import log as local_log
from launcher.engines.local import supervisor
from launcher.hosts.usage import read_usage
from launcher.status.terminal import coloured, paint
from starling.core.errors import UsageError
from starling.core.units import parse_since, parse_stamp


def stamp(second: float) -> str:
    return f"2026-03-01T12:00:{second:012.9f}Z"


class Streams:
    """A double of an engine's log endpoint: one log, and streams that break off where the test says."""

    def __init__(self, log: list[tuple[float, str]], *breaks: int | None) -> None:
        self._log, self._breaks = log, list(breaks)
        self.asked: list[tuple[bool, Mapping[str, Any]]] = []

    def open(self, follow: bool, options: Mapping[str, Any]) -> Iterator[bytes]:
        self.asked.append((follow, options))
        since = options.get("since", 0)
        end = self._breaks.pop(0) if self._breaks else None
        for second, text in self._log[:end]:
            if (parse_stamp(stamp(second)) or 0) >= since:
                yield f"{stamp(second)} {text}\n".encode()

    def runs(self) -> bool:
        return bool(self._breaks)


LOG = [(1.0, "a"), (2.0, "b"), (2.0, "b"), (2.0, "c"), (3.5, "d"), (4.0, "e")]


@pytest.mark.parametrize("first", range(len(LOG) + 1))
@pytest.mark.parametrize("second", [0, 3, 6])
def test_a_stream_that_breaks_anywhere_is_taken_up_without_a_double_or_a_loss(
    first: int, second: int
) -> None:
    streams = Streams(LOG, first, max(first, second), None)
    lines = list(read_log(streams.open, streams.runs, follow=True, tail=None, since=None))
    assert lines == [text for _, text in LOG]


def test_what_was_said_between_the_break_and_the_end_is_read_after_the_end() -> None:
    streams = Streams(LOG, 2)
    assert list(read_log(streams.open, lambda: False, follow=True, tail=None, since=None)) == list("abbcde")
    assert [follow for follow, _ in streams.asked] == [True, False]


def test_a_clock_that_was_set_back_hides_nothing() -> None:
    log = [(50.0, "before"), (10.0, "after"), (11.0, "later")]
    streams = Streams(log)
    assert list(read_log(streams.open, lambda: False, follow=False, tail=None, since=None)) == [
        "before", "after", "later"
    ]  # fmt: skip


def test_a_clock_that_is_set_back_after_a_break_hides_nothing_either() -> None:
    seen = _Seen()
    assert len(list(seen.new([("50", "before")]))) == 1
    assert list(seen.new([("50", "before"), ("51", "on"), ("20", "back")])) == [("51", "on"), ("20", "back")]


def test_a_long_line_in_parts_is_one_line_without_stamps_inside() -> None:
    frames = [
        f"{stamp(1)} {'x' * 10}".encode(),
        f"{stamp(2)} yyy\r\n".encode(),
        f"{stamp(3)} a\n{stamp(4)} \n{stamp(5)} unfinished".encode(),
    ]
    assert list(split_lines(frames)) == [
        (stamp(1), "x" * 10 + "yyy"), (stamp(3), "a"), (stamp(4), ""), (stamp(5), "unfinished")
    ]  # fmt: skip


def test_a_reader_that_is_slower_than_the_rotation_misses_only_what_was_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rotations while a reader follows; none overtakes it by more than the files that are kept."""
    monkeypatch.setattr(supervisor, "LOG_BYTES", 2000)
    monkeypatch.setattr(local_log, "POLL_S", 0.001)
    path, writing = tmp_path / "log", threading.Event()
    writing.set()

    def write() -> None:
        log = supervisor.RotatedLog(supervisor.open_folder(str(path)), path.name)
        for number in range(600):
            log.write(supervisor.stamped(f"{number:05d}\n".encode()))
            time.sleep(0.001)
        writing.clear()

    writer = threading.Thread(target=write)
    writer.start()
    while not path.exists():
        time.sleep(0.001)
    lines = list(local_log.read_log(path, writing.is_set, follow=True, tail=None, since=None))
    writer.join()
    assert lines == [f"{number:05d}" for number in range(600)]
    kept = list(local_log.read_log(path, writing.is_set, follow=False, tail=None, since=None))
    assert kept == lines[-len(kept) :]
    assert len(kept) > 2000 / 34, "rotated files are read too"
    assert list(local_log.read_log(path, writing.is_set, follow=False, tail=3, since=None)) == lines[-3:]


def test_what_is_written_just_before_a_rotation_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    reader = local_log.LogReader(path)
    assert list(reader.available()) == ["one"]
    look = reader._following

    def rotate_first() -> Any:
        if not path.with_name("log.1").exists():
            with open(path, "a") as file:
                file.write("two\n")
            path.rename(path.with_name("log.1"))
            path.write_text("three\n")
        return look()

    monkeypatch.setattr(reader, "_following", rotate_first)
    assert list(reader.available()) == ["two", "three"]
    reader.close()


def test_a_log_that_somebody_made_endless_is_read_up_to_a_limit(tmp_path: Path) -> None:
    log = tmp_path / "runs/.launcher/r.log"
    log.parent.mkdir(parents=True)
    with open(log, "wb") as file:
        file.write(b"a line\n")
        file.truncate(1 << 40)
    lines = local_log.read_log(log, lambda: False, follow=False, tail=None, since=None)
    assert next(lines) == "a line"
    assert [len(line) for line in lines] == [local_log.MOST_OF_A_FILE - len("a line\n")]


def test_an_older_log_without_times_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("plain words\n2026 is no stamp\nunfinished")
    lines = list(local_log.read_log(tmp_path / "log", lambda: False, follow=False, tail=None, since=None))
    assert lines == ["plain words", "2026 is no stamp", "unfinished"]
    assert [line.at for line in lines] == [None] * 3
    assert (
        list(local_log.read_log(tmp_path / "none", lambda: False, follow=True, tail=None, since=None)) == []
    )


def test_stamps_stand_before_lines_and_not_before_returns_within() -> None:
    text = supervisor.stamped(b"50%\r100%\nlast").decode()
    first, last = text.split("\n")
    assert first.endswith("Z 50%\r100%")
    assert abs((parse_stamp(last.split()[0]) or 0) - time.time()) < 5


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("0.5h", 1800)]
)
def test_since_takes_spans(text: str, seconds: float) -> None:
    assert parse_since(text, 1e9) == 1e9 - seconds


def test_since_takes_dates_and_times() -> None:
    assert parse_since("2026-03-01T12:00:00Z", 0) == parse_stamp("2026-03-01T12:00:00Z")
    assert parse_since("2026-03-01T14:00+02:00", 0) == parse_stamp("2026-03-01T12:00:00Z")
    local = time.mktime((2026, 3, 1, 0, 0, 0, 0, 0, -1))
    assert parse_since("2026-03-01", 0) == local


@pytest.mark.parametrize("text", ["", "10", "10 m", "m", "-5m", "yesterday", "10m!", "2026-13-01"])
def test_since_refuses_anything_else_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="1h30m"):
        parse_since(text, 0)


def test_colours_follow_the_terminal_and_the_two_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert not coloured(), "a test's output is no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert coloured()
    assert "\x1b[" in paint("x", "red")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()


STATS: dict[str, Any] = {
    "read": "1970-01-01T00:01:40.25Z",
    "memory_stats": {"usage": 1000, "stats": {"total_inactive_file": 400}},
    "cpu_stats": {"cpu_usage": {"total_usage": 3e9}},
}


def test_an_engines_own_figures_are_memory_without_cache_and_cpu_time_by_its_own_clock() -> None:
    usage = usage_in(STATS)
    assert (usage.memory_bytes, usage.cpu_s, usage.clock) == (600, 3.0, 100.25)
    nothing = usage_in({})
    assert (nothing.memory_bytes, nothing.cpu_s, nothing.clock) == (None, None, None)
    assert (
        usage_in({**STATS, "memory_stats": {"usage": 1000, "stats": {"inactive_file": 100}}}).memory_bytes
        == 900
    )


def test_a_container_that_does_not_answer_has_no_figures_and_holds_nobody_up() -> None:
    def ask(replica_id: str) -> Mapping[str, Any]:
        if replica_id == "gone":
            raise OSError("gone")
        return STATS

    assert set(ask_usage(ask, ["here", "gone"])) == {"here"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_figures_are_read_from_either_version_of_control_groups(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "fs"
    write(proc / "7/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/elsewhere\n")
    write(root / "memory/docker/abc/memory.usage_in_bytes", "1000\n")
    write(root / "memory/docker/abc/memory.stat", "cache 5\ntotal_inactive_file 400\n")
    write(root / "cpu,cpuacct/docker/abc/cpuacct.usage", "2500000000\n")
    one = read_usage(7, "abc", proc, root)
    write(proc / "8/cgroup", "0::/system.slice/docker-abc.scope\n")
    write(root / "system.slice/docker-abc.scope/memory.current", "1000\n")
    write(root / "system.slice/docker-abc.scope/memory.stat", "anon 5\ninactive_file 400\n")
    write(root / "system.slice/docker-abc.scope/cpu.stat", "usage_usec 2500000\nuser_usec 1\n")
    two = read_usage(8, "abc", proc, root)
    for usage in (one, two):
        assert usage is not None
        assert (usage.memory_bytes, usage.cpu_s) == (600, 2.5)


def test_another_machines_process_number_never_gives_this_ones_figures(tmp_path: Path) -> None:
    write(tmp_path / "proc/7/cgroup", "0::/user.slice/somebody.scope\n")
    write(tmp_path / "fs/user.slice/somebody.scope/memory.current", "1000\n")
    write(tmp_path / "fs/user.slice/somebody.scope/memory.stat", "inactive_file 0\n")
    assert read_usage(7, "somebody", tmp_path / "proc", tmp_path / "fs") is not None
    assert read_usage(7, "abc", tmp_path / "proc", tmp_path / "fs") is None
    assert read_usage(8, "abc", tmp_path / "proc", tmp_path / "fs") is None

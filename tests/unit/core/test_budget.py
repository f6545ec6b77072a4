"""What a reader may use: counts, seconds, and the pace of a transfer; regular files only."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from starling.core.budget import PACE_SECONDS, SECONDS, Budget, BudgetExceeded, Pace
from starling.core.files.regular import found, is_file, is_folder, open_regular, read_regular
from starling.core.words import printable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_says_what_was_exceeded() -> None:
    budget = Budget(bytes=3 << 20, header_bytes=1 << 19, rows=1000)
    budget.spend(bytes=3 << 20, rows=1000, header_bytes=1 << 19)
    for name, words in {"bytes": "3 MiB", "header_bytes": "0.5 MiB of header", "rows": "1,000 rows"}.items():
        with pytest.raises(BudgetExceeded, match=f"more than {words}$"):
            budget.spend(**{name: 1})


def test_a_budget_ends_with_its_seconds() -> None:
    clock = Clock()
    budget = Budget(clock=clock, rows=10)
    clock.now = SECONDS
    budget.spend(rows=1)
    clock.now += 0.1
    with pytest.raises(BudgetExceeded, match="more than 20 s"):
        budget.spend(rows=1)


def test_a_transfer_that_gets_on_has_no_end_of_time_and_one_that_stands_still_has() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(5000):
        clock.now += 59
        pace.step(100)
    clock.now += PACE_SECONDS
    with pytest.raises(BudgetExceeded, match="only 0 bytes in 60 s"):
        pace.step(0)


def test_a_transfer_of_less_than_a_byte_a_second_is_ended() -> None:
    clock = Clock()
    pace = Pace(clock)
    while clock.now < PACE_SECONDS - 2:
        clock.now += 2
        pace.step(1)
    clock.now += 2
    with pytest.raises(BudgetExceeded, match="only 30 bytes in 60 s, under 1 byte a second"):
        pace.step(1)


def test_only_a_regular_file_is_opened_and_none_makes_the_reader_wait(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(b"abc")
    assert read_regular(tmp_path / "whole", 3) == b"abc"
    with pytest.raises(BudgetExceeded, match="MiB"):
        read_regular(tmp_path / "whole", 2)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        odd = [tmp_path / "fifo", tmp_path / "socket", tmp_path, Path("/dev/zero"), tmp_path / "none"]
        for path in [*odd, f"{tmp_path}/a\0b", tmp_path / ("n" * 300), f"{tmp_path}/\ud800"]:
            with pytest.raises(OSError):  # noqa: PT011 - each kind has words of its own
                open_regular(path)


def test_a_file_without_a_size_is_read_up_to_the_limit() -> None:
    assert read_regular("/proc/self/status", 1 << 20).startswith(b"Name:")
    with pytest.raises(BudgetExceeded):
        read_regular("/proc/self/status", 10)


def test_a_name_that_no_file_can_have_is_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 300), f"{tmp_path}/a\0b", f"{tmp_path}/\ud800", tmp_path / "none"):
        assert found(path) is None
        assert not is_file(path)
        assert not is_folder(path)
    assert is_folder(tmp_path)


def test_a_name_is_shown_in_characters_that_can_be_printed() -> None:
    name = os.fsdecode(b"a\xff\x1b[2J\n\xc3\xa9")
    assert printable(name) == r"a\udcff\x1b[2J\n" + "é"
    printable(name).encode()

"""The journal stays readable whatever happens to those who write it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from starling.core.errors import CheckpointError, DiskFull, UsageError
from starling.search.storage import journal
from starling.search.storage.checksum import sealed
from starling.search.storage.journal import JournalStudyStorage, SafeJournalBackend, locked
from starling.search.study import SearchStudy
from tests.searches import spec

RECORD = {"op_code": 1, "worker_id": "w", "text": "x" * 200}
LINE = sealed(RECORD)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_records_come_back_in_order_and_only_once(tmp_path: Path) -> None:
    writer, reader = SafeJournalBackend(tmp_path / "j"), SafeJournalBackend(tmp_path / "j")
    writer.append_logs([{**RECORD, "n": 0}, {**RECORD, "n": 1}])
    assert [record["n"] for record in reader.read_logs(0)] == [0, 1]
    writer.append_logs([{**RECORD, "n": 2}])
    assert [record["n"] for record in reader.read_logs(2)] == [2]
    assert [record["n"] for record in reader.read_logs(1)] == [1, 2]


def test_a_reader_that_stops_half_way_goes_on_where_it_stopped(tmp_path: Path) -> None:
    backend = SafeJournalBackend(tmp_path / "j")
    backend.append_logs([{**RECORD, "n": n} for n in range(4)])
    records = backend.read_logs(0)
    assert [next(records)["n"], next(records)["n"]] == [0, 1]
    records.close()
    assert [record["n"] for record in backend.read_logs(2)] == [2, 3]


@pytest.mark.parametrize("tail", [b"{", b'{"op_code":4,"stud', b"\0" * 5000, b"x" * 200_000])
def test_torn_tail_is_unseen_by_readers_and_cut_by_the_next_append(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "j"
    backend = SafeJournalBackend(path)
    backend.append_logs([RECORD])
    with path.open("ab") as file:
        file.write(tail)
    assert len(list(SafeJournalBackend(path).read_logs(0))) == 1
    backend.append_logs([RECORD])
    assert path.read_bytes() == LINE * 2
    assert len(list(backend.read_logs(1))) == 1


@pytest.mark.parametrize("written", [0, 1, 100, len(LINE) - 1, len(LINE)])
def test_kill_during_append_keeps_every_whole_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = tmp_path / "j"
    SafeJournalBackend(path).append_logs([RECORD])
    whole = os.pwrite

    def die_half_way(descriptor: int, payload: bytes, offset: int) -> int:
        whole(descriptor, payload[:written], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", die_half_way)
        assert in_child(lambda: SafeJournalBackend(path).append_logs([RECORD])) == -signal.SIGKILL
    survived = 1 + (written == len(LINE))
    assert len(list(SafeJournalBackend(path).read_logs(0))) == survived
    SafeJournalBackend(path).append_logs([RECORD])  # the dead writer's lock is no obstacle
    assert path.read_bytes() == LINE * (survived + 1)


def test_full_disk_is_exit_6_with_the_path_and_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    backend = SafeJournalBackend(path)
    backend.append_logs([RECORD])
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 10, 10, 10, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda descriptor: full)
        with pytest.raises(DiskFull, match="No space left") as caught:
            backend.append_logs([RECORD])
    assert caught.value.exit_code == 6
    assert str(path) in str(caught.value)
    backend.append_logs([RECORD])
    assert path.read_bytes() == LINE * 2


def test_write_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    backend = SafeJournalBackend(path)
    backend.append_logs([RECORD])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(LINE) + 50, hard))
    try:
        with pytest.raises(DiskFull, match="cannot be written"):
            backend.append_logs([RECORD])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == LINE


def test_failed_fsync_is_never_reported_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SafeJournalBackend(tmp_path / "j")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal.os, "fsync", fail)
    with pytest.raises(DiskFull, match="Input/output error"):
        backend.append_logs([RECORD])


def test_whole_line_that_is_no_record_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for garbage in (b'{"op_c\n', b"[]\n", b"\xff\xfe\n", b"\n"):
        path.write_bytes(LINE + garbage)
        with pytest.raises(CheckpointError, match=r"j:2: not a record"):
            list(SafeJournalBackend(path).read_logs(0))


@pytest.mark.parametrize(
    "content", [b"a diary\n", b"a diary", b"[1, 2]\n", b"\x89PNG\r\n\x1a\n", b'{"op": 1}\n']
)
def test_file_that_never_was_a_journal_is_exit_2_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / journal.JOURNAL
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a study's journal; move it away") as caught:
        SearchStudy.open_or_create(tmp_path, spec({"lr0": 0.01}, 1))
    assert caught.value.exit_code == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b"{", b'{"op_code":0,"worker_id":"4', b"\0" * 300])
def test_journal_whose_first_record_was_torn_is_begun_anew(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / journal.JOURNAL).write_bytes(torn)
    SearchStudy.open_or_create(tmp_path, spec({"lr0": 0.01}, 1))
    assert SearchStudy.read(tmp_path).progress().budget == 1


def test_record_of_something_else_is_our_own_error(tmp_path: Path) -> None:
    for record in ({"op_code": 4}, {"op_code": 99}, {"op_code": 0, "study_name": 1, "directions": "x"}):
        (tmp_path / journal.JOURNAL).write_text(json.dumps(record) + "\n")
        with pytest.raises(CheckpointError, match="not one of a study"):
            JournalStudyStorage(tmp_path)


def test_journal_cut_or_removed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    backend = SafeJournalBackend(path)
    backend.append_logs([RECORD, RECORD])
    assert len(list(backend.read_logs(0))) == 2
    os.truncate(path, len(LINE))
    with pytest.raises(CheckpointError, match="cut short"):
        list(backend.read_logs(2))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        backend.append_logs([RECORD])
    assert not path.exists()


def test_relative_path_stays_the_same_file_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = SafeJournalBackend(Path("j"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    backend.append_logs([RECORD])
    assert (tmp_path / "j").read_bytes() == LINE


def test_lock_of_a_killed_holder_is_free_at_once(tmp_path: Path) -> None:
    def die_holding() -> None:
        with locked(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_holding) == -signal.SIGKILL
    with locked(tmp_path / "lock"):
        pass


def test_waiting_for_a_paused_holder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_PATIENCE_S", 0.0)
    with locked(tmp_path / "lock"):

        def give_up(line: str) -> None:
            raise InterruptedError(line)

        with pytest.raises(InterruptedError, match="paused"), locked(tmp_path / "lock", waiting=give_up):
            pass

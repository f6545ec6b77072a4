"""The door to runs/: whole files or none, run folders that nobody shares, and a status that never stops a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from starling.core.errors import UsageError
from starling.core.files import atomic
from starling.core.files.atomic import TEMPORARY_SUFFIX, append_line, write_atomic
from starling.core.settings.values import check_name
from starling.core.worker_status import FOLDER, WorkerStatus, worker_name
from starling.outputs.run_dir import RunDir, next_free_dir, project_dir, runs_root
from tests.conftest import REPOSITORY


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(TEMPORARY_SUFFIX)]


# write_atomic


def test_write_atomic_takes_bytes_text_and_a_function_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"\x00bytes")
    assert path.read_bytes() == b"\x00bytes"
    write_atomic(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomic(path, lambda file: file.writelines([b"from ", b"a function"]))
    assert path.read_bytes() == b"from a function"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_payload_that_fails_halfway_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_a_failed_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no rename today"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_content_is_on_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a, **b: (events.append("replace"), replace(*a, **b))[1])
    write_atomic(tmp_path / "file", b"content")
    assert events == ["fsync", "replace", "fsync"]


def test_kill_while_writing_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    script = (
        "import os, pathlib, signal, sys; from starling.core.files.atomic import write_atomic\n"
        "def payload(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(pathlib.Path(sys.argv[1]), payload)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=REPOSITORY, timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    """Every container's trainer may have the same process id: the id alone does not tell writers apart."""
    path = tmp_path / "evolve.csv"

    def while_another_writes(file: IO[bytes]) -> None:
        file.write(b"first ")
        file.flush()
        write_atomic(path, b"of another")
        file.write(b"and last")

    write_atomic(path, while_another_writes)
    assert path.read_bytes() == b"first and last"
    assert not leftovers(tmp_path)


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * 200_000 for letter in b"abcd"]
    write_atomic(path, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [write_atomic(path, content) for content in contents * 5])
        seen = set()
        while not writing.done():
            seen.add(path.read_bytes())
        writing.result()
    assert seen <= set(contents)


# append_line


def test_lines_are_appended_whole_by_many_writers(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: append_line(path, json.dumps({"i": i, "pad": "x" * 500})), range(200)))
    assert sorted(json.loads(line)["i"] for line in path.read_text().splitlines()) == list(range(200))


def test_a_line_ends_once_whether_or_not_it_came_with_its_end(tmp_path: Path) -> None:
    append_line(tmp_path / "file", "one")
    append_line(tmp_path / "file", "two\n")
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_a_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    write = os.write
    monkeypatch.setattr(atomic.os, "write", lambda fd, data: (writes.append(data), write(fd, data))[1])
    append_line(tmp_path / "file", "größer")
    assert writes == ["größer\n".encode()]


# Run folders


def test_the_runs_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_root({"STARLING_RUNS": "/shared/runs"}) == Path("/shared/runs")
    assert runs_root({}) == runs_root({"STARLING_RUNS": ""}) == tmp_path / "runs"


@pytest.mark.parametrize(
    ("project", "folder"),
    [
        ("train", "/r/train"),
        ("runs/train", "/r/train"),
        ("./runs/train", "/r/train"),
        ("runs", "/r"),
        ("a/b", "/r/a/b"),
        ("a/runs", "/r/a/runs"),
        ("/elsewhere/x", "/elsewhere/x"),
    ],
)
def test_a_project_lands_below_the_runs_folder(project: str, folder: str) -> None:
    assert project_dir(project, Path("/r")) == Path(folder)


@pytest.mark.parametrize("project", ["..", "../x", "a/../../x", "runs/../x"])
def test_a_project_that_climbs_out_is_refused(project: str) -> None:
    with pytest.raises(UsageError, match="leaves the runs folder"):
        project_dir(project, Path("/r"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b"])
def test_a_name_that_is_not_one_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="one folder name"):
        check_name(name)


def test_a_plain_name_is_kept() -> None:
    assert check_name("exp 1.ä") == "exp 1.ä"


def test_names_count_on_from_the_highest(tmp_path: Path) -> None:
    parent = tmp_path / "train"
    assert [next_free_dir(parent, "exp").name for _ in range(3)] == ["exp", "exp2", "exp3"]
    (parent / "exp10").mkdir()
    assert next_free_dir(parent, "exp").name == "exp11"


def test_other_names_that_begin_alike_are_not_counted(tmp_path: Path) -> None:
    for name in ("experiment7", "exp_9", "exp08", "exp-1", "exp3a"):
        (tmp_path / name).mkdir()
    assert next_free_dir(tmp_path, "exp").name == "exp"


@pytest.mark.parametrize("name", ["exp[1]", "a*", "what?", "1.5"])
def test_a_name_of_pattern_letters_is_only_a_name(tmp_path: Path, name: str) -> None:
    assert [next_free_dir(tmp_path, name).name for _ in range(3)] == [name, f"{name}2", f"{name}3"]


def test_a_file_of_the_same_name_is_never_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "exp").write_text("a file")
    assert next_free_dir(tmp_path, "exp").name == "exp2"
    assert (tmp_path / "exp").read_text() == "a file"


def test_askers_at_once_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: next_free_dir(tmp_path / "train", "exp"), range(40)))
    assert len(set(folders)) == 40
    assert all(folder.is_dir() for folder in folders)


def test_the_files_of_a_run_are_where_users_look_for_them() -> None:
    run = RunDir(Path("/r/train/exp"))
    assert [
        str(path.relative_to(run.path)) for path in (run.last, run.best, run.results_csv, run.events)
    ] == [
        "weights/last.pt",
        "weights/best.pt",
        "results.csv",
        "events.jsonl",
    ]


# Worker status


def test_a_worker_is_named_after_its_replica() -> None:
    assert worker_name({"STARLING_REPLICA": "search-gpu1"}) == "search-gpu1"
    assert worker_name({}).endswith(f"-{os.getpid()}")


def test_a_status_keeps_what_it_was_told_before(tmp_path: Path) -> None:
    status = WorkerStatus(tmp_path, "w1")
    status.update(phase="training", epoch=1)
    status.update(epoch=2)
    written = json.loads((tmp_path / FOLDER / "w1.json").read_text())
    assert (written["worker"], written["pid"], written["phase"]) == ("w1", os.getpid(), "training")
    assert written["epoch"] == 2
    assert written["updated"] > 1_600_000_000


def test_a_disk_that_refuses_never_stops_the_worker(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    WorkerStatus(tmp_path, "w1").update(phase="training")
    assert (tmp_path / FOLDER).is_file()


def test_a_value_that_is_no_json_never_stops_the_worker(tmp_path: Path) -> None:
    status = WorkerStatus(tmp_path, "w1")
    status.update(phase="training", run_dir=tmp_path)
    status.update(phase="done", run_dir=str(tmp_path))
    assert json.loads(status.path.read_text())["phase"] == "done"


def test_a_status_is_strict_json_even_when_the_fitness_is_not_a_number(tmp_path: Path) -> None:
    status = WorkerStatus(tmp_path, "w1")
    status.update(fitness=float("nan"), eta_s=float("inf"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads(status.path.read_text(), parse_constant=refuse)
    assert written["fitness"] is None
    assert written["eta_s"] is None

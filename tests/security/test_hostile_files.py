"""Files that a stranger put where a command reads its own: each ends in one message, soon, and in little memory."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.engines.docker.archives import read_archived_file
from launcher.options.request import read_env_file
from launcher.servers import compose
from launcher.servers.archive import ArchiveWriter, is_left_over, verify
from launcher.servers.restore import _send_artifacts
from starling.core.errors import CheckpointError, DataError, UsageError
from starling.core.settings.study_url import StudyUrl
from starling.distributed.heartbeat import GRACE_S, Heartbeat
from starling.search.storage import checksum, journal
from starling.search.storage.database import find_password
from starling.search.storage.repair import repair
from starling.tracking.mlflow.client import PASSWORD_FILE, read_password
from starling.tracking.tracker import TrackerUnavailableError
from starling.training.resume import ending
from tests.security.conftest import Measured
from tests.security.hostile_archives import HOSTILE, tar_of

VERIFY = "from launcher.servers.archive import verify as read"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_backup_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    backup = tmp_path / "backup.tar"
    backup.write_bytes(HOSTILE[kind][0]())
    with pytest.raises(DataError) as caught:
        verify(backup)
    assert str(backup) in str(caught.value)
    assert str(caught.value).isprintable()


def test_hostile_backups_take_little_time_and_memory(tmp_path: Path, measured: Measured) -> None:
    files = []
    for kind in (
        "xz-bomb",
        "huge-long-name",
        "huge-pax-plain",
        "digits-in-pax",
        "sparse-map",
        "many-globals",
    ):
        files.append(tmp_path / f"{kind}.tar")
        files[-1].write_bytes(HOSTILE[kind][0]())
    measured(VERIFY, files, most_bytes=400 << 20)


def test_a_backup_of_more_files_than_one_holds_is_refused_in_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = tmp_path / "backup.tar"
    with tarfile.open(backup, "w") as tar:
        writer = ArchiveWriter(tar, {})
        for number in range(5):
            writer.add(f"artifacts/{number}", 1, io.BytesIO(b"x"))
        monkeypatch.setattr("launcher.servers.archive.MOST_FILES", 3)
        with pytest.raises(DataError, match="more than 3 files"):
            writer.add("artifacts/6", 1, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="more than 3 files"):
        verify(backup)


class EngineThatSends:
    """A double of docker-py's call for a file: the engine's answer is `archive`, in blocks, under a modest claim."""

    def __init__(self, archive: Iterator[bytes], size: int = 10) -> None:
        self.archive, self.size, self.sent = archive, size, 0

    def get_archive(self, container: str, path: str) -> tuple[Any, dict[str, int]]:
        return self._blocks(), {"mode": 0o600, "size": self.size}

    def _blocks(self) -> Iterator[bytes]:
        for block in self.archive:
            self.sent += len(block)
            yield block


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if not kind.startswith("zip-")])
def test_a_container_whose_file_comes_as_a_hostile_archive_has_no_such_file(kind: str) -> None:
    engine = EngineThatSends(iter([HOSTILE[kind][0]()]))
    assert len(read_archived_file(engine, "a", "/runs/x", 1 << 20)) <= 1 << 20


def test_a_container_that_sends_for_ever_is_heard_for_a_megabyte_or_two() -> None:
    engine = EngineThatSends(bytes(1 << 16) for _ in range(1 << 20))
    assert read_archived_file(engine, "a", "/runs/x", 1000) == b""
    assert engine.sent < 3 << 20


def test_the_file_of_a_container_is_read_whole() -> None:
    engine = EngineThatSends(iter([tar_of(("x", b"status"))]))
    assert read_archived_file(engine, "a", "/runs/x", 1000) == b"status"


def test_a_line_longer_than_any_record_is_named_and_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / journal.JOURNAL
    path.write_bytes(
        checksum.sealed({"op_code": 0, "worker_id": "w", "study_name": "search", "directions": [2]})
        + b'{"op_code":4'
        + b" " * 5000
        + b"}\n"
    )
    monkeypatch.setattr(journal, "MOST_LINE_BYTES", 1000)
    monkeypatch.setattr(checksum, "MOST_LINE_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"study\.journal:2: not a record"):
        list(journal.SafeJournalBackend(path).read_logs(0))
    assert [dropped.line for dropped in repair(tmp_path).dropped] == [2]


def test_a_journal_that_is_larger_than_any_search_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / journal.JOURNAL
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(UsageError, match="more than 512 MiB"):
        repair(tmp_path)


class StoreOfAStranger:
    """A double of torch's store, into which somebody else has written for rank 1."""

    def __init__(self, value: bytes) -> None:
        self.value, self.own = value, b"{}"

    def set(self, key: str, value: str) -> None:
        self.own = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.own, self.value]


@pytest.mark.parametrize(
    "value", [b"", b"\xff", b"[" * 100_000, b"[]", b"7", b'{"beat": 1e999', b"{}" * 50_000, b"9" * 5000]
)
def test_what_a_stranger_writes_into_the_store_of_a_group_is_no_sign_of_life(value: bytes) -> None:
    now = [0.0]
    beat = Heartbeat(StoreOfAStranger(value), 0, 2, "rank 0", lambda lost: None, lambda: now[0])
    beat._beat()
    now[0] = 10 * GRACE_S
    beat._beat()
    lost = beat.find_lost(GRACE_S)
    assert lost is not None
    assert lost.rank == 1


def endless(tmp_path: Path, kind: str) -> Path:
    """Return a file that never ends, that nobody writes, or that is far too large."""
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    return path


KINDS = pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])


@KINDS
def test_an_env_file_that_never_ends_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=r"--env-file .*file"):
        read_env_file(endless(tmp_path, kind), {})


@KINDS
def test_a_password_that_never_ends_is_refused(tmp_path: Path, kind: str) -> None:
    path = endless(tmp_path, kind)
    with pytest.raises(UsageError, match="cannot be read"):
        find_password(StudyUrl(user="u", host="h", database="d"), {"STARLING_STUDY_PASSWORD_FILE": str(path)})
    with pytest.raises(TrackerUnavailableError, match="cannot be read"):
        read_password({PASSWORD_FILE: str(path)}, {})


@KINDS
def test_a_compose_file_that_never_ends_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    endless(tmp_path, kind).rename(tmp_path / compose.FILE_NAME)
    monkeypatch.setattr(compose, "__file__", str(tmp_path / "site" / "launcher" / "servers" / "compose.py"))
    with pytest.raises(UsageError, match=r"no docker-compose\.yml"):
        compose.find_compose_file(None, tmp_path)


def sealed_backup(path: Path, *names: str) -> Path:
    """Return a backup that is whole by its own manifest, of the two dumps and these files."""
    with tarfile.open(path, "w") as tar:
        writer = ArchiveWriter(tar, {"has_artifacts": True})
        for name in ("databases/mlflow.dump", "databases/starling.dump", *names):
            writer.add(name, 1, io.BytesIO(b"x"))
        writer.seal()
    return path


@pytest.mark.parametrize(
    "name",
    [
        "artifacts",
        "artifacts//etc/x",
        "artifacts/./x",
        "./artifacts/x",
        "artifacts/a//b",
        "databases/",
        "artifacts/x/.",
    ],
)
def test_a_name_that_is_not_spelled_as_a_backup_spells_it_is_refused(tmp_path: Path, name: str) -> None:
    backup = sealed_backup(tmp_path / "backup.tar", name)
    with pytest.raises(DataError, match="which no backup has"):
        verify(backup)


def test_names_of_any_bytes_are_backed_up_and_verified(tmp_path: Path) -> None:
    names = (
        "artifacts/a\udcff",
        "artifacts/käfer 猫",
        "artifacts/line\nend",
        "artifacts/.replaced/x",
        "artifacts/" + "n" * 300,
    )
    assert verify(sealed_backup(tmp_path / "backup.tar", *names)).files == 7


def test_what_an_interrupted_restore_left_is_neither_backed_up_nor_restored(tmp_path: Path) -> None:
    names = (
        "artifacts/1/model.pt",
        "artifacts/.replaced/1/model.pt",
        "artifacts/.restored/2/model.pt",
        "artifacts/.restored2",
    )
    backup = sealed_backup(tmp_path / "backup.tar", *names)
    sent = io.BytesIO()
    _send_artifacts(backup, backup, sent)
    with tarfile.open(fileobj=io.BytesIO(sent.getvalue())) as tar:
        assert tar.getnames() == ["1/model.pt", ".restored2"]
    assert [
        name for name in ("./1/x", "./.replaced/x", "./.restored/x", "./.replaced") if is_left_over(name)
    ] == [
        "./.replaced/x",
        "./.restored/x",
        "./.replaced",
    ]


@pytest.mark.parametrize(
    "value",
    [
        b'{"beat": NaN}',
        b'{"ended": null}',
        b'{"ended": "0"}',
        b'{"beat": [NaN], "ended": -1}',
        b'{"ended": 1e400}',
    ],
)
def test_a_value_that_never_moves_or_that_ends_oddly_is_silence(value: bytes) -> None:
    now = [0.0]
    beat = Heartbeat(StoreOfAStranger(value), 0, 2, "rank 0", lambda lost: None, lambda: now[0])
    for now[0] in (0.0, 10 * GRACE_S):
        beat._beat()
    lost = beat.find_lost(GRACE_S)
    assert lost is not None
    assert (lost.rank, lost.exit_code) == (1, 1)


@pytest.mark.parametrize("code", [2**40, -1, 256, True])
def test_an_end_that_a_stranger_tells_is_an_exit_code_and_steers_no_terminal(code: int) -> None:
    told = json.dumps({"who": "\x1b[2J", "ended": code, "message": "first\x1b[2J\nsecond"}).encode()
    beat = Heartbeat(StoreOfAStranger(told), 0, 2, "rank 0", lambda lost: None, lambda: 0.0)
    beat._beat()
    lost = beat.find_lost(GRACE_S)
    assert lost is None
    beat = Heartbeat(
        StoreOfAStranger(told.replace(json.dumps(code).encode(), b"3")),
        0,
        2,
        "rank 0",
        lambda lost: None,
        lambda: 0.0,
    )
    beat._beat()
    lost = beat.find_lost(GRACE_S)
    assert lost is not None
    assert lost.exit_code == 3
    assert lost.message == "rank 1 (\\x1b[2J) ended: first\\x1b[2J\nsecond"


def test_a_line_of_pgpass_takes_time_by_its_length_alone(tmp_path: Path) -> None:
    path = tmp_path / "pgpass"
    path.write_text("a" * 200_000 + "\\\n" + r"h\:x:5432:d:u:a\:b\\c" + "\n" + "*:*:*:*:any\n")
    path.chmod(0o600)
    began = time.process_time()
    assert find_password(StudyUrl(user="u", host="h", database="d"), {"PGPASSFILE": str(path)}) == "any"
    assert find_password(StudyUrl(user="u", host="h:x", database="d"), {"PGPASSFILE": str(path)}) == "a:b\\c"
    assert time.process_time() - began < 2


def test_a_journal_of_rubbish_without_end_is_not_mended_for_ever(tmp_path: Path) -> None:
    path = tmp_path / journal.JOURNAL
    record = checksum.sealed({"op_code": 0, "worker_id": "w", "study_name": "search", "directions": [2]})
    path.write_bytes(record + b"x\n" * 300)
    assert len(repair(tmp_path).dropped) == 300
    path.write_bytes(record + b"x\n" * 30_000)
    began = time.process_time()
    with pytest.raises(UsageError, match="restore it from a copy"):
        repair(tmp_path)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", [1, None, ["x"], "a\0b", "x" * 5000, "../../etc/passwd", "\udcff", {}])
def test_a_name_in_a_summary_that_no_file_has_is_not_there(tmp_path: Path, name: object) -> None:
    assert not ending._is_there(tmp_path, name)

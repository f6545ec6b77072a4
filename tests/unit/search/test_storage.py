"""Where a study may live: URLs, passwords and file systems, judged without a server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.cli import train
from starling.core.errors import UsageError
from starling.core.files import file_system
from starling.core.files.file_system import file_system_type, network_file_system
from starling.core.settings.study_url import StudyUrl, parse_study_url
from starling.core.settings.train import TrainConfig
from starling.search.storage.database import find_password
from starling.search.storage.journal import JournalStudyStorage
from starling.search.storage.storage import check_storage, open_storage, study_name
from tests.conftest import REPOSITORY

MOUNTS = r"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
30 22 0:26 / /proc rw,nosuid shared:12 - proc proc rw
41 22 0:40 / /srv/runs rw,relatime shared:20 - nfs4 10.0.0.9:/export rw,vers=4.2
42 41 0:41 / /srv/runs/local rw - xfs /dev/sdb1 rw
43 22 0:42 / /home/me/on\040another\040host rw - fuse.sshfs me@there:/ rw
44 22 0:43 / /mnt/windows rw - cifs //there/share rw
45 22 0:44 / /mnt/vm rw - 9p shared rw,trans=virtio
46 22 0:45 / /mnt/usb rw - fuseblk /dev/sdc1 rw
47 22 0:46 / /mnt/merged rw - fuse.mergerfs a:b rw
48 22 0:47 / /mnt/bucket rw - fuse.s3fs s3fs rw
49 22 0:48 / /mnt/over rw - nfs 10.0.0.9:/old rw
50 49 0:49 / /mnt/over rw - tmpfs tmpfs rw
51 22 0:50 / /mnt/what rw - fuse something rw
not a line of a mount table
52 22 0:51 / /srv/runs2 rw - btrfs /dev/sdd rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me/runs", "ext4"),
        ("/srv/runs", "nfs4"),
        ("/srv/runs/evolve/exp", "nfs4"),
        ("/srv/runs/local/exp", "xfs"),
        ("/srv/runs2/exp", "btrfs"),
        ("/home/me/on another host/runs", "fuse.sshfs"),
        ("/mnt/over/runs", "tmpfs"),
    ],
)
def test_file_system_of_a_folder_is_that_of_its_deepest_and_latest_mount(folder: str, kind: str) -> None:
    assert file_system_type(Path(folder), MOUNTS) == kind


@pytest.mark.parametrize(
    ("folder", "shared"),
    [
        ("/srv/runs/evolve", "nfs4"),
        ("/home/me/on another host", "fuse.sshfs"),
        ("/mnt/windows/runs", "cifs"),
        ("/mnt/vm/runs", "9p"),
        ("/mnt/bucket/runs", "fuse.s3fs"),
        ("/mnt/what/runs", "fuse"),
        ("/home/me/runs", None),
        ("/srv/runs/local", None),
        ("/mnt/usb/runs", None),
        ("/mnt/merged/runs", None),
        ("/mnt/over/runs", None),
    ],
)
def test_file_systems_that_other_machines_can_mount_are_told_from_local_ones(
    folder: str, shared: str | None
) -> None:
    assert network_file_system(Path(folder), MOUNTS) == shared


def test_link_to_a_network_file_system_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "there")
    mounts = f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp_path}/there rw - nfs4 host:/x rw\n"
    assert network_file_system(tmp_path / "runs" / "evolve" / "new", mounts) == "nfs4"


def test_where_no_mount_table_is_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "none")
    assert network_file_system(tmp_path) is None


def on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine's mount table say that everything lies on NFS."""
    (tmp_path / "mountinfo").write_text("1 0 0:1 / / rw - nfs4 host:/export rw\n")
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")


def test_journal_on_nfs_is_exit_2_before_any_work_and_names_both_remedies(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_args: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_nfs(tmp_path, monkeypatch)
    assert train.main([*tiny_args, "--evolve", "2"]) == 2
    error = capsys.readouterr().err
    assert f"{runs}/evolve/exp: lies on a network file system (nfs4)" in error
    assert "--study postgresql://" in error
    assert "--allow-nfs" in error
    assert not runs.exists()


def test_allow_nfs_keeps_the_journal_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_nfs(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="network file system"):
        check_storage("", tmp_path / "runs")
    check_storage("", tmp_path / "runs", allow_nfs=True)


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("postgresql://me@db/studies", StudyUrl(user="me", host="db", database="studies")),
        ("postgres://me@db:6543/s", StudyUrl(user="me", host="db", port=6543, database="s")),
        ("postgresql://a%40b@10.0.0.9/x%20y", StudyUrl(user="a@b", host="10.0.0.9", database="x y")),
        ("postgresql://me@[::1]:5433/s", StudyUrl(user="me", host="::1", port=5433, database="s")),
        (
            "postgresql://me@db/s?sslmode=verify-full&sslrootcert=/a/b.crt",
            StudyUrl(user="me", host="db", database="s", sslmode="verify-full", sslrootcert="/a/b.crt"),
        ),
    ],
)
def test_url_of_a_database_is_read(url: str, parsed: StudyUrl) -> None:
    assert parse_study_url(url) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@db/studies",
        "postgres://me:s3cret@db/studies",
        "postgresql://:s3cret@db/studies",
        "postgresql://me@db/studies?password=s3cret",
        "postgresql://me@db/studies?sslpassword=s3cret",
        "mysql://me:s3cret@db/studies",
        "postgresql://me:s3cret@db:99999/studies",
        "postgresql://me:s3cret@[db/studies",
        "postgresql://me:s3cret@/",
        "me:s3cret@db/studies",
    ],
)
def test_password_in_a_url_is_exit_2_and_never_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_study_url(url)
    assert caught.value.exit_code == 2
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_password_in_a_url_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--evolve", "2", "--study", "postgresql://me:s3cret@db/studies"]) == 2
    error = capsys.readouterr().err
    for place in ("STARLING_STUDY_PASSWORD_FILE", "PGPASSWORD", "~/.pgpass"):
        assert place in error
    assert "s3cret" not in error


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///study.db", "sqlite://… is no place for a study"),
        ("postgre://me@db/s", "did you mean 'postgres"),
        ("study.journal", "give postgresql://user@host"),
        ("postgresql://db/studies", "lacks user"),
        ("postgresql://me@/studies", "lacks host"),
        ("postgresql://me@db", "lacks database"),
        ("postgresql://", "lacks user and host and database"),
        ("postgresql://me@db/a/b", "cannot be read"),
        ("postgresql://me@db:port/s", "cannot be read"),
        ("postgresql://me@db/s?sslmod=require", "did you mean 'sslmode'"),
        ("postgresql://me@db/s?sslmode=yes", "must be one of: prefer"),
        ("postgresql://me@db/s?sslrootcert=a.crt", "sslmode=verify-full"),
        ("postgresql://me@db/s?=", "unknown option"),
        ("postgresql://me@db/s%0a", "cannot be read"),
    ],
)
def test_url_that_names_no_database_is_exit_2_with_the_remedy(url: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(evolve=2, study=url)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"study": "postgresql://me@db/s"}, "--study: belongs to a search"),
        ({"allow_nfs": True}, "--allow-nfs: belongs to a search"),
        ({"study": "postgresql://me@db/s", "allow_nfs": True, "evolve": 2}, "leave one out"),
    ],
)
def test_settings_of_a_study_without_a_use_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TrainConfig(**settings)  # type: ignore[arg-type]


URL = parse_study_url("postgresql://me@db/studies")


def test_password_is_taken_from_the_first_place_that_has_one(tmp_path: Path) -> None:
    own, passes = tmp_path / "own", tmp_path / ".pgpass"
    own.write_text("from the file\n")
    passes.write_text("*:*:*:*:from pgpass\n")
    passes.chmod(0o600)
    environment = {
        "STARLING_STUDY_PASSWORD_FILE": str(own), "PGPASSWORD": "from the variable", "HOME": str(tmp_path)
    }  # fmt: skip
    assert find_password(URL, environment) == "from the file"
    del environment["STARLING_STUDY_PASSWORD_FILE"]
    assert find_password(URL, environment) == "from the variable"
    del environment["PGPASSWORD"]
    assert find_password(URL, environment) == "from pgpass"
    environment["PGPASSFILE"] = str(tmp_path / "none")
    assert find_password(URL, environment) == ""


@pytest.mark.parametrize(
    ("lines", "password"),
    [
        ("db:5432:studies:me:right", "right"),
        ("# a comment\nother:5432:studies:me:wrong\ndb:*:*:me:right\n*:*:*:*:later", "right"),
        (r"db:5432:studies:me:with\:colon\\and backslash", r"with:colon\and backslash"),
        ("db:5433:studies:me:another port", ""),
        ("db:5432:studies:you:another user", ""),
        ("db:5432:studies:me", ""),
        ("", ""),
    ],
)
def test_line_of_pgpass_is_found_as_postgresqls_own_tools_do(
    lines: str, password: str, tmp_path: Path
) -> None:
    passes = tmp_path / "passes"
    passes.write_text(lines)
    passes.chmod(0o600)
    assert find_password(URL, {"PGPASSFILE": str(passes)}) == password


def test_password_file_that_others_can_read_or_nobody_is_exit_2(tmp_path: Path) -> None:
    passes = tmp_path / "passes"
    passes.write_text("*:*:*:*:s3cret")
    passes.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        find_password(URL, {"PGPASSFILE": str(passes)})
    with pytest.raises(UsageError, match=r"none: .*No such file"):
        find_password(URL, {"STARLING_STUDY_PASSWORD_FILE": str(tmp_path / "none")})


def test_study_has_the_same_name_on_every_host(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study_name(runs / "blood" / "search") == "blood/search"
    assert study_name(runs / "a" / "b" / "search") == "a/b/search"
    assert study_name(Path("/srv/elsewhere/blood/search")) == "blood/search"
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path / "other"))
    assert study_name(tmp_path / "other" / "blood" / "search") == "blood/search"


def test_without_a_url_the_study_is_a_journal_in_the_folder(tmp_path: Path) -> None:
    storage = open_storage("", tmp_path / "a" / "b")
    assert isinstance(storage, JournalStudyStorage)
    assert storage.where == str(tmp_path / "a" / "b" / "study.journal")


def test_nothing_of_a_database_is_imported_for_a_journal() -> None:
    code = (
        "import sys, starling.cli.train, starling.search.training, starling.cli.search;"
        "print(sorted({'sqlalchemy', 'pg8000', 'alembic'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[]"


def test_missing_driver_is_exit_2_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pg8000", "starling.search.storage.database", "starling.search.storage.database_storage"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pg8000", None)
    with pytest.raises(UsageError, match=r"pip install -r requirements\.txt"):
        open_storage("postgresql://me@db/studies", tmp_path)

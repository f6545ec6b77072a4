"""Whatever an archive holds, unpacking ends in one message, soon, in little memory, and leaves nothing behind."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path

import pytest

from starling.core.errors import DataError
from starling.data.fetch.acquire import acquire
from starling.data.fetch.archive import unpack
from tests.security.conftest import Measured
from tests.security.hostile_archives import GOOD_TAR, GOOD_ZIP, HOSTILE, tar_of, zip_of

UNPACK = """
from starling.data.fetch.archive import unpack
def read(path):
    unpack(path, path.with_name("in"))
"""


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_ends_in_one_message_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    build, words = HOSTILE[kind]
    archive = tmp_path / "a.tar.xz"
    archive.write_bytes(build())
    with pytest.raises(DataError, match=words) as caught:
        unpack(archive, tmp_path / "in")
    assert str(archive) in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "in").exists()


def test_hostile_archives_take_little_time_and_memory(tmp_path: Path, measured: Measured) -> None:
    files = []
    for kind in (
        "xz-bomb",
        "huge-long-name",
        "huge-pax",
        "sparse-map",
        "xz-dictionary",
        "zip-crowded",
    ):
        files.append(tmp_path / f"{kind}.tar")
        files[-1].write_bytes(HOSTILE[kind][0]())
    measured(UNPACK, files, most_bytes=400 << 20)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_file_is_unpacked_whole_however_it_is_packed(tmp_path: Path, pack: type[bytes]) -> None:
    large = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(pack(tar_of(("x/large", large), ("y", b""), ("n" * 150, b"long"))))
    assert unpack(tmp_path / "a", tmp_path / "in") == 3
    assert (tmp_path / "in/x/large").read_bytes() == large
    assert (tmp_path / "in" / ("n" * 150)).read_bytes() == b"long"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_is_unpacked_whole_however_it_is_packed(tmp_path: Path, method: int) -> None:
    large = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(
        b"before" + zip_of(("x/large", large), ("é", b""), ("d/", b""), method=method)
    )
    assert unpack(tmp_path / "a", tmp_path / "in") == 2
    assert (tmp_path / "in/x/large").read_bytes() == large


def test_a_zip_file_of_wide_sizes_and_more_entries_than_its_classic_end_can_count_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # above it, an end with wide numbers is written
    with zipfile.ZipFile(tmp_path / "a", "w") as file:
        with file.open("wide", "w", force_zip64=True) as entry:
            entry.write(b"wide")
        for number in range(9):
            file.writestr(f"{number}", b"")
    assert b"PK\6\6" in (tmp_path / "a").read_bytes()
    assert unpack(tmp_path / "a", tmp_path / "in") == 10
    assert (tmp_path / "in/wide").read_bytes() == b"wide"


def test_gzip_members_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(GOOD_TAR[:700]) + gzip.compress(GOOD_TAR[700:]) + bytes(100))
    assert unpack(tmp_path / "a", tmp_path / "in") == 2


def test_what_was_in_the_folder_before_stays_when_unpacking_fails(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/mine").write_text("mine")
    (tmp_path / "a").write_bytes(GOOD_ZIP[:-30])
    with pytest.raises(DataError):
        unpack(tmp_path / "a", tmp_path / "in")
    assert (tmp_path / "in/mine").read_text() == "mine"


def test_an_archive_of_empty_files_is_a_bomb_where_it_has_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starling.data.fetch.archive._ALWAYS_ALLOWED", 1 << 20)
    (tmp_path / "a").write_bytes(gzip.compress(tar_of(*((f"{n}", b"") for n in range(300))), 9))
    with pytest.raises(DataError, match="bomb"):
        unpack(tmp_path / "a", tmp_path / "in")


def test_a_dataset_whose_archive_is_damaged_leaves_nothing_half_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "datasets" / "set"
    archive = root.parent / ".downloads" / "set" / "a.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(HOSTILE["zip-checksum"][0]())
    (tmp_path / "set.yaml").write_text(
        "train: images\nval: images\nnames: [a]\ndownload:\n  - {url: 'https://there.example/a.zip'}\n"
    )
    with pytest.raises(DataError, match="Bad CRC-32"):
        acquire(tmp_path / "set.yaml", into=root.parent)
    assert not root.exists()
    assert not root.with_name(".set.building").exists()
    assert archive.exists()

"""Fetching: resumed where it broke, checked before it appears, and nothing leaves the folder."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import json
import re
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from starling.cli import data as data_command
from starling.config.shipped import SHIPPED
from starling.core.errors import CheckpointError, DataError, UsageError
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.fetch.acquire import Fetch, acquire, read_steps
from starling.data.fetch.archive import unpack
from starling.data.fetch.download import MIRROR, Download, FetchError, check_url, fetch, record_path
from starling.model import official
from starling.model.initial_weights import find_weights
from starling.model.official import OFFICIAL, official_name, official_weights, weights_folder
from starling.training.setup.data import load_data
from tests.conftest import MINI_SET, REPOSITORY

BODY = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """A server of files that can break a connection, keep silent about ranges, or redirect."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.break_after: list[int] = []
        """Bytes of the body that the next connections send before they end."""
        self.ranges = True
        self.etag = '"one"'
        self.content_type = "application/octet-stream"
        self.statuses: list[int] = []
        """Statuses that the next connections answer with."""
        self.asked: list[tuple[str, str | None]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that refuse an answer hang up on it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, asked_range = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((name, asked_range))
        if name in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[name])
            self.end_headers()
            return
        if self.server.statuses or name not in self.server.files:
            self.send_error(self.server.statuses.pop(0) if self.server.statuses else 404)
            return
        body, start = self.server.files[name], 0
        same = self.headers.get("If-Range") in (None, self.server.etag)
        if asked_range and self.server.ranges and same:
            start = int(asked_range.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", self.server.content_type)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        limit = self.server.break_after.pop(0) if self.server.break_after else len(body)
        self.wfile.write(body[start : start + limit])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=functools.partial(served.serve_forever, 0.01), daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A mirror that official names are fetched from, an empty cache, and an empty current folder."""
    monkeypatch.setenv(MIRROR, server.url)
    monkeypatch.setenv("STARLING_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server.files["yolov5s.pt"] = BODY
    return server


def wanted(server: Server, folder: Path, **known: object) -> Download:
    return Download(url=f"{server.url}/a.bin", target=folder / "a.bin", **{"max_bytes": 1 << 30, **known})  # type: ignore[arg-type]


def get(download: Download, shown: list[str] | None = None) -> str:
    lines: list[str] = [] if shown is None else shown
    return fetch(download, show=lambda line: lines.append(line()), sleep=lambda s: None)


def test_file_arrives_whole_with_its_digest_beside_it_and_no_leftovers(
    server: Server, tmp_path: Path
) -> None:
    server.files["a.bin"] = BODY
    shown: list[str] = []
    assert get(wanted(server, tmp_path, sha256=DIGEST, size=len(BODY)), shown) == DIGEST
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert record_path(tmp_path / "a.bin").read_text() == f"{DIGEST}  a.bin\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.bin.lock", "a.bin", "a.bin.sha256"]
    assert re.fullmatch(r"a\.bin: 1\.0 MB of 1\.0 MB, [\d.]+ MB/s, 0 s left", shown[-1])


def test_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    server.break_after = [300_000, 200_000]
    get(wanted(server, tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=300000-", "bytes=500000-"]


def test_download_that_gave_up_goes_on_in_the_next_call(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    server.break_after = [100_000] * 5
    with pytest.raises(FetchError, match=r"ended at 0\.5 MB of 1\.0 MB; 0\.5 MB are kept"):
        get(wanted(server, tmp_path))
    assert not (tmp_path / "a.bin").exists()
    get(wanted(server, tmp_path))
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked[-1] == ("a.bin", "bytes=500000-")


def test_part_that_had_all_arrived_is_taken_without_another_byte(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY)
    notes = {"url": f"{server.url}/a.bin", "validator": server.etag}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(notes))
    assert get(wanted(server, tmp_path, size=len(BODY))) == DIGEST


def test_a_part_that_another_process_writes_is_left_alone_though_the_lock_file_was_removed(
    server: Server, tmp_path: Path
) -> None:
    server.files["a.bin"] = BODY
    with open(tmp_path / "a.bin.part", "wb") as others:
        others.write(b"theirs")
        others.flush()
        fcntl.flock(others, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="another process is writing it"):
            get(wanted(server, tmp_path))
        assert (tmp_path / "a.bin.part").read_bytes() == b"theirs"
    assert get(wanted(server, tmp_path)) == DIGEST


@pytest.mark.parametrize("change", ["ranges", "etag"])
def test_file_that_cannot_be_resumed_or_changed_meanwhile_comes_whole(
    server: Server, tmp_path: Path, change: str
) -> None:
    server.files["a.bin"] = BODY[::-1]
    server.break_after = [100_000] * 5
    with pytest.raises(FetchError):
        get(wanted(server, tmp_path))
    server.files["a.bin"] = BODY
    setattr(server, change, {"ranges": False, "etag": '"two"'}[change])
    assert get(wanted(server, tmp_path)) == DIGEST


def test_part_without_anything_to_tell_that_it_is_the_same_file_is_dropped(
    server: Server, tmp_path: Path
) -> None:
    server.files["a.bin"] = BODY
    server.etag = ""
    server.break_after = [1000]
    assert get(wanted(server, tmp_path)) == DIGEST
    assert [asked for _, asked in server.asked] == [None, None]


@pytest.mark.parametrize("known", [{"sha256": "0" * 64}, {"size": 7}])
def test_other_content_than_published_is_refused_and_thrown_away(
    server: Server, tmp_path: Path, known: dict[str, object]
) -> None:
    server.files["a.bin"] = BODY
    with pytest.raises(FetchError, match="published"):
        get(wanted(server, tmp_path, **known))
    assert [path.name for path in tmp_path.iterdir()] == [".a.bin.lock"]


def test_file_over_the_limit_is_refused_before_a_byte_is_kept(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    with pytest.raises(FetchError, match="over the limit"):
        get(wanted(server, tmp_path, max_bytes=1000))
    assert not (tmp_path / "a.bin.part").exists()


def test_web_page_in_place_of_the_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = b"<html>please log in</html>"
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(FetchError, match="web page"):
        get(wanted(server, tmp_path))


def test_busy_server_is_asked_again_and_a_missing_file_is_not(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    server.statuses = [503]
    assert get(wanted(server, tmp_path)) == DIGEST
    server.asked.clear()
    with pytest.raises(FetchError, match="answers 404"):
        get(Download(url=f"{server.url}/none.bin", target=tmp_path / "none.bin", max_bytes=10))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.bin",
        "file:///etc/passwd",
        "ftp://example.com/a",
        "https://me:secret@example.com/a",
        "a.bin",
    ],
)
def test_only_https_is_fetched_and_no_password_is_taken(url: str) -> None:
    with pytest.raises(UsageError) as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_redirect_to_plain_http_elsewhere_or_to_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    for target in ("http://example.com/a.bin", "file:///etc/passwd"):
        server.redirects["a.bin"] = target
        with pytest.raises((UsageError, FetchError)):
            get(wanted(server, tmp_path))
    server.redirects["a.bin"] = f"{server.url}/b.bin"
    server.files["b.bin"] = BODY
    assert get(wanted(server, tmp_path)) == DIGEST


def test_two_that_want_the_same_file_fetch_it_once(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = BODY
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(get(wanted(server, tmp_path)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [DIGEST] * 4
    assert len(server.asked) == 1


# Published weights


def test_command_that_fetches_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, starling.cli.data; print({'torch', 'numpy', 'cv2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["yolov5s", "yolov5s.pt"])
def test_published_weights_are_fetched_by_name_once_and_kept(mirror: Server, name: str) -> None:
    path = find_weights(name)
    assert path == weights_folder() / "yolov5s.pt"
    assert path.read_bytes() == BODY
    mirror.asked.clear()
    assert find_weights(name) == path
    assert mirror.asked == []


def test_file_here_comes_before_the_published_one(mirror: Server) -> None:
    Path("yolov5s.pt").write_bytes(b"mine")
    assert find_weights("yolov5s") == Path("yolov5s.pt")
    assert mirror.asked == []


def test_only_bare_official_names_mean_published_weights(mirror: Server) -> None:
    assert {official_name(name) for name in OFFICIAL} == set(OFFICIAL)
    for name in ("models/yolov5s.pt", "yolov5z.pt", "best.pt", "../yolov5s", "yolov5s.pt.pt"):
        with pytest.raises(CheckpointError, match="no such file"):
            find_weights(name)
    assert mirror.asked == []


def test_checksum_mismatch_of_weights_is_refused(mirror: Server) -> None:
    mirror.files["yolov5s.pt.sha256"] = f"{'0' * 64}  yolov5s.pt\n".encode()
    with pytest.raises(CheckpointError, match="published is 0000"):
        find_weights("yolov5s")
    assert not (weights_folder() / "yolov5s.pt").exists()
    mirror.files["yolov5s.pt.sha256"] = f"{DIGEST}  yolov5s.pt\n".encode()
    assert find_weights("yolov5s").is_file()


@pytest.mark.parametrize(
    ("digest", "fits"), [(f"sha256:{DIGEST}", True), (f"sha256:{'0' * 64}", False), (None, True)]
)
def test_digest_and_size_of_the_release_are_held_against_the_file(
    mirror: Server, monkeypatch: pytest.MonkeyPatch, digest: str | None, fits: bool
) -> None:
    monkeypatch.delenv(MIRROR)
    monkeypatch.setattr(official, "RELEASE", mirror.url)
    monkeypatch.setattr(official, "RELEASE_FACTS", f"{mirror.url}/facts")
    assets = [{"name": "yolov5n.pt"}, {"name": "yolov5s.pt", "size": len(BODY), "digest": digest}]
    mirror.files["facts"] = json.dumps({"assets": assets}).encode()
    if fits:
        assert official_weights("yolov5s.pt").is_file()
    else:
        with pytest.raises(CheckpointError, match="thrown away"):
            official_weights("yolov5s.pt")


def test_offline_message_names_the_url_the_folder_and_costs_exit_code_4(
    mirror: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(CheckpointError) as error:
        find_weights("yolov5s6")
    assert error.value.exit_code == 4
    message = str(error.value)
    assert "https://github.com/ultralytics/yolov5/releases/download/v7.0/yolov5s6.pt" in message
    assert str(weights_folder()) in message
    assert str(Path.cwd()) in message


def test_kept_weights_that_changed_are_refused(mirror: Server) -> None:
    path = find_weights("yolov5s")
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(CheckpointError, match="changed since it was fetched"):
        find_weights("yolov5s")


# Archives: fault 24


def zip_of(path: Path, entries: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = mode << 16
            file.writestr(entry, content)
    return path


OUTSIDE = ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:/evil.txt", "C:\\evil.txt"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_entry_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive, folder = tmp_path / "a", tmp_path / "in" / "deep"
    if kind == "zip":
        zip_of(archive, {name: b"x"})
    else:
        with tarfile.open(archive, "w:gz") as file:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            file.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="leads out"):
        unpack(archive, folder)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        entry = tarfile.TarInfo("images")
        entry.type, entry.linkname = kind, "/etc"
        file.addfile(entry)
    with pytest.raises(DataError, match="link or a device"):
        unpack(tmp_path / "a.tar", tmp_path / "in")


def test_symlink_of_a_zip_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"images": b"/etc"}, stat.S_IFLNK | 0o777)
    with pytest.raises(DataError, match="link or a device"):
        unpack(archive, tmp_path / "in")


def test_bomb_doubled_name_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("starling.data.fetch.archive._ALWAYS_ALLOWED", 1 << 20)
    with pytest.raises(DataError, match="bomb"):
        unpack(zip_of(tmp_path / "bomb.zip", {"a": bytes(4 << 20)}), tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.writestr("a.txt", "1")
        file.writestr("a.txt", "2")
    with pytest.raises(DataError, match="written twice"):
        unpack(tmp_path / "twice.zip", tmp_path / "two")
    (tmp_path / "page.zip").write_text("<html>")
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path / "in")


def test_leading_folder_is_left_off_where_it_stands(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"set/images/1.jpg": b"1", "2.txt": b"2", "__MACOSX/set/._1": b"3"})
    assert unpack(archive, tmp_path / "in", strip="set") == 2
    assert sorted(p.relative_to(tmp_path / "in").as_posix() for p in (tmp_path / "in").rglob("*.*")) == [
        "2.txt",
        "images/1.jpg",
    ]


# Datasets


@pytest.fixture
def tiny_zip(tmp_path: Path) -> bytes:
    """A zip of four real images with labels, under a leading folder."""
    entries = {}
    for split in ("train", "val"):
        for image in sorted((MINI_SET / "images" / split).glob("*.jpg"))[:2]:
            entries[f"tiny/images/{split}/{image.name}"] = image.read_bytes()
            label = MINI_SET / "labels" / split / f"{image.stem}.txt"
            entries[f"tiny/labels/{split}/{label.name}"] = label.read_bytes()
    return zip_of(tmp_path / "made.zip", entries).read_bytes()


TINY = """\
path: ../datasets/tiny
train: images/train
val: images/val
names: [RBC, WBC, Platelets]
download:
  - url: https://example.com/v1/tiny.zip
    strip: tiny
"""


def test_dataset_is_fetched_when_asked_for_and_trains_from_its_own_folder_too(
    mirror: Server, tiny_zip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.files["tiny.zip"] = tiny_zip
    mirror.break_after = [5000]
    Path("tiny.yaml").write_text(TINY)
    with pytest.raises(DataError, match=r"starling data download .*tiny\.yaml"):
        DatasetDescription.from_yaml(Path("tiny.yaml"))
    assert mirror.asked == []
    assert data_command.main(["download", "tiny.yaml"]) == 0
    root = Path("../datasets/tiny").resolve()
    assert len(Dataset.load(DatasetDescription.from_yaml(Path("tiny.yaml")), "train")) == 2
    assert len(Dataset.load(DatasetDescription.from_yaml(root / "tiny.yaml"), "val")) == 2
    assert sorted(path.name for path in root.parent.iterdir()) == [".tiny.lock", "tiny"]
    mirror.asked.clear()
    assert data_command.main(["download", "tiny.yaml"]) == 0
    assert mirror.asked == []
    assert "is there already" in capsys.readouterr().out


def test_train_fetches_a_dataset_under_its_flag_only(
    mirror: Server, tiny_zip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from starling.core.settings.train import parse_args

    mirror.files["tiny.zip"] = tiny_zip
    Path("tiny.yaml").write_text(TINY)
    command = ["--data", "tiny.yaml", "--cache", "off"]
    with pytest.raises(DataError, match="--download"):
        load_data(parse_args(command).config, 64, tmp_path)
    assert mirror.asked == []
    data = load_data(parse_args([*command, "--download"]).config, 64, tmp_path)
    assert len(data.train) == 2


def test_dataset_that_cannot_be_unpacked_leaves_no_folder(mirror: Server, tmp_path: Path) -> None:
    mirror.files["tiny.zip"] = zip_of(
        tmp_path / "evil.zip", {"ok.txt": b"", "../../evil.txt": b"x"}
    ).read_bytes()
    Path("tiny.yaml").write_text(TINY)
    assert data_command.main(["download", "tiny.yaml"]) == 3
    assert not Path("../datasets/tiny").exists()
    assert not list(tmp_path.rglob("evil.txt"))


def test_dataset_offline_costs_exit_code_3_and_says_where_to_put_it(
    mirror: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MIRROR, "http://127.0.0.1:9")
    assert data_command.main(["download", "coco8.yaml"]) == 3
    assert str(Path("../datasets/coco8").resolve()) in capsys.readouterr().err


@pytest.mark.parametrize(
    "download",
    [
        "wget https://example.com/a.zip",
        "[{url: 'http://example.com/a.zip'}]",
        "[{url: 'https://example.com/a.zip', extract_to: ../..}]",
        "[{url: 'https://example.com/a.zip', run: rm}]",
        "[{convert: shell, source: a}]",
        "[{convert: voc, source: ../.., split: train, into: x}]",
        "[{convert: voc, source: a}]",
        "[just text]",
        "[{url: 'https://example.com/a.csv', save_to: ../..}]",
        "[{url: 'https://example.com/a.csv', save_to: a, strip: b}]",
        "[{names: ../../a.csv}]",
        "[{names: a.csv, convert: voc}]",
    ],
)
def test_steps_that_are_scripts_or_lead_outside_are_refused(tmp_path: Path, download: str) -> None:
    (tmp_path / "a.yaml").write_text(f"train: a\nnames: [x]\ndownload: {download}\n")
    with pytest.raises(UsageError):
        read_steps(tmp_path / "a.yaml")


CLASSES = {
    "bccd": 3, "coco128": 80, "coco8": 80, "coco": 80, "VOC": 20, "VisDrone": 10,
    "GlobalWheat2020": 1, "Objects365": 365, "open-images-v6": 601,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((SHIPPED / "datasets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_description_is_valid_and_has_its_classes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets" / path.stem).mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    description = DatasetDescription.from_yaml(path)
    assert description.nc == len(set(description.names)) == CLASSES[path.stem]
    assert all(step.url.startswith("https://") for step in read_steps(path) if isinstance(step, Fetch))


def test_dataset_that_must_be_got_by_hand_says_so(tmp_path: Path) -> None:
    description = tmp_path / "mine.yaml"
    description.write_text(
        "path: ../datasets/mine\ntrain: train\nval: val\nnames: [x]\ndownload:\n"
        "  - convert: coco\n    source: train.json\n    images: train\n"
    )
    with pytest.raises(DataError, match="get the data yourself"):
        acquire(description, into=tmp_path / "datasets")


CLASS_FILE = "class-descriptions-boxable.csv"
BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"


def images_tar(folder: str, stem: str) -> bytes:
    """A tar.gz as the bucket has it: one real image under a leading folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        file.add(next((MINI_SET / "images" / "val").glob("*.jpg")), f"{folder}/{stem}.jpg")
    return packed.getvalue()


@pytest.fixture
def open_images(mirror: Server) -> Server:
    """A mirror with all that the shipped steps of Open Images fetch, small."""
    classes = ["/m/0k4j,Car", *(f"/m/{number:03d},Thing {number}" for number in range(600))]
    mirror.files[CLASS_FILE] = "\n".join(classes).encode()
    for name, stem in (("validation", "00a1"), ("oidv6-train", "00b2")):
        rows = f"{stem},x,/m/0k4j,1,0,0.5,0,1,0,0,0\nffff,x,/m/001,1,0,0.5,0,1,0,0,0\n"
        mirror.files[f"{name}-annotations-bbox.csv"] = (BOXES + rows).encode()
    mirror.files["validation.tar.gz"] = images_tar("validation", "00a1")
    mirror.files["train_0.tar.gz"] = images_tar("train_0", "00b2")
    return mirror


def test_shipped_steps_of_open_images_make_a_dataset_with_the_names_of_its_class_file(
    open_images: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command.main(["download", "open-images-v6.yaml"]) == 0
    said = capsys.readouterr().out
    assert "1 rows of images that are not in images/train" in said
    assert "images/test is not there" in said
    root = Path("../datasets/open-images-v6").resolve()
    for path in (root / "open-images-v6.yaml", SHIPPED / "datasets" / "open-images-v6.yaml"):
        description = DatasetDescription.from_yaml(path)
        assert (description.root, description.nc, description.names[:2]) == (root, 601, ("Car", "Thing 0"))
        for split in ("train", "val"):
            dataset = Dataset.load(description, split, strict=True)
            assert dataset.labels[0].tolist() == [[0, 0.25, 0.5, 0.5, 1]]
            assert not dataset.unpaired
    assert sorted(path.name for path in (root / "annotations").iterdir()) == [
        CLASS_FILE, "oidv6-train-annotations-bbox.csv", "validation-annotations-bbox.csv",
    ]  # fmt: skip
    assert not (root.parent / ".downloads").exists()


def test_class_file_of_another_number_of_classes_is_refused_before_images_are_fetched(
    open_images: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    open_images.files[CLASS_FILE] = b"/m/0k4j,Car\n"
    assert data_command.main(["download", "open-images-v6.yaml"]) == 3
    assert "1 classes, the description's `nc:` is 601" in capsys.readouterr().err
    assert [name for name, _ in open_images.asked if name.endswith((".gz", "bbox.csv"))] == []
    assert not Path("../datasets/open-images-v6").exists()


def test_description_beside_the_data_must_have_as_many_names_as_the_one_that_asks(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.yaml").write_text("path: .\ntrain: images\nnames: [x, y]\n")
    (tmp_path / "a.yaml").write_text("path: set\ntrain: images\nnc: 3\n")
    with pytest.raises(UsageError, match="`nc:` is 3; make them agree"):
        DatasetDescription.from_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("path: set\ntrain: images\nnc: 2\n")
    assert DatasetDescription.from_yaml(tmp_path / "a.yaml").names == ("x", "y")


def test_names_are_given_in_the_description_or_by_a_step_and_not_by_both(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "train: a\nnames: [x]\ndownload:\n"
        "  - {url: 'https://example.com/c.csv', save_to: .}\n  - {names: c.csv}\n"
    )
    with pytest.raises(UsageError, match="remove the other"):
        acquire(tmp_path / "a.yaml", into=tmp_path / "into")

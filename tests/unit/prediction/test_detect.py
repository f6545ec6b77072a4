"""Detecting on real images, a small video, URLs and lists, by the command itself."""

from __future__ import annotations

import csv
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from starling.cli.detect import main
from starling.core.errors import DataError, UsageError
from starling.core.settings.detect import parse_args
from starling.data.sources import sources
from starling.data.sources.remote_source import download
from starling.prediction import detecting
from starling.prediction.detection_files import class_folders
from starling.prediction.inference import Augmented
from tests.conftest import CELL_DETECTOR, MINI_SET, REPOSITORY

WEIGHTS = str(CELL_DETECTOR)
IMAGES = sorted((MINI_SET / "images" / "val").glob("*.jpg"))
FLAGS = ["--weights", WEIGHTS, "--device", "cpu", "--json", "--imgsz", "96", "--conf-thres", "0.05"]


def detect(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """Run detect.py, which must succeed, and return the object of its last line."""
    assert main([*FLAGS, *args]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fail(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run detect.py, which must fail, and return its exit code and its message."""
    code = main([*FLAGS, *args])
    return code, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two real images, one of them as .PNG, and a file that is not an image."""
    target = tmp_path / "images"
    target.mkdir()
    shutil.copyfile(IMAGES[0], target / "a.jpg")
    cv2.imwrite(str(target / "b.PNG"), cv2.imread(str(IMAGES[1])))
    (target / "notes.md").write_text("not an image")
    return target


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Return seven frames of a real image, 128 x 96, 12 frames a second."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12, (128, 96))
    image = cv2.resize(cv2.imread(str(IMAGES[0])), (128, 96))
    for shift in range(7):
        writer.write(np.roll(image, shift * 4, axis=1))
    writer.release()
    return path


def frames_of(path: Path) -> tuple[int, tuple[int, int], float]:
    capture = cv2.VideoCapture(str(path))
    count, fps = 0, capture.get(cv2.CAP_PROP_FPS)
    hw = (0, 0)
    while True:
        whole, image = capture.read()
        if not whole:
            return count, hw, fps
        count, hw = count + 1, image.shape[:2]


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_gives_images_labels_csv_and_crops_that_agree(
    folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(folder)
    told = detect(capsys, "--source", str(folder), "--save-txt", "--save-conf", "--save-csv", "--save-crop")
    run = runs / "detect" / "exp"
    assert told["run"] == str(run)
    assert told["frames"] == 2
    assert told["detections"] == sum(told["classes"].values()) > 0
    assert told["annotated"] == [str(run / "a.jpg"), str(run / "b.PNG")]
    for name in ("a.jpg", "b.PNG"):
        drawn, original = cv2.imread(str(run / name)), cv2.imread(str(folder / name))
        assert drawn.shape == original.shape
        assert np.abs(drawn.astype(int) - original).max() > 100  # a box's line

    rows = list(csv.DictReader((run / "predictions.csv").open()))
    lines = [line.split() for path in sorted((run / "labels").glob("*.txt")) for line in path.open()]
    assert len(rows) == len(lines) == told["detections"] == len(list((run / "crops").rglob("*.jpg")))
    height, width = 480, 640
    for row, line in zip(rows, lines, strict=True):
        x, y, w, h, confidence = map(float, line[1:])
        assert row["class"] == line[0]
        assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-4)
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        assert [float(row[key]) for key in ("x1", "y1", "x2", "y2")] == pytest.approx(corners, abs=0.1)
    assert digests(folder) == before


def test_the_surest_white_cell_lies_on_the_labelled_one(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = next(
        line.split() for line in (MINI_SET / "labels/val" / f"{IMAGES[0].stem}.txt").open() if line[0] == "1"
    )
    detect(capsys, "--source", str(IMAGES[0]), "--imgsz", "320", "--classes", "1", "--save-txt", "--nosave")
    found = (runs / "detect/exp/labels" / f"{IMAGES[0].stem}.txt").read_text().splitlines()[0].split()
    assert found[0] == "1"
    (x, y, w, h), (tx, ty, tw, th) = (map(float, row[1:5]) for row in (found, label))
    shared = [
        max(min(c + s / 2, tc + ts / 2) - max(c - s / 2, tc - ts / 2), 0)
        for c, s, tc, ts in ((x, w, tx, tw), (y, h, ty, th))
    ]
    overlap = shared[0] * shared[1]
    assert overlap / (w * h + tw * th - overlap) > 0.5
    assert not list((runs / "detect/exp").glob("*.jpg"))


def test_every_third_frame_of_a_video_makes_a_video_of_the_same_length_in_seconds(
    video: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = detect(capsys, "--source", str(video), "--vid-stride", "3", "--save-txt", "--conf-thres", "0.001")
    assert told["frames"] == 3
    assert frames_of(runs / "detect/exp/clip.mp4") == (3, (96, 128), 4.0)
    names = {path.name for path in (runs / "detect/exp/labels").iterdir()}
    assert names <= {"clip_0.txt", "clip_3.txt", "clip_6.txt"}
    assert names


def test_a_signal_finishes_the_video_so_far_and_says_so(
    video: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_at_the_second(*args: Any) -> Iterator[sources.Frame]:
        for frame in sources.frames(*args):
            if frame.number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield frame

    monkeypatch.setattr(detecting, "frames", stopped_at_the_second)
    assert main([*FLAGS, "--source", str(video)]) == 143
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stopped"] is True
    assert frames_of(runs / "detect/exp/clip.mp4")[0] == 2
    assert sorted(path.name for path in (runs / "detect/exp").iterdir()) == ["clip.mp4", "outputs.json"]


def test_equal_names_from_two_folders_do_not_replace_each_other(
    folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "deeper").mkdir()
    shutil.copyfile(IMAGES[2], folder / "deeper" / "a.jpg")
    told = detect(capsys, "--source", str(folder / "**" / "*.jpg"))
    names = [Path(path).name for path in told["annotated"]]
    assert names[0] == "a.jpg"
    assert re.fullmatch(r"a-[0-9a-f]{6}\.jpg", names[1])
    assert told["renamed"] == [{"source": str(folder / "deeper" / "a.jpg"), "name": Path(names[1]).stem}]


def test_the_guide_s_line_without_a_source_looks_at_the_images_carried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(detecting, "find_sources", lambda source, left_out: seen.append(source) or [])
    assert (
        main(["--weights", WEIGHTS, "--img", "832", "--device", "cpu"]) == 3
    )  # as nothing is left to look at
    assert [Path(source).resolve() for source in seen] == [MINI_SET / "images" / "val"]


def test_a_list_names_images_relative_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = folder / "list.txt"
    listed.write_text(f"# two\na.jpg\n\n{IMAGES[3]}\n")
    assert detect(capsys, "--source", str(listed))["frames"] == 2
    listed.write_text("a.jpg\nmissing.jpg\n")
    code, message = fail(capsys, "--source", str(listed))
    assert code == 3
    assert f"{listed}:2" in message


def test_a_missing_source_is_a_data_error_and_leaves_no_run(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = fail(capsys, "--source", str(tmp_path / "nothing"))
    assert code == 3
    assert "webcam number or stream" in message
    assert not runs.exists()


@pytest.mark.parametrize("content", [b"", b"no image", IMAGES[0].read_bytes()[:5000]])
def test_an_unusable_image_is_named_and_left_out_unless_it_is_all_there_is(
    folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "broken.jpg"
    broken.write_bytes(content)
    told = detect(capsys, "--source", str(folder))
    assert told["skipped"] == [str(broken)]
    assert told["frames"] == 2
    code, message = fail(capsys, "--source", str(broken))
    assert code == 3
    assert str(broken) in message


def test_a_broken_video_is_a_data_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing of a video" * 50)
    code, message = fail(capsys, "--source", str(path))
    assert code == 3
    assert "convert it to mp4" in message


def test_outputs_never_replace_the_images_looked_at(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "detect" / "exp"
    run.mkdir(parents=True)
    shutil.copyfile(IMAGES[0], run / "a.jpg")
    before = digests(run)
    code, message = fail(capsys, "--source", str(run), "--exist-ok")
    assert code == 2
    assert "--name" in message
    assert digests(run) == before


def test_a_class_name_cannot_lead_out_of_the_crops_folder(tmp_path: Path) -> None:
    names = ("../../etc", "/etc", "..", "a/b", "a\0b", "", " . ", "a\nb", "\x1b[2J", "CON|", "é" * 300)
    folders = class_folders(names, tmp_path)
    for folder in folders:
        assert folder not in ("", ".", "..")
        assert not set("/\0\\\n\x1b") & set(folder)
        (tmp_path / folder).mkdir()  # a name too long, or there already, would raise
    assert class_folders(("cell (red)", "Größe"), tmp_path) == ("cell (red)", "Größe")


def test_classes_of_equal_names_have_crop_folders_by_number(tmp_path: Path) -> None:
    names = ("cell", "a/b", "cell", "a:b", "cell 0", "x" * 300, "x" * 299)
    folders = class_folders(names, tmp_path)
    assert folders[:5] == ("cell 0 0", "a_b 1", "cell 2", "a_b 3", "cell 0")
    assert len(set(folders)) == len(names)


def test_thresholds_and_classes_choose_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    source = ("--source", str(IMAGES[0]), "--nosave")
    everything = detect(capsys, *source)["detections"]
    assert detect(capsys, *source, "--conf-thres", "0.3")["detections"] < everything
    assert detect(capsys, *source, "--max-det", "2")["detections"] == 2
    assert set(detect(capsys, *source, "--classes", "0")["classes"]) == {"RBC"}
    assert detect(capsys, *source, "--iou-thres", "0.05", "--agnostic-nms")["detections"] < everything
    assert fail(capsys, *source, "--classes", "7")[0] == 2


def test_names_may_come_from_a_dataset_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "cells.yaml"
    data.write_text("path: /nowhere\ntrain: x\nnames: [red, white, plate]\n")
    told = detect(capsys, "--source", str(IMAGES[0]), "--data", str(data), "--nosave")
    assert set(told["classes"]) <= {"red", "white", "plate"}
    data.write_text("train: x\nnames: [red]\n")
    assert fail(capsys, "--source", str(IMAGES[0]), "--data", str(data))[0] == 2


def test_the_same_weights_twice_find_what_they_find_once(capsys: pytest.CaptureFixture[str]) -> None:
    source = ("--source", str(IMAGES[0]), "--nosave")
    alone = detect(capsys, *source)["classes"]
    assert detect(capsys, *source, "--weights", WEIGHTS, WEIGHTS)["classes"] == alone


class BrightSpot(torch.nn.Module):
    """A detector that boxes the brightest pixel: 10 x 20 pixels, whatever the size of the image."""

    names = ("spot",)
    image_multiple = 32

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = images.sum(1).flatten(1).argmax(1)
        y, x = flat // images.shape[3], flat % images.shape[3]
        row = torch.stack((x + 0.5, y + 0.5, x * 0 + 10.0, x * 0 + 20.0, x * 0 + 1.0, x * 0 + 1.0), dim=1)
        return row[:, None], None


def test_every_look_of_the_augmentation_lands_in_the_image_s_own_frame() -> None:
    images = torch.zeros(1, 3, 128, 192)
    images[..., 20:32, 150:162] = 0.5
    images[..., 26, 156] = 1.0  # 36 pixels from the right border: a mirrored look left as it is would show
    found = Augmented(BrightSpot())(images)[0][0]
    assert found.shape == (3, 6)
    assert torch.allclose(found[:, :2], torch.tensor([156.5, 26.5]), atol=2.0)
    scales = torch.tensor([1.0, 0.83, 0.67])[:, None]
    assert torch.allclose(found[:, 2:4], torch.tensor([10.0, 20.0]) / scales, rtol=0.02)


def test_hiding_texts_draws_less_and_a_window_needs_a_display(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    original = cv2.imread(str(IMAGES[0])).astype(int)
    changed = []
    for name, flags in (("full", ["--view-img"]), ("bare", ["--hide-labels", "--line-thickness", "1"])):
        assert main([*FLAGS, "--source", str(IMAGES[0]), "--name", name, *flags]) == 0
        drawn = cv2.imread(str(runs / "detect" / name / IMAGES[0].name))
        changed.append((np.abs(drawn - original).max(2) > 60).sum())
    assert changed[0] > 2 * changed[1] > 0
    assert "no display" in capsys.readouterr().out


class Server(http.server.SimpleHTTPRequestHandler):
    """Serve a folder; `/file.jpg` and `/ftp.jpg` lead elsewhere, `/cut.jpg` promises more than it sends."""

    def do_GET(self) -> None:
        away = {"/file.jpg": "file:///etc/hostname", "/ftp.jpg": "ftp://127.0.0.1/a.jpg"}
        if self.path in away:
            self.send_response(302)
            self.send_header("Location", away[self.path])
            self.end_headers()
        elif self.path == "/cut.jpg":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the images and the video on this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    shutil.copyfile(video, folder / "clip.mp4")
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_url_is_fetched_into_the_run_folder_and_its_password_never_told(
    address: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "urls.txt"
    listed.write_text(f"http://user:secret@{address}/a.jpg?token=hidden\nhttp://{address}/clip.mp4\n")
    assert main([*FLAGS, "--source", str(listed), "--save-csv"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])
    assert told["frames"] == 8
    run = runs / "detect" / "exp"
    assert (run / "downloads" / "a.jpg").read_bytes() == IMAGES[0].read_bytes()
    assert (run / "a.jpg").is_file()
    assert frames_of(run / "clip.mp4")[0] == 7
    everything = said.out + said.err + (run / "predictions.csv").read_text()
    assert f"http://{address}/a.jpg" in everything
    assert "secret" not in everything
    assert "hidden" not in everything


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("file.jpg", "not allowed"),
        ("ftp.jpg", "redirects to ftp"),
        ("none.jpg", "404"),
        ("cut.jpg", "5 of 1,000 bytes"),
    ],
)
def test_a_url_that_misbehaves_is_a_data_error(
    address: str, runs: Path, page: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = fail(capsys, "--source", f"http://{address}/{page}")
    assert code == 3
    assert reason in message
    assert not list((runs / "detect").rglob("*.jpg*"))


def test_a_download_over_its_limit_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        download(f"http://{address}/a.jpg", tmp_path / "a.jpg", "a", limit=1000)
    assert not (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://host/a.jpg", "data://x/a.jpg"])
def test_other_schemes_are_not_read(source: str) -> None:
    with pytest.raises(DataError, match="is not read"):
        sources.find_sources(source)


def test_streams_and_webcams_are_told_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sources.find_sources("0") == [sources.Source(kind="stream", address=0)]
    for address in ("rtsp://user:pw@camera/stream", "http://camera/mjpeg", "https://host/live.m3u8"):
        (found,) = sources.find_sources(address)
        assert (found.kind, found.remote) == ("stream", False)
        assert "pw" not in found.shown
    several = tmp_path / "two.streams"
    several.write_text("rtsp://a/1\nrtsp://b/2\n")
    with pytest.raises(UsageError, match="never ends"):
        sources.find_sources(str(several))
    code, message = fail(capsys, "--source", "97")
    assert code == 3
    assert "webcam 97" in message


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--source", "x", "--conf-thres", "2"], "from 0 to 1"),
        (["--source", "x", "--imgsz", "1", "2"], "32"),
        (["--source", "x", "--imgsz", "64", "64", "64"], "height and width"),
        (["--source", "x", "--vid-stride", "0"], "at least 1"),
        (["--source", "x", "--save-conf"], "--save-txt"),
        (["--source", "x", "--name", "../up"], "one folder name"),
        (["--source", "x", "--visualize"], "not drawn"),
        (["--source", "x", "--save-text"], "--save-txt"),
    ],
)
def test_a_wrong_flag_says_what_and_why(flags: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_args(flags)


def test_help_answers_from_the_app_folder_without_torch() -> None:
    for command in ("detect", "export"):
        program = (
            f"import sys, runpy; sys.argv = ['{command}.py', '--help']\n"
            f"try: runpy.run_path('{command}.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY / "app", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "examples:" in done.stdout


def test_a_video_that_cannot_be_begun_leaves_nothing(
    video: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2.VideoWriter, "fourcc", lambda *letters: 0x21212121)
    code, message = fail(capsys, "--source", str(video))
    assert code == 3
    assert "--nosave" in message
    assert [path.name for path in (runs / "detect" / "exp").iterdir()] == ["outputs.json"]


def test_a_film_is_kept_as_far_as_it_could_be_read(
    video: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*args: Any) -> Iterator[sources.Frame]:
        for frame in sources.frames(*args):
            if frame.number == 3:
                raise DataError("the camera is gone")
            yield frame

    monkeypatch.setattr(detecting, "frames", torn)
    assert fail(capsys, "--source", str(video)) == (3, "error: the camera is gone\n")
    assert frames_of(runs / "detect" / "exp" / "clip.mp4")[0] == 3
